"""The parts of anyflow-debug on graphs of a few nodes: names, reference graphs, search, report."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference
from rich.console import Console

from anyflow_deploy import AnyFlowError, BackendError
from anyflow_deploy.bundle.manifest import GraphRecord, GraphTensor, Manifest
from anyflow_deploy.debugging import polygraphy_setup
from anyflow_deploy.debugging.bisection import CUTS, MeasuredPoint, bisect_points
from anyflow_deploy.debugging.divergence import Comparison, Divergence, find_divergence
from anyflow_deploy.debugging.inputs import DebugState, make_feed
from anyflow_deploy.debugging.points import (
    Point,
    find_points,
    mark_outputs,
    named_tensors,
    output_points,
    point_of_output,
)
from anyflow_deploy.debugging.polygraphy_setup import check_debug_backend, use_polygraphy
from anyflow_deploy.debugging.reference_graph import is_float32, widen_graph
from anyflow_deploy.debugging.report import (
    divergence_as_json,
    divergence_tables,
    plot_divergence,
)
from anyflow_deploy.engines.metrics import Difference, difference

use_polygraphy("onnxruntime")

CHANNELS = 4
WEIGHT = np.linspace(-1, 1, CHANNELS * CHANNELS, dtype=np.float32).reshape(CHANNELS, CHANNELS)


def graph(nodes: Sequence[NodeProto], weights: Sequence[TensorProto] = ()) -> ModelProto:
    """A model of `x` (float32) to `y`, with the types of its tensors."""
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "test",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, CHANNELS])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            list(weights),
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    return shape_inference.infer_shapes(model)


def network(kind: int, factor: float = 1.0) -> ModelProto:
    """Two blocks of a product and a residual sum; in 16 bits with casts around the products."""
    numpy_kind = helper.tensor_dtype_to_np_dtype(kind)
    nodes, stream = [], "x"
    weights = []
    for block in ("blocks.0", "blocks.1"):
        weight = WEIGHT * (factor if block == "blocks.1" else 1.0)
        weights.append(numpy_helper.from_array(weight.astype(numpy_kind), f"{block}.ffn.weight"))
        inner = stream
        if kind != TensorProto.FLOAT:
            inner = f"{block}_cast"
            nodes.append(
                helper.make_node("Cast", [stream], [inner], name=f"{block}.ffn/Cast", to=kind)
            )
        product = f"{block}_product"
        nodes.append(
            helper.make_node(
                "Gemm", [inner, weights[-1].name], [product], name=f"{block}.ffn/Gemm", transB=1
            )
        )
        if kind != TensorProto.FLOAT:
            nodes.append(
                helper.make_node("Cast", [product], [f"{product}_wide"], name=f"{block}/Cast", to=1)
            )
            product = f"{product}_wide"
        total = f"{block}_total"
        nodes.append(helper.make_node("Add", [stream, product], [total], name=f"{block}/Add"))
        stream = total
    nodes.append(helper.make_node("Neg", [stream], ["y"], name="proj_out/Neg"))
    return graph(nodes, weights)


def run(model: ModelProto, x: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": x}), strict=True))


X = np.random.default_rng(0).standard_normal((2, CHANNELS)).astype(np.float32)


# Points


def test_modules_of_two_precisions_are_matched_by_name() -> None:
    fp32, fp16 = network(TensorProto.FLOAT), network(TensorProto.FLOAT16)
    points = find_points(fp16, fp32, "layers")
    assert [(p.name, p.candidate, p.reference) for p in points] == [
        ("blocks.0.ffn", "blocks.0_product", "blocks.0_product"),
        ("blocks.0", "blocks.0_total", "blocks.0_total"),
        ("blocks.1.ffn", "blocks.1_product", "blocks.1_product"),
        ("blocks.1", "blocks.1_total", "blocks.1_total"),
        ("proj_out", "y", "y"),
    ]
    assert [p.depth for p in points] == sorted(p.depth for p in points)
    assert [p.name for p in find_points(fp16, fp32, "blocks")] == [
        "blocks.0",
        "blocks.1",
        "proj_out",
    ]
    assert not [p.name for p in find_points(fp16, fp32, "nodes") if "Cast" in p.name]
    assert [p.name for p in output_points(fp16, fp32)] == ["y"]


def test_sums_of_a_block_are_points_unless_they_are_its_result() -> None:
    nodes = [
        helper.make_node("Add", ["x", "x"], ["a"], name="blocks.3/Add"),
        helper.make_node("Relu", ["a"], ["b"], name="blocks.3.ffn/Relu"),
        helper.make_node("Add", ["a", "b"], ["c"], name="blocks.3/Add_2"),
        helper.make_node("Add", ["c", "c"], ["y"], name="Add"),
    ]
    names = named_tensors(graph(nodes), "layers")
    assert {name: tensor for name, (_, tensor) in names.items()} == {
        "blocks.3/Add": "a",
        "blocks.3.ffn": "b",
        "blocks.3": "c",
        "Add": "y",
    }


@pytest.mark.parametrize(
    ("name", "block"),
    [("blocks.3", "blocks.3"), ("blocks.31.ffn", "blocks.31"), ("blocks.3/Add_5", "blocks.3")],
)
def test_a_point_knows_its_block(name: str, block: str) -> None:
    assert Point(name, 0, "", "").block == block
    assert Point("proj_out", 0, "", "").block is None


def test_what_smoothquant_scales_is_left_out() -> None:
    names = (
        "norm2", "attn1.to_v", "attn1", "attn1.to_q", "attn2.to_v", "attn2.to_out.0", "ffn.net.2"
    )  # fmt: skip
    nodes = [
        helper.make_node("Relu", ["x"], [name], name=f"blocks.0.{name}/Relu") for name in names
    ]
    nodes += [
        helper.make_node("Add", ["x", "x"], ["shifted"], name="blocks.0/Add"),
        helper.make_node("Add", ["x", "shifted"], ["y"], name="blocks.0/Add_2"),
    ]
    model = graph(nodes)
    kept = {point.name for point in find_points(model, model, "layers", smoothed=True)}
    assert kept == {
        "blocks.0",
        "blocks.0.attn1.to_q",
        "blocks.0.attn2.to_out.0",
        "blocks.0.ffn.net.2",
    }
    assert len(find_points(model, model, "layers")) == len(names) + 2


def test_graphs_without_a_common_name_are_refused() -> None:
    other = graph([helper.make_node("Relu", ["x"], ["y"], name="head/Relu")])
    with pytest.raises(AnyFlowError, match=r"no layers in common: 'blocks.0.ffn'.*'head'"):
        find_points(network(TensorProto.FLOAT), other, "layers")


def test_marked_tensors_are_the_only_outputs_and_float32() -> None:
    model = network(TensorProto.FLOAT16)
    before = model.SerializeToString()
    marked = mark_outputs(model, {"blocks.0.ffn": "blocks.0_product", "velocity": "y"})
    assert model.SerializeToString() == before
    outputs = {point_of_output(name): array for name, array in run(marked, X).items()}
    assert set(outputs) == {"blocks.0.ffn", "velocity"}
    assert {array.dtype for array in outputs.values()} == {np.dtype(np.float32)}
    assert np.array_equal(outputs["velocity"], run(model, X)["y"])


# The reference graph


def quantized(kind: int) -> ModelProto:
    """x -> Q -> DQ -> Gemm <- DQ <- weight in int8, with scales in `kind`."""
    scale = numpy_helper.from_array(
        np.array(0.01, helper.tensor_dtype_to_np_dtype(kind)), "weight_scale"
    )
    coarse = numpy_helper.from_array(np.float32(2.0), "x_scale")
    zero = numpy_helper.from_array(np.int8(0), "zero")
    weight = numpy_helper.from_array((WEIGHT * 100).round().astype(np.int8), "weight")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "zero"], ["x_q"], name="Q"),
        helper.make_node("DequantizeLinear", ["x_q", "x_scale", "zero"], ["x_dq"], name="DQ"),
        helper.make_node("Cast", ["x_dq"], ["x_cast"], name="Cast", to=kind),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale"], ["w"], name="weight/DQ"),
        helper.make_node("Gemm", ["x_cast", "w"], ["product"], name="layer/Gemm", transB=1),
        helper.make_node("Cast", ["product"], ["y"], name="Cast_2", to=1),
    ]
    return graph(nodes, [scale, coarse, zero, weight])


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_a_reference_graph_has_the_weights_and_no_rounding(kind: int) -> None:
    model = quantized(kind)
    scale = float(np.array(0.01, helper.tensor_dtype_to_np_dtype(kind)))
    weights = (WEIGHT * 100).round() * scale
    wide = widen_graph(model)
    assert "QuantizeLinear" not in {node.op_type for node in wide.graph.node}
    assert difference(run(wide, X)["y"], X @ weights.T).relative_l2 < 1e-6
    if kind != TensorProto.BFLOAT16:  # not on a CPU
        assert difference(run(model, X)["y"], X @ weights.T).relative_l2 > 0.1


def test_a_float32_graph_stays_as_it_is() -> None:
    model = network(TensorProto.FLOAT)
    assert is_float32(model) and widen_graph(model) == model
    assert not is_float32(network(TensorProto.FLOAT16))
    assert not is_float32(quantized(TensorProto.FLOAT))


def test_constants_and_the_border_are_widened() -> None:
    half = helper.make_tensor("half", TensorProto.FLOAT16, [1], [0.5])
    nodes = [
        helper.make_node("Constant", [], ["c"], name="Constant", value=half),
        helper.make_node("Cast", ["x"], ["x16"], name="Cast", to=TensorProto.FLOAT16),
        helper.make_node("Mul", ["x16", "c"], ["z"], name="Mul"),
        helper.make_node("Cast", ["z"], ["y"], name="Cast_2", to=TensorProto.FLOAT),
    ]
    model = graph(nodes)
    model.graph.input.append(helper.make_tensor_value_info("past", TensorProto.FLOAT16, [1]))
    wide = widen_graph(model)
    kinds = {info.type.tensor_type.elem_type for info in (*wide.graph.input, *wide.graph.output)}
    assert kinds == {TensorProto.FLOAT}
    del wide.graph.input[1]
    assert np.array_equal(run(wide, X)["y"], X / 2)


# Inputs


def manifest_with(**kinds: str) -> Manifest:
    """As much of a manifest as inputs are made from."""
    inputs = [GraphTensor(name=name, dtype=kind, shape=[1]) for name, kind in kinds.items()]  # type: ignore[arg-type]
    record = GraphRecord(file="transition.onnx", opset=20, inputs=inputs, outputs=[])
    return Manifest.model_construct(kind="bidirectional", graphs={"transition": record})


def test_inputs_are_rounded_to_what_the_candidate_takes() -> None:
    state = DebugState((1, 2, 4, 4, 4), np.full((1, 3, 8), 0.1, np.float32), 500.0, 250.0)
    manifest = manifest_with(latents="float32", t="float32", r="float32", text="float16")
    feed = make_feed(manifest, "transition", state, lambda graph, feed: {})
    assert feed["t"].tolist() == [[500.0, 500.0]] and feed["r"].tolist() == [[250.0, 250.0]]
    assert {array.dtype for array in feed.values()} == {np.dtype(np.float32)}
    assert feed["text"][0, 0, 0] == np.float32(np.float16(0.1)) != np.float32(0.1)


def test_bfloat16_inputs_are_refused() -> None:
    state = DebugState((1, 2, 4, 4, 4), np.zeros((1, 3, 8), np.float32), 500.0, 250.0)
    manifest = manifest_with(latents="float32", past="bfloat16")
    with pytest.raises(BackendError, match="in bfloat16, which cannot be fed from here"):
        make_feed(manifest, "transition", state, lambda graph, feed: {})


# The search


class Side:
    """A model in ONNX Runtime that counts how often it was run, and with how many outputs."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.marked: list[int] = []
        self.description = "a side"

    def runner(self, marked: ModelProto, feed: object) -> object:
        from polygraphy.backend.onnxrt import OnnxrtRunner

        self.marked.append(len(marked.graph.output))
        return OnnxrtRunner(
            onnxruntime.InferenceSession(
                marked.SerializeToString(), providers=["CPUExecutionProvider"]
            )
        )


def compare(candidate: ModelProto, reference: ModelProto) -> Comparison:
    return Comparison(Side(candidate), Side(reference), {"x": X})


def test_polygraphy_compares_two_graphs_in_depth() -> None:
    wrong, right = network(TensorProto.FLOAT, 1.01), network(TensorProto.FLOAT)
    result = find_divergence(compare(wrong, right), "blocks", 1e-5)
    assert [item.point.name for item in result.points] == ["blocks.0", "blocks.1", "proj_out"]
    assert result.points[0].difference.relative_l2 == 0
    assert result.first_place is not None and result.first_place.point.name == "blocks.1"
    assert [item.point.name for item in result.layers] == ["blocks.1.ffn", "blocks.1"]
    assert result.first is not None and result.first.point.name == "blocks.1.ffn"
    assert result.first.difference.relative_l2 == pytest.approx(0.01, rel=1e-3)
    assert result.rounds == 3
    assert find_divergence(compare(right, right), "blocks", 1e-5).first is None


def deep(count: int, wrong: int | None) -> ModelProto:
    """A chain of sums, each a block; from number `wrong` on a little too large."""
    nodes, stream = [], "x"
    steps = []
    for number in range(count):
        value = 1.0 if number != wrong else 1.5
        steps.append(numpy_helper.from_array(np.float32(value), f"step.{number}"))
        name = f"blocks.{number}_total"
        nodes.append(
            helper.make_node("Add", [stream, steps[-1].name], [name], name=f"blocks.{number}/Add")
        )
        stream = name
    nodes.append(helper.make_node("Identity", [stream], ["y"], name="Identity"))
    return graph(nodes, steps)


@pytest.mark.parametrize("wrong", [0, 1, 6, 7, 8, 49, 99, None])
def test_bisection_finds_the_same_layer_with_few_tensors_at_a_time(wrong: int | None) -> None:
    comparison = compare(deep(100, wrong), deep(100, None))
    result = find_divergence(comparison, "layers", 1e-6, bisect=True)
    side = comparison.candidate
    assert isinstance(side, Side)
    if wrong is None:
        assert result.first is None and len(side.marked) == 2
        return
    assert result.first is not None and result.first.point.name == f"blocks.{wrong}"
    assert max(side.marked) <= CUTS
    assert len(side.marked) <= 1 + math.ceil(math.log(100, CUTS + 1)) + 1
    assert [item.point.depth for item in result.points] == sorted(
        item.point.depth for item in result.points
    )


def branches(layers: int, side: int) -> tuple[ModelProto, list[Point]]:
    """A row of sums, each of which also takes something made of the input alone in `side` nodes."""
    nodes, points, stream = [], [], "x"
    for number in range(layers):
        value = "x"
        for step in range(side):
            name = f"side.{number}.{step}"
            nodes.append(helper.make_node("Neg", [value], [name], name=name))
            value = name
        nodes.append(helper.make_node("Add", [stream, value], [f"row.{number}"], name="row"))
        stream = f"row.{number}"
    nodes.append(helper.make_node("Identity", [stream], ["y"], name="y"))
    model = graph(nodes)
    for depth, node in enumerate(model.graph.node):
        points.append(Point(node.output[0], depth, node.output[0], node.output[0]))
    return model, points


def depends_on(model: ModelProto, source: str) -> set[str]:
    """Everything that is wrong when one tensor is."""
    wrong = {source}
    for node in model.graph.node:
        if wrong.intersection(node.input):
            wrong.update(node.output)
    return wrong


@pytest.mark.parametrize(
    "wrong", ["row.0", "row.7", "row.29", "side.0.0", "side.13.1", "side.29.3"]
)
def test_bisection_is_not_misled_by_side_branches(wrong: str) -> None:
    """Whatever the fault: only it and what depends on it differs, other branches stay equal."""
    model, points = branches(30, 4)
    over = depends_on(model, wrong)
    rounds = []

    def measure(some: Sequence[Point]) -> dict[str, Difference]:
        rounds.append(len(some))
        return {p.name: Difference(float(p.name in over), 1, 1, 1, 0) for p in some}

    found = bisect_points(model, points, measure, 0.5, measured("y", 1.0, 999))
    assert next(item.point.name for item in found if item.is_over(0.5)) == wrong
    assert max(rounds) <= CUTS and len(rounds) <= 8


def test_a_graph_that_a_runtime_refuses_is_an_error_with_its_words() -> None:
    broken = network(TensorProto.FLOAT)
    broken.graph.node[0].input[1] = "nowhere"
    with pytest.raises(BackendError, match="a side could not run the graph with 1 tensors.*nowher"):
        find_divergence(compare(broken, network(TensorProto.FLOAT)), "blocks", 1.0)


def test_other_shapes_are_another_model() -> None:
    wider = network(TensorProto.FLOAT)
    nodes = [helper.make_node("Concat", ["x", "x"], ["y"], name="proj_out/Neg", axis=0)]
    with pytest.raises(AnyFlowError, match=r"y is \(4, 4\) in the candidate and \(2, 4\)"):
        find_divergence(compare(graph(nodes), wider), "blocks", 1.0)


# What is shown


def measured(name: str, error: float, depth: int = 0, not_finite: int = 0) -> MeasuredPoint:
    found = Difference(error, 1.0, 60.0, error, not_finite)
    return MeasuredPoint(Point(name, depth, name, name), found)


def shown(result: Divergence) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        for table in divergence_tables(result):
            console.print(table)
    return capture.get()


def test_an_output_that_is_over_alone_is_named() -> None:
    points = (measured("blocks.0", 1e-6, 1), measured("proj_out", 1e-6, 2))
    result = Divergence("a", "b", "blocks", 1e-3, (measured("velocity", 0.1, 3),), points)
    assert result.first is not None and result.first.point.name == "velocity"
    assert divergence_as_json(result)["first_over"] == "velocity"


def test_what_is_not_finite_is_over_and_null_in_json(tmp_path: Path) -> None:
    points = (
        measured("blocks.0", 0.0, 1),
        measured("blocks.1", math.inf, 2, not_finite=3),
        measured("proj_out", math.inf, 3, not_finite=9),
    )
    result = Divergence("a", "b", "layers", 1e-3, (measured("velocity", math.inf, 4, 9),), points)
    content = json.loads(json.dumps(divergence_as_json(result), allow_nan=False))
    assert content["first_over"] == "blocks.1" and not content["passed"]
    assert content["points"][1]["difference"]["relative_l2"] is None
    assert "not finite" in shown(result) and "equal" in shown(result)
    plot_divergence(result, tmp_path / "debug.png")
    assert (tmp_path / "debug.png").read_bytes().startswith(b"\x89PNG")


def test_a_nan_of_the_reference_is_over_as_well() -> None:
    assert measured("blocks.0", math.nan).is_over(1e-3)


def test_a_long_table_shows_blocks_and_what_is_near_the_first(tmp_path: Path) -> None:
    names = [f"blocks.{block}{layer}" for block in range(30) for layer in (".a", ".b", ".c", "")]
    points = tuple(measured(name, 1e-4 if n < 50 else 1.0, n) for n, name in enumerate(names))
    result = Divergence("a", "b", "layers", 1e-2, (measured("velocity", 1.0, 999),), points)
    assert result.first is not None and result.first.point.name == names[50]
    text = shown(result)
    assert all(f" blocks.{block} " in text for block in range(30))
    assert names[50] in text and names[49] in text and names[0] not in text
    assert "of 120; the JSON file has all" in " ".join(text.split())
    plot_divergence(result, tmp_path / "debug.png")
    assert (tmp_path / "debug.png").stat().st_size > 10_000


def test_two_zeros_do_not_differ() -> None:
    zeros = np.zeros(3, np.float32)
    assert difference(zeros, zeros).relative_l2 == 0
    assert difference(zeros + 1, zeros).relative_l2 == math.inf


# Polygraphy


def test_only_backends_with_an_onnx_graph_are_taken() -> None:
    check_debug_backend("onnxruntime", None)
    with pytest.raises(AnyFlowError, match="allowed are those that run an ONNX graph"):
        check_debug_backend("aotinductor", None)
    with pytest.raises(BackendError, match="leave --provider cpu out"):
        check_debug_backend("tensorrt", "cpu")


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_tensorrt_without_a_gpu_is_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polygraphy_setup, "has_gpu", lambda: False)
    with pytest.raises(BackendError, match="runs its layers on a GPU, and this machine has none"):
        check_debug_backend(backend, None)
    monkeypatch.setattr(polygraphy_setup, "has_gpu", lambda: True)
    check_debug_backend(backend, None)


def test_a_process_uses_one_of_the_two_libraries() -> None:
    with pytest.raises(BackendError, match="POLYGRAPHY_USE_TENSORRT_RTX=0, and tensorrt-rtx nee"):
        use_polygraphy("tensorrt-rtx")
    code = """
from anyflow_deploy.debugging.polygraphy_setup import use_polygraphy
use_polygraphy("tensorrt-rtx")
from polygraphy.mod.trt_importer import tensorrt_module_and_version_string
print(tensorrt_module_and_version_string())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("tensorrt_rtx")


def test_polygraphy_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    with pytest.raises(BackendError, match=r"pip install 'anyflow-deploy\[debug\]'"):
        use_polygraphy("onnxruntime")
