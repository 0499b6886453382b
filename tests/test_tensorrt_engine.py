"""The TensorRT backend on the stand-in: golden vectors through plans, buffers, streams, caches and captured graphs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from anyflow_deploy import AnyFlowError, BackendError, Bundle, Schedule, ShapeError, load_bundle, load_engine, sample
from anyflow_deploy.engines.building import build_engine
from anyflow_deploy.engines.metrics import difference
from anyflow_deploy.engines.tensorrt_build import TensorRTSettings
from tests.conftest import CAUSAL, Export
from tests.tensorrt_machine import FACING, RELEASES, Machine, install

LIMIT = 1e-5


@pytest.fixture(params=RELEASES)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    made = Machine(request.param)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    install(made, monkeypatch)
    yield made
    for name in FACING:
        sys.modules.pop(f"anyflow_deploy.engines.tensorrt_{name}", None)


def built(bundle: Bundle, folder: Path, shapes: tuple[str, ...], **settings: Any) -> Path:
    destination = folder / "engine"
    build_engine(bundle, "tensorrt", TensorRTSettings(shapes=shapes, **settings), destination)
    return destination


def size_of(latents: NDArray[Any], text: NDArray[Any]) -> str:
    batch, frames, _, height, width = latents.shape
    return f"{8 * height}x{8 * width}x{4 * frames - 3}:b{batch}:t{text.shape[1]}"


def test_golden_samples(machine: Machine, golden: dict[str, NDArray[Any]], golden_bundle: Export, tmp_path: Path) -> None:
    bundle = golden_bundle()
    folder = built(bundle, tmp_path, (size_of(golden["latents"], golden["text"]),))
    engine = load_engine(bundle, "tensorrt", "cuda", engine=folder)
    assert engine.description == f"TensorRT {machine.trt.__version__}, NVIDIA Stand-in, fp32"
    for steps in (1, 2, 4, 8, 13):
        latents = sample(engine, golden["latents"], golden["text"], Schedule.uniform(steps))
        assert difference(latents, golden[f"sample_{steps}"]).relative_l2 < LIMIT
    assert machine.cuda.launches > 10
    engine.close()
