"""TensorRT itself, on a GPU: golden vectors through engines built here. Skipped, with the reason,
where either is missing.

    pytest -m tensorrt

What the stand-in cannot prove is proven here: that TensorRT takes the graphs, that its kernels
compute the right numbers, that graphs can be captured, that the inspector's list reads as we read
it.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from anyflow_deploy import BackendError, Bundle, Schedule, load_engine, sample, stream
from anyflow_deploy.engines.build import build_engine
from anyflow_deploy.engines.metrics import difference
from anyflow_deploy.engines.tensorrt.build.settings import TensorRTSettings
from anyflow_deploy.engines.validation import THRESHOLDS
from tests.conftest import CAUSAL, SMALL, Export, causal_golden

pytestmark = pytest.mark.tensorrt

FLOAT32 = 1e-4
"""TF32 is off; what is left is the order of sums."""

Golden = dict[str, NDArray[Any]]


@pytest.fixture(scope="module", autouse=True)
def here() -> None:
    """Skip unless TensorRT can be imported and finds a GPU."""
    for module in ("tensorrt", "cuda"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed (pip install 'anyflow-deploy[tensorrt]')")
    try:
        from anyflow_deploy.engines.tensorrt.cuda import CudaDevice

        CudaDevice()
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def small() -> Golden:
    return load_file(SMALL / "golden.safetensors")


@pytest.fixture(scope="module")
def oracle() -> Golden:
    return causal_golden()


def opened(
    bundle: Bundle, folder: Path, shape: str, cuda_graphs: bool = True, **settings: Any
) -> Any:
    destination = folder / "engine"
    build_engine(
        bundle,
        "tensorrt",
        TensorRTSettings(shapes=(shape,), **settings),
        destination,
        overwrite=destination.exists(),
    )
    return load_engine(bundle, "tensorrt", "cuda", engine=destination, cuda_graphs=cuda_graphs)


def size_of(latents: NDArray[Any], text: NDArray[Any]) -> str:
    batch, frames, _, height, width = latents.shape
    return f"{8 * height}x{8 * width}x{4 * frames - 3}:t{text.shape[1]}" + (
        f":b{batch}" if batch > 1 else ""
    )


@pytest.mark.parametrize(
    ("precision", "limit"), [("fp32", FLOAT32), ("fp16", THRESHOLDS["fp16"].transition)]
)
def test_golden_samples(
    export_once: Export, small: Golden, tmp_path: Path, precision: str, limit: float
) -> None:
    engine = opened(
        export_once(SMALL, precision), tmp_path, size_of(small["latents"], small["text"])
    )
    for steps in (1, 2, 4, 8, 13):
        latents = sample(engine, small["latents"], small["text"], Schedule.uniform(steps))
        assert difference(latents, small[f"sample_{steps}"]).relative_l2 < limit


@pytest.mark.parametrize(("precision", "limit"), [("fp32", FLOAT32), ("fp16", 5e-3)])
def test_golden_streams(
    export_once: Export, oracle: Golden, tmp_path: Path, precision: str, limit: float
) -> None:
    engine = opened(
        export_once(CAUSAL, precision), tmp_path, size_of(oracle["latents"], oracle["text"])
    )
    for steps in (1, 2, 8):
        chunks = stream(engine, oracle["latents"], oracle["text"], Schedule.uniform(steps))
        made = np.concatenate([chunk.latents for chunk in chunks], axis=1)
        assert difference(made, oracle[f"sample_{steps}"]).relative_l2 < limit


def test_graphs_compute_the_same_bits(export_once: Export, small: Golden, tmp_path: Path) -> None:
    bundle = export_once(SMALL)
    size = size_of(small["latents"], small["text"])
    results = []
    for graphs in (True, False):
        engine = (
            opened(bundle, tmp_path, size, graphs)
            if graphs
            else load_engine(
                bundle, "tensorrt", "cuda", engine=tmp_path / "engine", cuda_graphs=False
            )
        )
        results.append(sample(engine, small["latents"], small["text"], Schedule.uniform(13)))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(
    "settings",
    [{"strip": True}, {"refit": True}, {"version_compatible": True}, {"weight_streaming": True}],
)
def test_kinds_of_plans(
    export_once: Export, small: Golden, tmp_path: Path, settings: dict[str, bool]
) -> None:
    engine = opened(
        export_once(SMALL), tmp_path, size_of(small["latents"], small["text"]), **settings
    )
    latents = sample(engine, small["latents"], small["text"], Schedule.uniform(4))
    assert difference(latents, small["sample_4"]).relative_l2 < FLOAT32


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_eight_bits_are_achieved(
    export_quantized: Export, small: Golden, tmp_path: Path, precision: str
) -> None:
    bundle = export_quantized(SMALL, precision)
    try:
        engine = opened(bundle, tmp_path, size_of(small["latents"], small["text"]))
    except BackendError as error:
        if "needs compute capability" in str(error):
            pytest.skip(str(error))
        raise
    record = json.loads((tmp_path / "engine" / "engine.json").read_text())
    assert (
        record["achieved"]["eight_bit_products"] == 1.0
        and not record["achieved"]["not_found_by_inspector"]
    )
    theirs = sample(load_engine(bundle), small["latents"], small["text"], Schedule.uniform(4))
    ours = sample(engine, small["latents"], small["text"], Schedule.uniform(4))
    assert difference(ours, theirs).relative_l2 < THRESHOLDS[precision].transition


def test_the_inspector_names_onnx_nodes(export_once: Export, small: Golden, tmp_path: Path) -> None:
    opened(export_once(SMALL, "fp16"), tmp_path, size_of(small["latents"], small["text"]))
    layers = json.loads((tmp_path / "engine" / "transition.layers.json").read_text())["Layers"]
    assert any("[ONNX Layer: " in layer.get("Metadata", "") for layer in layers)


def test_memory_is_given_back(export_once: Export, small: Golden, tmp_path: Path) -> None:
    import gc

    from anyflow_deploy.engines.tensorrt.cuda import CudaDevice

    bundle = export_once(SMALL)
    size = size_of(small["latents"], small["text"])
    opened(bundle, tmp_path, size).close()
    gc.collect()
    free = CudaDevice().memory()[0]
    for _ in range(3):
        engine = load_engine(bundle, "tensorrt", "cuda", engine=tmp_path / "engine")
        sample(engine, small["latents"], small["text"], Schedule.uniform(4))
        engine.close()
        del engine
        gc.collect()
    assert CudaDevice().memory()[0] > free - (16 << 20)
