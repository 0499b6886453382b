"""What the tests share: the golden vectors, tiny pipelines, calibrations, and bundles exported once
a session.

Exports take seconds each, so each kind is made once for all workers (see artifact_cache.py). A
worker has its own copy of each bundle, and tests that damage one copy it first.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from anyflow_deploy import MODELS, Bundle, load_bundle
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.checkpoints.tiny import save_tiny_pipeline
from anyflow_deploy.engines.engine_folder import EngineFolder, load_engine_folder
from anyflow_deploy.export import exporter
from anyflow_deploy.export.exporter import ExportSettings, export_bundle
from anyflow_deploy.quantization.calibration import Calibration, load_calibration
from tests.artifact_cache import ARTIFACTS, translate_cached

SMALL = Path(__file__).parent / "golden" / "bidirectional"
"""The golden model that ships with the tests: a small checkpoint for everything else, too."""

CAUSAL = SMALL.parent / "causal"
"""The causal one."""

GOLDEN = (
    Path(os.environ["ANYFLOW_GOLDEN"]) / "bidirectional"
    if os.environ.get("ANYFLOW_GOLDEN")
    else SMALL
)
"""The one that the golden tests read."""

Export = Callable[..., Bundle]

LONGEST = (
    "test_promises",
    "test_aotinductor",
    "test_quantize",
    "test_training",
    "test_matmul_parity",
    "test_exporter",
    "test_causal",
    "test_causal_generate",
)
"""Files that begin first, so that no worker is left with a long one when the others are done; the
two at the front record different graphs, so that neither waits for the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of `LONGEST`, then as collected."""
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)
        )
    )


@pytest.fixture(scope="session")
def golden() -> dict[str, NDArray[np.float32]]:
    """The golden tensors."""
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell starts what it puts into the background with SIGINT ignored, and children inherit
    that."""
    if (
        signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        and threading.current_thread() is threading.main_thread()
    ):
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch computes on one thread, as the processes do that a test compares with bit for bit: sums
    are split by threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def artifact_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The folder of tests/artifact_cache.py, and exports that read recorded graphs from it."""
    own = tmp_path_factory.getbasetemp()
    ARTIFACTS.root = (own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own) / "shared"
    ARTIFACTS.root.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "translate_graph", translate_cached)
        yield


@pytest.fixture(scope="session")
def export_with(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports a checkpoint with given settings; each worker has its own copy."""

    @functools.cache
    def bundle(checkpoint: Path, with_calibration: bool, **export_options: Any) -> Bundle:
        def make(path: Path) -> None:
            settings = ExportSettings(
                **export_options,
                calibration=calibration_of(checkpoint) if with_calibration else None,
            )
            export_bundle(open_checkpoint(checkpoint), path, settings)

        cached_path = ARTIFACTS.cached_path(
            "bundle", (checkpoint, with_calibration, sorted(export_options.items())), make
        )
        folder = tmp_path_factory.mktemp("exported") / "bundle"
        shutil.copytree(cached_path, folder)
        return load_bundle(folder)

    return bundle


@pytest.fixture(scope="session")
def export_once(export_with: Export) -> Export:
    """Exports a checkpoint with given settings, once for each."""

    def bundle(
        checkpoint: Path, precision: str = "fp32", opset: int = 20, target: str = "cpu"
    ) -> Bundle:
        return export_with(checkpoint, False, precision=precision, opset=opset, target=target)

    return bundle


@pytest.fixture(scope="session")
def golden_bundle(export_once: Export) -> Export:
    """Exports the golden model."""
    return functools.partial(export_once, GOLDEN)


@pytest.fixture(scope="session")
def small_bundle(export_once: Export) -> Export:
    """Exports the small model."""
    return functools.partial(export_once, SMALL)


def causal_golden(folder: Path = CAUSAL) -> dict[str, NDArray[Any]]:
    """The causal model's golden vectors, all latents as (B, F, C, H, W)."""
    raw = load_file(folder / "golden.safetensors")
    return {
        n.replace("_bcthw", ""): (
            np.ascontiguousarray(a.transpose(0, 2, 1, 3, 4)) if "_bcthw" in n else a
        )
        for n, a in raw.items()
    }


@functools.cache
def calibration_of(checkpoint: Path) -> Calibration:
    """Ranges of a small checkpoint, measured once."""
    from anyflow_deploy.export.quantization.calibrate import (
        CalibrationSettings,
        run_calibration,
        write_calibration,
    )
    from anyflow_deploy.export.quantization.prompts import PROMPTS, random_prompt_embeds

    def make(path: Path) -> None:
        weights = open_checkpoint(checkpoint)
        frames, height, width = (8, 8, 8) if weights.architecture.causal else (2, 8, 12)
        shape = (frames, weights.architecture.in_channels, height, width)
        settings = CalibrationSettings(
            random_prompt_embeds(weights, PROMPTS[:2], 40), shape, steps=(1, 2, 4)
        )
        write_calibration(path, run_calibration(weights, settings))

    return load_calibration(ARTIFACTS.cached_path("calibration", checkpoint, make))


@pytest.fixture(scope="session")
def export_quantized(export_with: Export) -> Export:
    """Exports a small checkpoint in 8 bits, once for each set of settings."""

    def bundle(checkpoint: Path, precision: str, **settings: Any) -> Bundle:
        return export_with(checkpoint, True, precision=precision, **settings)

    return bundle


def pipeline_of(model: str) -> Path:
    """A complete tiny pipeline, as diffusers saves it. All workers read the same one."""
    return ARTIFACTS.cached_path(
        "pipeline", model, lambda path: save_tiny_pipeline(MODELS[model], path)
    )


@pytest.fixture(scope="session")
def tiny_pipeline() -> Path:
    """The bidirectional one."""
    return pipeline_of("tiny")


@pytest.fixture(scope="session")
def far_pipeline() -> Path:
    """The one with a causal transformer."""
    return pipeline_of("far-tiny")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_pipeline: Path, export_once: Export) -> Bundle:
    """The tiny pipeline's bundle, float32."""
    return export_once(tiny_pipeline)


@pytest.fixture(scope="session")
def far_bundle(far_pipeline: Path, export_once: Export) -> Bundle:
    """The causal pipeline's."""
    return export_once(far_pipeline)


@pytest.fixture(scope="session")
def quick_options() -> dict[str, Any]:
    """AOTInductor's options, but the wrapper, which decides nothing but how fast operators are
    called, is not optimized."""
    from anyflow_deploy.engines.aotinductor import compiler

    return {
        **compiler.OPTIONS,
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "cpp.vec_isa_ok": True,
    }


@pytest.fixture(scope="session")
def build_aotinductor(quick_options: dict[str, Any]) -> Callable[[Bundle], EngineFolder]:
    """Compiles a bundle with AOTInductor, once for all workers, who only read it."""
    from anyflow_deploy.engines.aotinductor import compiler
    from anyflow_deploy.engines.aotinductor.build import AotInductorSettings
    from anyflow_deploy.engines.build import build_engine

    def folder(bundle: Bundle) -> EngineFolder:
        def make(path: Path) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(compiler, "OPTIONS", quick_options)
                build_engine(bundle, "aotinductor", AotInductorSettings(), path)

        return load_engine_folder(ARTIFACTS.cached_path("engine", bundle.digest, make))

    return folder


@pytest.fixture
def small_config() -> dict[str, int]:
    """The small model's config.json."""
    return json.loads((SMALL / "config.json").read_text())


@pytest.fixture
def fake_tensorrt(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Any]:
    """A machine with the release `request.param` (TensorRT 11.4 without one) and a GPU, acted: see
    tests/fakes/tensorrt.py, and tests/fakes/tensorrt_rtx.py for TensorRT for RTX."""
    from tests.fakes.tensorrt import RTX, FakeTensorRT, install, unload_modules
    from tests.fakes.tensorrt_rtx import FakeTensorRTRtx

    release = getattr(request, "param", "11.4")
    machine = FakeTensorRTRtx() if release == RTX else FakeTensorRT(release)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    install(machine, monkeypatch)
    yield machine
    unload_modules()
