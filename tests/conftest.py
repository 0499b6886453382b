"""What the tests share: the golden vectors, a tiny pipeline, and bundles exported once a session.

Exports take about ten seconds each, so each kind is made once, and tests that damage a bundle copy it first.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from anyflow_deploy import MODELS, Bundle, load_bundle
from anyflow_deploy.calibration import Calibration
from anyflow_deploy.engine_folder import EngineFolder
from anyflow_deploy.export.checkpoint import open_checkpoint
from anyflow_deploy.export.exporter import ExportSettings, export_bundle
from anyflow_deploy.export.tiny import save_tiny_pipeline

SMALL = Path(__file__).parent / "golden" / "bidirectional"
"""The golden model that ships with the tests: a small checkpoint for everything else, too."""

CAUSAL = SMALL.parent / "causal"
"""The causal one."""

GOLDEN = Path(os.environ["ANYFLOW_GOLDEN"]) / "bidirectional" if os.environ.get("ANYFLOW_GOLDEN") else SMALL
"""The one that the golden tests read."""

Export = Callable[..., Bundle]


@pytest.fixture(scope="session")
def golden() -> dict[str, NDArray[np.float32]]:
    """The golden tensors."""
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports a checkpoint with given settings, once for each."""
    made: dict[tuple[object, ...], Bundle] = {}

    def bundle(checkpoint: Path, precision: str = "fp32", opset: int = 20, target: str = "cpu") -> Bundle:
        key = (checkpoint, precision, opset, target)
        if key not in made:
            settings = ExportSettings(precision, opset=opset, target=target)
            made[key] = export_bundle(open_checkpoint(checkpoint), tmp_path_factory.mktemp("exported") / "bundle", settings)
        return made[key]

    return bundle


@pytest.fixture(scope="session")
def golden_bundle(exported: Export) -> Export:
    """Exports the golden model."""
    return functools.partial(exported, GOLDEN)


@pytest.fixture(scope="session")
def small_bundle(exported: Export) -> Export:
    """Exports the small model."""
    return functools.partial(exported, SMALL)


def causal_golden(folder: Path = CAUSAL) -> dict[str, NDArray[Any]]:
    """The causal model's golden vectors, all latents as (B, F, C, H, W)."""
    raw = load_file(folder / "golden.safetensors")
    return {
        n.replace("_bcthw", ""): np.ascontiguousarray(a.transpose(0, 2, 1, 3, 4)) if "_bcthw" in n else a for n, a in raw.items()
    }


@functools.cache
def calibration_of(checkpoint: Path) -> Calibration:
    """Ranges of a small checkpoint, measured once."""
    from anyflow_deploy.export.calibration import CalibrationSettings, calibrated
    from anyflow_deploy.export.calibration_text import PROMPTS, random_text

    weights = open_checkpoint(checkpoint)
    shape = (8, 4, 8, 8) if weights.architecture.causal else (2, 4, 8, 12)
    return calibrated(weights, CalibrationSettings(random_text(weights, PROMPTS[:2], 40), shape, steps=(1, 2, 4)))


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports a small checkpoint in 8 bits, once for each set of settings."""

    @functools.cache
    def bundle(checkpoint: Path, precision: str, **settings: Any) -> Bundle:
        chosen = ExportSettings(precision, calibration=calibration_of(checkpoint), **settings)
        return export_bundle(open_checkpoint(checkpoint), tmp_path_factory.mktemp("quantized") / "bundle", chosen)

    return bundle


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Bundle], EngineFolder]:
    """Builds a bundle's AOTInductor engine outside of it, once for all of pytest's processes: it takes half a minute.

    The wrapper (which decides nothing but how fast operators are called) is compiled without the optimizer.
    """
    from filelock import FileLock

    from anyflow_deploy.engine_folder import load_engine_folder
    from anyflow_deploy.engines.aotinductor_build import AotInductorSettings
    from anyflow_deploy.engines.building import build_engine
    from anyflow_deploy.export import aotinductor

    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "compiled"
    shared.mkdir(exist_ok=True)
    quick = {**aotinductor.OPTIONS, "aot_inductor.compile_wrapper_opt_level": "O0", "cpp.vec_isa_ok": True}

    def folder(bundle: Bundle) -> EngineFolder:
        destination = shared / bundle.digest[:16]
        with FileLock(shared / f"{bundle.digest[:16]}.lock"), pytest.MonkeyPatch.context() as patch:
            if destination.exists():
                return load_engine_folder(destination)
            patch.setattr(aotinductor, "OPTIONS", quick)
            return build_engine(load_bundle(bundle.path, verify=False), "aotinductor", AotInductorSettings(), destination)

    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete tiny pipeline, as diffusers saves it."""
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    save_tiny_pipeline(MODELS["tiny"], folder)
    return folder


@pytest.fixture(scope="session")
def far_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a causal transformer."""
    folder = tmp_path_factory.mktemp("far-tiny") / "pipeline"
    save_tiny_pipeline(MODELS["far-tiny"], folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_pipeline: Path) -> Bundle:
    """The tiny pipeline's bundle, float32."""
    return export_bundle(open_checkpoint(tiny_pipeline), tiny_pipeline.parent / "bundle")


@pytest.fixture
def small_config() -> dict[str, int]:
    """The small model's config.json."""
    return json.loads((SMALL / "config.json").read_text())


@pytest.fixture
def trt_machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A machine with the TensorRT release `request.param` (11.4 without one) and a GPU, acted: see tensorrt_machine.py."""
    from tests.tensorrt_machine import Machine, forget, install

    machine = Machine(getattr(request, "param", "11.4"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    install(machine, monkeypatch)
    yield machine
    forget()
