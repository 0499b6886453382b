"""8-bit bundles: the numbers ONNX Runtime gets out of them, what lies on disk, and what the graphs
look like.

The yardstick is PyTorch rounding on the same grids (`FakeQuant`), which knows nothing of ONNX.
Exports are shared; see `export_quantized` in conftest.
"""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from safetensors.torch import load_file

from anyflow_deploy import Bundle, Schedule, load_engine, noise, stream
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.engines.metrics import difference
from anyflow_deploy.engines.onnxruntime import engine as onnxruntime_engine
from anyflow_deploy.engines.onnxruntime import graph_rewrites
from anyflow_deploy.engines.onnxruntime.graph_rewrites import build_session_graph
from anyflow_deploy.engines.onnxruntime.int8 import saturates, shift_activations, shift_weights
from anyflow_deploy.engines.tensorrt.build.inspector import expected_precision
from anyflow_deploy.engines.validation import THRESHOLDS, Validation, validate
from anyflow_deploy.export import exporter
from anyflow_deploy.export.exporter import ExportSettings, export_bundle
from anyflow_deploy.export.quantization.fake_quant import FakeQuant
from anyflow_deploy.export.quantization.plan import (
    LARGEST,
    QuantizationPlan,
    plan_quantization,
    weight_scale_name,
)
from anyflow_deploy.export.torch_engine import TorchEngine
from anyflow_deploy.precision import PrecisionSpec
from anyflow_deploy.progress import NullProgress
from anyflow_deploy.quantization.layers import quantizable_layers
from tests.artifact_cache import translate_uncached
from tests.conftest import CAUSAL, SMALL, Export, calibration_of
from tests.integration.test_quantization_plan import WIDE_HEADS, own

AGREES = 1e-3
"""Two programs that round on the same grid differ where a sum of floats falls on either side of a
rounding border."""

KINDS = [
    (SMALL, {"precision": "int8"}),
    (SMALL, {"precision": "int8", "smooth": False, "opset": 23}),
    (SMALL, {"precision": "fp8"}),
    (CAUSAL, {"precision": "int8"}),
    (CAUSAL, {"precision": "fp8", "opset": 23}),
]
EVERY = pytest.mark.parametrize(
    ("checkpoint", "how"),
    KINDS,
    ids=[f"{c.name}-{'-'.join(map(str, h.values()))}" for c, h in KINDS],
)
GRAPHS = pytest.mark.parametrize(
    "kind", [KINDS[0], KINDS[2], KINDS[3]], ids=["int8", "fp8", "causal"]
)


def plan_of(bundle: Bundle, checkpoint: Path) -> QuantizationPlan:
    """The plan a bundle was made by, made again."""
    how = bundle.manifest.quantization
    assert how is not None
    calibration = calibration_of(checkpoint)
    weights = open_checkpoint(checkpoint)
    spec = PrecisionSpec(bundle.manifest.precision, how.base, how.attention, how.smooth)
    return plan_quantization(weights, calibration, spec, (), NullProgress())


def compared(bundle: Bundle, reference: TorchEngine, checkpoint: Path) -> Validation:
    """Velocities over the whole path, and rollouts."""
    causal = checkpoint == CAUSAL
    shape, chunks = ((1, 10, 4, 8, 8), (1, 3, 3, 3)) if causal else ((1, 2, 4, 8, 12), None)
    engine: Any = load_engine(bundle)
    steps = (4,) if causal else (1, 4)
    return validate(
        engine, reference, bundle.manifest.precision, shape, (1, 40, 32), steps=steps, chunks=chunks
    )


def largest(found: Validation) -> float:
    return max(item.difference.relative_l2 for item in (*found.transitions, *found.rollouts))


def model_of(bundle: Bundle, graph: str) -> onnx.ModelProto:
    return onnx.load(
        str(bundle.path / bundle.manifest.graphs[graph].file), load_external_data=False
    )


def stored(bundle: Bundle) -> dict[str, torch.Tensor]:
    return load_file(bundle.path / "weights.safetensors")


@EVERY
def test_onnx_runtime_rounds_as_pytorch_does(
    export_quantized: Export, checkpoint: Path, how: dict[str, Any]
) -> None:
    bundle = export_quantized(checkpoint, **how)
    weights = open_checkpoint(checkpoint)
    reference = TorchEngine(weights)
    factors = plan_of(bundle, checkpoint).smooth
    assert bool(factors) == (how["precision"] == "int8" and how.get("smooth", True))
    FakeQuant(
        reference.network,
        weights.architecture,
        calibration_of(checkpoint),
        how["precision"],
        smooth=factors,
    )
    assert largest(compared(bundle, reference, checkpoint)) < AGREES


@EVERY
def test_eight_bits_stay_near_float32(
    export_quantized: Export, checkpoint: Path, how: dict[str, Any]
) -> None:
    found = compared(
        export_quantized(checkpoint, **how), TorchEngine(open_checkpoint(checkpoint)), checkpoint
    )
    assert not found.failures
    assert largest(found) > THRESHOLDS["fp32"].rollout, "nothing was rounded"


@pytest.mark.parametrize("checkpoint", [SMALL, CAUSAL], ids=lambda path: path.name)
def test_smoothing_alone_changes_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same export, graph rewritten and weights multiplied, with everything of the plan but the
    rounding."""

    def without_rounding(*arguments: Any) -> QuantizationPlan:
        plan = plan_quantization(*arguments)
        assert (
            len(plan.smooth) == 7 * weights.architecture.num_layers
            and len(plan.norm_weights) == 4 * weights.architecture.num_layers
        )
        assert max(float(s.max() / s.min()) for s in plan.smooth.values()) > 2
        return dataclasses.replace(plan, inputs={})

    weights = open_checkpoint(checkpoint)
    monkeypatch.setattr(exporter, "plan_quantization", without_rounding)
    bundle = export_bundle(
        weights, tmp_path / "bundle", ExportSettings("int8", calibration=calibration_of(checkpoint))
    )
    assert bundle.manifest.achieved.quantized_flops == 0
    assert not torch.equal(
        stored(bundle)["blocks.0.ffn.net.0.proj.weight"],
        weights.read("blocks.0.ffn.net.0.proj.weight"),
    )
    assert largest(compared(bundle, TorchEngine(weights), checkpoint)) < 1e-5


@EVERY
def test_names_and_types_on_disk(
    export_quantized: Export, checkpoint: Path, how: dict[str, Any]
) -> None:
    bundle = export_quantized(checkpoint, **how)
    weights = open_checkpoint(checkpoint)
    tensors = stored(bundle)
    narrow = torch.int8 if how["precision"] == "int8" else torch.float8_e4m3fn
    eight = {f"{layer}.weight" for layer in quantizable_layers(weights.architecture)}
    for name, shape in weights.shapes().items():
        assert tensors[name].shape == shape and tensors[name].dtype == (
            narrow if name in eight else torch.float32
        ), name
    assert not any(
        tensor.float().any() for name, tensor in tensors.items() if name.startswith("zero_point")
    )
    assert (
        bundle.path / "calibration.json"
    ).is_file() and "calibration.json" in bundle.manifest.files


@GRAPHS
def test_weights_come_back_within_half_a_step(
    export_quantized: Export, kind: tuple[Path, dict[str, Any]]
) -> None:
    """Of the smoothed weights; and no scale is so small that anything would be clipped."""
    checkpoint, how = kind
    bundle = export_quantized(checkpoint, **how)
    weights = open_checkpoint(checkpoint)
    plan = plan_of(bundle, checkpoint)
    tensors = stored(export_quantized(checkpoint, **how))
    top = LARGEST[plan.kind]
    for layer in plan.inputs:
        name = f"{layer}.weight"
        expected = plan.apply_factors(name, weights.read(name))
        scale = tensors[weight_scale_name(name)]
        scale = scale.unsqueeze(1) if scale.ndim else scale
        assert bool((expected.abs() <= scale * top).all()) and bool((scale > 0).all()), name
        steps = (expected / scale - tensors[name].float()).abs()
        grid = (
            torch.full_like(steps, 0.5)
            if plan.kind == "I8"
            else ((expected / scale).abs() / 16).clamp_min(2.0**-10)
        )
        assert bool((steps <= grid * 1.00001).all()), name
        assert float((expected.abs() / scale).max()) == pytest.approx(top, rel=1e-5), name


@GRAPHS
def test_activations_are_not_clipped(
    export_quantized: Export, kind: tuple[Path, dict[str, Any]]
) -> None:
    checkpoint, how = kind
    bundle = export_quantized(checkpoint, **how)
    ranges = calibration_of(checkpoint).tensors
    plan = plan_of(bundle, checkpoint)
    tensors = stored(export_quantized(checkpoint, **how))
    for layer, scale in plan.inputs.items():
        channels = torch.tensor(ranges[f"{layer}.input"].channels)
        smoothed = channels / plan.smooth[layer] if layer in plan.smooth else channels
        assert float(smoothed.max()) <= float(tensors[scale]) * LARGEST[plan.kind] * (1 + 1e-6), (
            layer
        )


@EVERY
def test_the_graphs_are_standard_and_symmetric(
    export_quantized: Export, checkpoint: Path, how: dict[str, Any]
) -> None:
    bundle = export_quantized(checkpoint, **how)
    narrow = onnx.TensorProto.INT8 if how["precision"] == "int8" else onnx.TensorProto.FLOAT8E4M3FN
    seen = set()
    for name, graph in bundle.manifest.graphs.items():
        onnx.checker.check_model(str(bundle.path / graph.file), full_check=True)
        model = model_of(bundle, name)
        assert {o.domain for o in model.opset_import} == {""} and model.opset_import[
            0
        ].version == how.get("opset", 20)
        maker = {output: node for node in model.graph.node for output in node.output}
        held = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "QuantizeLinear":
                assert not held[node.input[1]].dims and held[node.input[2]].data_type == narrow
            if node.op_type != "Gemm" or node.input[1] not in maker:
                continue
            x, weight = maker[node.input[0]], maker[node.input[1]]
            layer = weight.input[0].removesuffix(".weight")
            seen.add(layer)
            assert (
                x.op_type == weight.op_type == "DequantizeLinear"
                and maker[x.input[0]].op_type == "QuantizeLinear"
            )
            assert len(node.input) == 2, "the bias is added behind the product"
            assert (
                f"{layer}.bias"
                in next(
                    n for n in model.graph.node if node.output[0] in n.input and n.op_type == "Add"
                ).input
            )
            assert held[weight.input[0]].data_type == narrow
            axes = [a.i for a in weight.attribute if a.name == "axis"]
            if how["precision"] == "int8":
                rows = held[weight.input[0]].dims[0]
                assert axes == [0] and [list(held[i].dims) for i in weight.input[1:]] == [
                    [rows],
                    [rows],
                ]
            else:
                assert len(weight.input) == 2 and not held[weight.input[1]].dims
    assert seen == set(quantizable_layers(bundle.manifest.architecture))


@GRAPHS
def test_layers_with_one_input_share_its_rounding(
    export_quantized: Export, kind: tuple[Path, dict[str, Any]]
) -> None:
    bundle = export_quantized(kind[0], **kind[1])
    graph = model_of(bundle, "chunk" if bundle.manifest.kind == "causal" else "transition").graph
    rounded = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    for block in range(3):
        sources = {
            n.input[0]
            for n in graph.node
            if n.name in {f"blocks.{block}.attn1.to_{x}/Gemm" for x in "qkv"}
        }
        assert len(sources) == 1 and sources < rounded.keys()
    text = model_of(bundle, "text").graph if bundle.manifest.kind == "causal" else graph
    assert sum(n.op_type == "QuantizeLinear" and n.input[1] == "text_scale" for n in text.node) == 1


def optimized(
    bundle: Bundle, name: str, folder: Path, unsigned_weights: bool = False
) -> onnx.GraphProto:
    """What ONNX Runtime makes of a graph."""
    a = bundle.manifest.architecture
    count = {"text": 0, "compress": 2 * (a.num_layers - 1)}.get(name, 2 * a.num_layers)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(bundle.path)
    )
    options.optimized_model_filepath = str(folder / f"{name}.onnx")
    data = build_session_graph(bundle, name, count, "cpu", unsigned_weights)
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath, load_external_data=False).graph


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("unsigned_weights", [False, True], ids=["u8s8", "u8u8"])
@pytest.mark.parametrize("checkpoint", [SMALL, CAUSAL], ids=lambda path: path.name)
def test_every_int8_layer_runs_in_int8(
    export_quantized: Export, checkpoint: Path, unsigned_weights: bool, opset: int, tmp_path: Path
) -> None:
    """The speed hangs on ONNX Runtime recognising the pattern; if it does not, it multiplies in
    float32 and says nothing."""
    bundle = export_quantized(
        checkpoint, precision="int8", **({} if opset == 20 else {"smooth": False, "opset": opset})
    )
    for name in bundle.manifest.graphs:
        rounded = sum(
            n.op_type == "DequantizeLinear" and len(n.attribute) > 0
            for n in model_of(bundle, name).graph.node
        )
        made = optimized(bundle, name, tmp_path, unsigned_weights)
        counts = collections.Counter(node.op_type for node in made.node)
        integer = [node for node in made.node if node.op_type in ("QGemm", "MatMulIntegerToFloat")]
        assert len(integer) == rounded > 0, counts
        assert "BitwiseXor" not in counts, "weights are shifted once, when the session opens"
        types = {tensor.name: tensor.data_type for tensor in made.initializer}
        zero_points = {types[node.input[2 if node.op_type == "QGemm" else 4]] for node in integer}
        assert zero_points == {TensorProto.UINT8}, (
            "signed activations are multiplied twelve times as slowly"
        )
        weights = {types[node.input[3 if node.op_type == "QGemm" else 1]] for node in integer}
        assert weights == {TensorProto.UINT8 if unsigned_weights else TensorProto.INT8}


def test_unsigned_activations_change_no_number(
    export_quantized: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where u8 x s8 overflows, a graph that is not shifted has no right integers to compare with:
    ONNX Runtime shifts some of its activations itself. There the same graph is computed in float32
    on rounded values, which may round a border the other way.
    """
    bundle = export_quantized(SMALL, precision="int8")
    a = bundle.manifest.architecture
    latents = noise((1, 2, a.in_channels, 4, 6), 0)
    text = noise((1, 5, a.text_dim), 1)
    shifted = load_engine(bundle).start(latents, text).velocity(900, 500)
    overflows = saturates(onnxruntime)
    monkeypatch.setattr(graph_rewrites, "shift_activations", lambda model: 0)
    monkeypatch.setattr(onnxruntime_engine, "saturates", lambda runtime: False)
    genuine = onnxruntime_engine.OnnxRuntimeEngine._session_options

    def unfused(self: Any, name: str, threads: int | None) -> Any:
        options = genuine(self, name, threads)
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        return options

    if overflows:
        monkeypatch.setattr(onnxruntime_engine.OnnxRuntimeEngine, "_session_options", unfused)
    plain = load_engine(bundle).start(latents, text).velocity(900, 500)
    assert difference(shifted, plain).relative_l2 < (AGREES if overflows else 1e-6)


@GRAPHS
def test_tensorrt_will_be_asked_about_every_layer(
    export_quantized: Export, kind: tuple[Path, dict[str, Any]]
) -> None:
    """The products that the inspector is searched for are those that the bundle says it
    quantized."""
    checkpoint, how = kind
    bundle = export_quantized(checkpoint, **how)
    for graph, record in bundle.manifest.graphs.items():
        asked = expected_precision(onnx.load(bundle.file(record.file), load_external_data=False))
        high = bundle.manifest.achieved.full_precision_layers
        layers = {name.removesuffix("/Gemm") for name in asked.eight_bit if name.endswith("/Gemm")}
        assert layers and not layers & set(high), graph


def test_fp8_is_kept_from_the_fusion_that_older_onnx_runtimes_break_it_with(
    export_quantized: Export,
) -> None:
    """1.23.2, which Python 3.10 gets, answers INVALID_GRAPH (seen; microsoft/onnxruntime issue
    22269); 1.32 does not."""
    entries = {}
    for precision in ("fp8", "int8"):
        options = (
            load_engine(export_quantized(SMALL, precision=precision))
            ._sessions["transition"]
            .get_session_options()
        )  # type: ignore[attr-defined]
        try:
            entries[precision] = options.get_session_config_entry("session.disable_quant_qdq")
        except RuntimeError:
            entries[precision] = "not set"
    assert entries == {"fp8": "1", "int8": "not set"}


def test_the_same_export_twice_is_the_same_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a graph that was recorded for any precision (see tests/artifact_cache.py), and from one
    that was recorded for this."""
    weights = RandomWeights(WIDE_HEADS, "one block")
    settings = ExportSettings("int8", calibration=own(weights))
    first = export_bundle(weights, tmp_path / "first", settings)
    monkeypatch.setattr(exporter, "translate_graph", translate_uncached)
    assert (
        export_bundle(weights, tmp_path / "again", settings).manifest.files == first.manifest.files
    )


def outputs_of(bundle: Bundle) -> list[NDArray[np.float32]]:
    """A velocity, or the chunks of a stream, of an engine that is opened for it."""
    engine = load_engine(bundle)
    a = bundle.manifest.architecture
    text = noise((1, 5, a.text_dim), 1)
    if not a.causal:
        return [engine.start(noise((1, 2, a.in_channels, 4, 6), 0), text).velocity(900, 500)]
    latents = noise((1, 7, a.in_channels, 4, 4), 0)
    return [
        chunk.latents for chunk in stream(engine, latents, text, Schedule.uniform(1), (1, 3, 3))
    ]


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[3]], ids=["int8", "opset 23", "causal"])
def test_unsigned_weights_change_no_bit(
    export_quantized: Export, kind: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways give the same integers. A processor that gets u8 x s8 wrong can only be held to the
    exact sums of `test_products_are_exact_on_this_processor`; the signed way is run for comparison
    where it is right.
    """
    bundle = export_quantized(kind[0], **kind[1])
    ways = [True] if saturates(onnxruntime) else [False, True]
    shifted: list[int] = []
    genuine = graph_rewrites.shift_weights
    monkeypatch.setattr(
        graph_rewrites, "shift_weights", lambda model: shifted.append(genuine(model))
    )
    outputs = []
    for unsigned in ways:
        monkeypatch.setattr(onnxruntime_engine, "saturates", lambda runtime, way=unsigned: way)
        outputs.append(outputs_of(bundle))
    layers = len(quantizable_layers(bundle.manifest.architecture))
    assert sum(shifted) >= layers and len(shifted) == len(bundle.manifest.graphs)
    for one, other in zip(outputs[0], outputs[-1], strict=True):
        np.testing.assert_array_equal(one, other)


def test_products_are_exact_on_this_processor(tmp_path: Path) -> None:
    """The largest numbers of an int8 layer, by the operators the engine chooses here, against
    integers of numpy."""
    rows, depth = 24, 192
    stored = np.random.default_rng(0).choice([-127, 127, 1], (rows, depth)).astype(np.int8)
    model = layer_of(stored, tmp_path)
    shift_activations(model)
    if saturates(onnxruntime):
        assert shift_weights(model) == 1
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(tmp_path)
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    given = np.random.default_rng(1).choice([-127.0, 127.0], (5, depth)).astype(np.float32)
    (made,) = session.run(None, {"x": given})
    np.testing.assert_array_equal(made, given.astype(np.int64) @ stored.T.astype(np.int64))


def test_every_byte_is_shifted_by_128(tmp_path: Path) -> None:
    """The weight as a session reads it, and its zero points, from a file of every int8 there is."""
    stored = np.arange(-128, 128, dtype=np.int8).reshape(4, 64)
    model = layer_of(stored, tmp_path)
    assert shift_weights(model) == 1
    node = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.attribute)
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(node.input[0], TensorProto.UINT8, [4, 64])
    )
    onnx.save(model, tmp_path / "shifted.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "shifted.onnx", providers=["CPUExecutionProvider"]
    )
    (shifted,) = session.run([node.input[0]], {"x": np.zeros((1, 64), np.float32)})
    np.testing.assert_array_equal(shifted, stored.astype(np.int16) + 128)
    zero_point = next(t for t in model.graph.initializer if t.name == node.input[2])
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(zero_point), np.full(4, 128, np.uint8))


def layer_of(weight: NDArray[np.int8], folder: Path) -> onnx.ModelProto:
    """One quantized layer as the exporter writes it, scales 1, its weight (rows, depth) in a file
    of its own."""
    rows, depth = weight.shape
    (folder / "weight").write_bytes(weight.tobytes())
    held = onnx.TensorProto(
        name="w",
        data_type=TensorProto.INT8,
        dims=weight.shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in (("location", "weight"), ("offset", "0"), ("length", str(weight.nbytes))):
        held.external_data.add(key=key, value=value)
    arrays = {
        "scale": np.array(1, np.float32),
        "zero": np.array(0, np.int8),
        "scales": np.ones(rows, np.float32),
        "zeros": np.zeros(rows, np.int8),
    }
    node = onnx.helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        node("DequantizeLinear", ["w", "scales", "zeros"], ["v"], axis=0),
        node("Gemm", ["d", "v"], ["y"], transB=1),
    ]
    info = onnx.helper.make_tensor_value_info
    ends = [info("x", TensorProto.FLOAT, ["n", depth])], [info("y", TensorProto.FLOAT, ["n", rows])]
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph(nodes, "layer", *ends, [held, *constants])
    opset = [onnx.helper.make_opsetid("", 20)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
