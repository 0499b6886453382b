"""Every 8-bit product alone: ONNX Runtime and PyTorch agree on the same input, to the last digits
of a float32 sum."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest

from anyflow_deploy import AnyFlowError, Bundle, load_bundle, load_engine, noise, stream
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.checkpoints.weights import Weights
from anyflow_deploy.engines.engine import Array, Engine
from anyflow_deploy.engines.metrics import difference
from anyflow_deploy.engines.tensorrt.lint.real_parser import parse_graphs
from anyflow_deploy.engines.validation import THRESHOLDS
from anyflow_deploy.export.exporter import ExportSettings, export_bundle
from anyflow_deploy.export.quantization.calibrate import CalibrationSettings, run_calibration
from anyflow_deploy.export.quantization.fake_quant import FakeQuant
from anyflow_deploy.export.quantization.matmul_parity import compare_products
from anyflow_deploy.export.quantization.plan import plan_quantization
from anyflow_deploy.export.quantization.prompts import random_prompt_embeds
from anyflow_deploy.export.quantization.rollouts import run_rollout
from anyflow_deploy.export.torch_engine import TorchEngine
from anyflow_deploy.precision import PrecisionSpec
from anyflow_deploy.progress import NullProgress
from anyflow_deploy.quantization.calibration import Calibration
from anyflow_deploy.quantization.layers import quantizable_layers
from anyflow_deploy.schedule import Schedule
from tests.conftest import CAUSAL, SMALL, Export, calibration_of

ALONE = 1e-5
"""Nothing may fall to the other side of a rounding border; the worst measured is 2.5e-7. (The
promise is 1e-3.)"""

STREAM = (8, 4, 8, 8)


def apart(
    bundle: Bundle,
    weights: Weights,
    calibration: Calibration,
    shape: tuple[int, ...],
    loud: float = 1.0,
) -> dict[str, float]:
    """Relative L2 of every product; `loud` multiplies the noise, beyond what calibration has
    seen."""
    how, a = bundle.manifest.quantization, weights.architecture
    assert how is not None
    spec = PrecisionSpec(bundle.manifest.precision, how.base, how.attention, how.smooth)
    plan = plan_quantization(weights, calibration, spec, (), NullProgress())
    reference = TorchEngine(weights)
    attention = ("attn1", "attn2") if how.attention == "fp8" else ()
    FakeQuant(
        reference.network,
        a,
        calibration,
        bundle.manifest.precision,
        smooth=plan.smooth,
        attention=attention,
    )
    text = random_prompt_embeds(weights, ("measured",), 40).prompt_embeds * loud
    latents = (noise((1, *shape), 7) * loud).astype(np.float32)
    return compare_products(
        bundle,
        reference,
        plan.smooth,
        lambda engine: run_rollout(engine, latents, text, Schedule.uniform(2)),
    )


@pytest.mark.parametrize("loud", [1.0, 3.0], ids=["calibrated", "beyond"])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("checkpoint", [SMALL, CAUSAL], ids=lambda path: path.name)
def test_every_layer_alone_agrees(
    export_quantized: Export, checkpoint: Path, precision: str, loud: float
) -> None:
    """Also where inputs leave their calibrated range, and saturate."""
    weights = open_checkpoint(checkpoint)
    shape = STREAM if checkpoint == CAUSAL else (2, 4, 8, 12)
    found = apart(
        export_quantized(checkpoint, precision=precision),
        weights,
        calibration_of(checkpoint),
        shape,
        loud,
    )
    assert found.keys() == quantizable_layers(weights.architecture).keys()
    assert max(found.values()) < ALONE, found


@pytest.fixture(scope="module")
def causal() -> tuple[Weights, Calibration]:
    """Two causal blocks, so that the compressing graph attends, with heads that fit FP8."""
    a = open_checkpoint(CAUSAL).architecture
    a = dataclasses.replace(a, num_attention_heads=3, attention_head_dim=32, num_layers=2)
    weights = RandomWeights(a, "causal heads")
    return weights, run_calibration(
        weights,
        CalibrationSettings(
            random_prompt_embeds(weights, ("one", "two"), 40), STREAM, steps=(1, 2)
        ),
    )


@pytest.fixture(scope="module")
def causal_bundle(
    causal: tuple[Weights, Calibration], tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    weights, calibration = causal
    settings = ExportSettings("fp8", calibration=calibration, attention="fp8")
    return export_bundle(weights, tmp_path_factory.mktemp("causal") / "bundle", settings)


def test_causal_attention_in_fp8_rounds_its_products(causal_bundle: Bundle) -> None:
    """In the two graphs that attend, the past included; the compressing one leaves its last layer
    out."""
    for name, layers in (("text", 0), ("chunk", 2), ("compress", 1)):
        path = str(causal_bundle.path / causal_bundle.manifest.graphs[name].file)
        onnx.checker.check_model(path, full_check=True)
        graph = onnx.load(path, load_external_data=False).graph
        made = {output: node for node in graph.node for output in node.output}
        products = [
            n
            for n in graph.node
            if n.op_type == "MatMul" and {made[i].op_type for i in n.input} == {"DequantizeLinear"}
        ]
        assert (
            len(products)
            == 4 * layers
            == sum(n.op_type == "MatMul" for n in graph.node if ".attn" in n.name)
        ), name


def test_nvidias_parser_takes_attention_in_fp8(causal_bundle: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    graphs = causal_bundle.manifest.graphs.values()
    paths = [causal_bundle.file(record.file) for record in graphs]
    assert parse_graphs(paths, "tensorrt-rtx").problems == ()


def test_causal_attention_in_fp8_agrees_product_by_product(
    causal_bundle: Bundle, causal: tuple[Weights, Calibration]
) -> None:
    weights, calibration = causal
    found = apart(causal_bundle, weights, calibration, STREAM)
    attentions = {
        f"blocks.{n}.{kind}.{product}"
        for n in (0, 1)
        for kind in ("attn1", "attn2")
        for product in ("scores", "mixed")
    }
    assert found.keys() == quantizable_layers(weights.architecture).keys() | attentions
    assert max(found.values()) < ALONE, found


def test_causal_attention_in_fp8_makes_the_video(
    causal_bundle: Bundle, causal: tuple[Weights, Calibration]
) -> None:
    """Through the cache, compressed chunks and all: the first chunk as PyTorch rounds it, the whole
    nearer to that than to float32 (what falls to the other side of a border is carried on from
    chunk to chunk)."""
    weights, calibration = causal
    latents = noise((1, *STREAM), 7)
    text = random_prompt_embeds(weights, ("measured",), 40).prompt_embeds
    made = streamed(load_engine(causal_bundle), latents, text)
    exact = TorchEngine(weights)
    reference = TorchEngine(weights)
    FakeQuant(
        reference.network, weights.architecture, calibration, "fp8", attention=("attn1", "attn2")
    )
    rounded = streamed(reference, latents, text)
    rounding = difference(made, streamed(exact, latents, text)).relative_l2
    assert difference(made[:, :1], rounded[:, :1]).relative_l2 < 1e-3
    assert difference(made, rounded).relative_l2 < 0.7 * rounding
    assert THRESHOLDS["fp32"].rollout < rounding < THRESHOLDS["fp8"].rollout


def streamed(engine: Engine, latents: Array, text: Array) -> Array:
    return np.concatenate(
        [c.latents for c in stream(engine, latents, text, Schedule.uniform(4), (1, 3, 3, 1))],
        axis=1,
    )


@pytest.fixture(scope="module")
def broken(export_quantized: Export, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One scale of one row, one per cent off."""
    source = export_quantized(SMALL, precision="int8").path
    folder = tmp_path_factory.mktemp("broken")
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return load_bundle(folder)


def test_a_wrong_scale_is_seen_and_named(broken: Bundle) -> None:
    layer = "blocks.1.ffn.net.0.proj"
    graph = onnx.load(str(broken.path / "transition.onnx"), load_external_data=False)
    tensor = next(t for t in graph.graph.initializer if t.name == f"{layer}.weight_scale")
    places = {entry.key: entry.value for entry in tensor.external_data}
    data = bytearray((broken.path / "weights.safetensors").read_bytes())
    start = int(places["offset"])
    scales = np.frombuffer(
        bytes(data[start : start + int(places["length"])]), np.float32
    ) * np.float32(1.01)
    data[start : start + int(places["length"])] = scales.tobytes()
    (broken.path / "weights.safetensors").write_bytes(data)
    found = apart(broken, open_checkpoint(SMALL), calibration_of(SMALL), (2, 4, 8, 12))
    assert found.pop(layer) > 5e-3 and max(found.values()) < ALONE


def test_refusals(export_quantized: Export, small_bundle: Export) -> None:
    reference = TorchEngine(open_checkpoint(SMALL))
    with pytest.raises(AnyFlowError, match="has no product in eight bits"):
        compare_products(small_bundle(), reference, {}, lambda engine: None)
    with pytest.raises(AnyFlowError, match=r"blocks\.0\.attn\d\.to_[qkv] did not run in PyTorch"):
        compare_products(
            export_quantized(SMALL, precision="int8"), reference, {}, lambda engine: None
        )
