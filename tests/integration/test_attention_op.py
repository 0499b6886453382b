"""Attention as one ONNX operator or as primitive ones: who gets which, that both compute the same,
and that NVIDIA's parser and builder take both (TensorRT for RTX, where its wheel is installed)."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from anyflow_deploy import Bundle, load_engine
from anyflow_deploy.bundle.manifest import MANIFEST, GraphTensor, Manifest
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.cli.export import ExportOptions
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.engines.metrics import difference
from anyflow_deploy.engines.tensorrt.build.optimization_profiles import (
    parse_video_shape,
    profiles,
)
from anyflow_deploy.engines.tensorrt.lint.lint import lint_bundle
from anyflow_deploy.engines.tensorrt.lint.operators import Version, first_version
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.export.exporter import ExportSettings, export_bundle
from anyflow_deploy.export.operator_choice import choose_operators
from anyflow_deploy.precision import resolve_precision
from anyflow_deploy.targets import TARGETS
from tests.conftest import CAUSAL, GOLDEN, SMALL, Export
from tests.integration.test_quantization_plan import RANGES, WIDE_HEADS, own

Golden = dict[str, NDArray[np.float32]]
FORMS = ("attention", "primitive")
FLOAT32 = 1e-5
HALF = 5e-4


def load_graph(bundle: Bundle, name: str) -> onnx.ModelProto:
    return onnx.load(str(bundle.path / f"{name}.onnx"), load_external_data=False)


def count_operators(bundle: Bundle, name: str) -> Counter[str]:
    return Counter(node.op_type for node in load_graph(bundle, name).graph.node)


# What is chosen.


@pytest.mark.parametrize(
    ("attention_op", "opset", "target", "precision", "attention", "expected"),
    [
        ("auto", None, "cpu", "fp32", "high", (20, "primitive")),
        ("auto", 20, "h100", "fp16", "high", (20, "primitive")),
        ("auto", 23, "cpu", "fp32", "high", (23, "attention")),
        ("auto", None, "orin", "fp16", "high", (20, "primitive")),
        ("auto", None, "thor", "fp16", "high", (20, "primitive")),
        ("auto", 23, "orin", "fp16", "high", (23, "attention")),
        ("auto", None, "rtx4090", "fp16", "high", (23, "attention")),
        ("auto", None, "rtx5090", "fp8", "high", (23, "attention")),
        ("auto", None, "h100", "int8", "high", (23, "attention")),
        ("auto", None, "h100", "fp32", "high", (20, "primitive")),
        ("auto", 23, "orin", "fp32", "high", (23, "primitive")),
        ("auto", None, "h100", "fp8", "fp8", (20, "primitive")),
        ("auto", 23, "h100", "fp8", "fp8", (23, "primitive")),
        ("attention", None, "cpu", "fp32", "high", (23, "attention")),
        ("primitive", None, "h100", "fp16", "high", (20, "primitive")),
        ("primitive", 23, "h100", "fp16", "high", (23, "primitive")),
    ],
)
def test_the_form_follows_target_opset_and_precision(
    attention_op: str,
    opset: int | None,
    target: str,
    precision: str,
    attention: str,
    expected: tuple[int, str],
) -> None:
    spec = resolve_precision(precision, None, target, attention)
    choice = choose_operators(attention_op, opset, target, spec)
    assert (choice.opset, choice.attention_op) == expected
    assert choice.reason


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--attention-op fused", "attention-op is 'fused'; allowed are auto, attention, primitive"),
        ("--attention-op attention --opset 20", "an operator of opset 23, and opset is 20. Leave"),
        (
            "--attention-op attention --precision fp8 --attention fp8 --target h100",
            "rounds between its two products.*--attention-op primitive, or --attention high",
        ),
        ("--opset 22", "opset is 22; allowed are 20 and 23"),
    ],
)
def test_what_does_not_go_together_is_refused_before_work(flags: str, message: str) -> None:
    with pytest.raises(AnyFlowError, match=message):
        parse_options(ExportOptions, ["--model", "tiny", *flags.split()])


def test_only_a_tensorrt_that_a_user_can_choose_is_counted_on() -> None:
    """A Jetson's is JetPack's, and the oldest of them does not read the operator."""
    since = first_version("Attention")
    assert since is not None and since > Version(10, 13)
    refusing = {name for name, row in TARGETS.items() if not row.takes_attention}
    assert {"cpu", "orin", "orin-nx", "orin-nano", "thor"} <= refusing
    assert not refusing & {"l4", "rtx4090", "rtx5090", "h100", "b200"}


# What is written.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("checkpoint", "graph", "attentions"),
    [(SMALL, "transition", 6), (CAUSAL, "chunk", 6), (CAUSAL, "compress", 4)],
    ids=["bidirectional", "chunk", "compress"],
)
def test_the_graph_is_written_as_the_manifest_says(
    export_with: Export, checkpoint: Path, graph: str, attentions: int, form: str
) -> None:
    bundle = export_with(checkpoint, False, opset=23, attention_op=form)
    assert bundle.manifest.attention_op == form
    count = count_operators(bundle, graph)
    spelled_out = form == "primitive"
    assert count["Attention"] == (0 if spelled_out else attentions)
    assert count["Softmax"] == count["MatMul"] / 2 == (attentions if spelled_out else 0)
    assert count["RMSNormalization"] > 0 and count["ReduceMean"] == 0
    assert lint_bundle(bundle, ["10.15", "11.4"]) == []


def test_the_default_is_what_it_was(export_with: Export) -> None:
    """Bundles for the CPU, and those that name an opset, keep their graphs."""
    default = export_with(SMALL, False)
    named = export_with(SMALL, False, opset=20, attention_op="primitive")
    file = "transition.onnx"
    assert default.manifest.attention_op == "primitive"
    assert (default.path / file).read_bytes() == (named.path / file).read_bytes()
    at_23 = export_with(SMALL, False, opset=23)
    asked = export_with(SMALL, False, attention_op="attention")
    assert (at_23.path / file).read_bytes() == (asked.path / file).read_bytes()


def test_a_bundle_that_does_not_say_is_read(export_with: Export, tmp_path: Path) -> None:
    raw = json.loads((export_with(SMALL, False).path / MANIFEST).read_text())
    assert raw.pop("attention_op") == "primitive"
    assert Manifest.model_validate_json(json.dumps(raw)).attention_op is None


# What is computed.


@pytest.mark.parametrize("as_it_stands", [True, False], ids=["file", "engine"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("precision", "limit"), [("fp32", FLOAT32), ("fp16", HALF)])
def test_both_forms_compute_the_golden_velocity(
    golden: Golden,
    export_with: Export,
    precision: str,
    limit: float,
    form: str,
    as_it_stands: bool,
) -> None:
    bundle = export_with(GOLDEN, False, precision=precision, opset=23, attention_op=form)
    if as_it_stands:
        names = {"latents": "latents", "t": "timestep", "r": "r_timestep", "text": "text"}
        velocity = run_file(bundle, "transition", {n: golden[k] for n, k in names.items()})[1]
    else:
        with load_engine(bundle).start(golden["latents"], golden["text"]) as run:
            velocity = run.velocity(golden["timestep"], golden["r_timestep"])
    assert difference(velocity, golden["velocity"]).relative_l2 < limit


@pytest.mark.parametrize("graph", ["chunk", "compress"])
@pytest.mark.parametrize(("precision", "limit"), [("fp32", FLOAT32), ("fp16", 5e-3)])
def test_both_forms_of_a_causal_graph_compute_the_same(
    export_with: Export, precision: str, limit: float, graph: str
) -> None:
    """On a cache that holds something, and as the files stand, against the primitive form in
    float32; `test_causal` has the oracle."""
    reference = export_with(CAUSAL, False, opset=23, attention_op="primitive")
    bundle = export_with(CAUSAL, False, precision=precision, opset=23, attention_op="attention")
    expected, found = (
        run_file(b, graph, random_inputs(b.manifest.graphs[graph].inputs))
        for b in (reference, bundle)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert difference(ours, theirs).relative_l2 < limit


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_both_forms_compute_the_same_in_eight_bits(
    golden: Golden, export_quantized: Export, precision: str
) -> None:
    """Only linear layers are rounded; a sum that falls on the other side of a rounding border is
    all that may differ."""
    velocities = []
    for form in FORMS:
        bundle = export_quantized(SMALL, precision, opset=23, attention_op=form, smooth=False)
        assert bundle.manifest.attention_op == form
        with load_engine(bundle).start(golden["latents"], golden["text"]) as run:
            velocities.append(run.velocity(golden["timestep"], golden["r_timestep"]))
    assert difference(*velocities).relative_l2 < 1e-3


def test_fp8_attention_stays_primitive_at_either_opset(tmp_path: Path) -> None:
    """Q/DQ sits between its products, inside what `Attention` would be."""
    weights = RandomWeights(WIDE_HEADS, "one block")
    settings = ExportSettings(
        "fp8", "cpu", ranges=RANGES, attention="fp8", calibration=own(weights)
    )
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((1, 2, 4, 8, 12), dtype=np.float32)
    text = generator.standard_normal((1, 40, 32), dtype=np.float32)
    velocities = []
    for opset in (20, 23):
        settings = dataclasses.replace(settings, opset=opset)
        bundle = export_bundle(weights, tmp_path / str(opset), settings)
        assert bundle.manifest.attention_op == "primitive"
        count = count_operators(bundle, "transition")
        assert count["Attention"] == 0 and count["Softmax"] == 2
        with load_engine(bundle).start(latents, text) as run:
            velocities.append(run.velocity(900, 500))
    assert difference(*velocities).relative_l2 < 1e-2


def run_file(
    bundle: Bundle, graph: str, feed: dict[str, NDArray[Any]]
) -> list[NDArray[np.float32]]:
    """The file on disk, opened by plain ONNX Runtime."""
    session = onnxruntime.InferenceSession(
        bundle.path / f"{graph}.onnx", providers=["CPUExecutionProvider"]
    )
    return [np.asarray(output, np.float32) for output in session.run(None, feed)]


def random_inputs(inputs: list[GraphTensor]) -> dict[str, NDArray[Any]]:
    sides = {"batch": 1, "frames": 2, "height": 8, "width": 12, "text": 7, "past": 11}
    generator = np.random.default_rng(0)
    feed: dict[str, NDArray[Any]] = {}
    for tensor in inputs:
        shape = [side if isinstance(side, int) else sides[side] for side in tensor.shape]
        if tensor.name == "positions":
            feed[tensor.name] = np.arange(4, 4 + shape[0])
        elif tensor.name in ("t", "r"):
            feed[tensor.name] = np.full(shape, 900 if tensor.name == "t" else 500, np.float32)
        else:
            feed[tensor.name] = generator.standard_normal(shape).astype(tensor.dtype)
    return feed


# What NVIDIA's parser and builder say.


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("checkpoint", [SMALL, CAUSAL], ids=lambda path: path.name)
def test_tensorrt_for_rtx_fuses_attention(
    export_with: Export, checkpoint: Path, precision: str
) -> None:
    """Each `Attention` becomes TensorRT's own, which may not be decomposed: that a plan for 8.9 and
    12.0 comes out means one kernel for each."""
    bundle = export_with(
        checkpoint, False, precision=precision, target="rtx4090", attention_op="attention"
    )
    for graph in bundle.manifest.graphs:
        layers, decomposable, plan = build_with_rtx(bundle, graph)
        assert layers["ATTENTION_INPUT"] == count_operators(bundle, graph)["Attention"]
        assert layers["SOFTMAX"] == 0 and not any(decomposable)
        assert plan > 0


@pytest.mark.parametrize("form", FORMS)
def test_tensorrt_for_rtx_builds_fp32_attention_from_primitive_operators_only(
    export_with: Export, form: str
) -> None:
    """Why `auto` is primitive for fp32. When this fails, TensorRT has learned it."""
    bundle = export_with(SMALL, False, opset=23, attention_op=form)
    layers, _, plan = build_with_rtx(bundle, "transition")
    assert (plan > 0) == (form == "primitive")
    assert layers["SOFTMAX"] == (6 if form == "primitive" else 0)


def build_with_rtx(bundle: Bundle, graph: str) -> tuple[Counter[str], list[bool], int]:
    """Kinds of layers in the parsed network, whether each attention may be decomposed, and bytes of
    the plan for 8.9 and 12.0 (0: refused)."""
    trt: Any = pytest.importorskip(
        "tensorrt_rtx", reason="the package tensorrt-rtx-cu12 is not installed"
    )
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    parsed = parser.parse_from_file(str(bundle.path / f"{graph}.onnx"))
    assert parsed, [parser.get_error(n).desc() for n in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 2
    for index, capability in enumerate((trt.ComputeCapability.SM89, trt.ComputeCapability.SM120)):
        config.set_compute_capability(capability, index)
    # long enough for a causal model to compress a chunk
    shape = parse_video_shape("64x96x45:t7", bundle.manifest)
    for profile in profiles(bundle.manifest, [shape], False)[graph]:
        ends = builder.create_optimization_profile()
        for name, (low, middle, high) in profile.shapes.items():
            ends.set_shape(name, low, middle, high)
        config.add_optimization_profile(ends)
    layers = [network.get_layer(n) for n in range(network.num_layers)]
    decomposable = []
    for layer in layers:
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            decomposable.append(layer.attention.decomposable)
    plan = builder.build_serialized_network(network, config)
    size = 0 if plan is None else plan.nbytes
    return Counter(layer.type.name for layer in layers), decomposable, size
