"""What TensorRT's ONNX parser refuses in a single node; Q/DQ have a file of their own.

A rule is a function `(view, node, version) -> problems`, and `RULES` is all of them. Each names its
source: "list" is the parser's operator list (`docs/operators.md` of onnx-tensorrt, 10.1 and 10.15),
"parser" its source code (the 10.1 release, and where said the newest public one, of 10.16), "guide"
NVIDIA's TensorRT documentation. docs/reference/lint.md has the whole table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from onnx import NodeProto

from anyflow_deploy.engines.tensorrt.lint.onnx_graph import (
    GraphView,
    attribute,
    is_standard,
    operand,
    subgraphs,
)
from anyflow_deploy.engines.tensorrt.lint.operators import (
    TENSOR_TYPES,
    Version,
    accepted_types,
    first_version,
)


class Problem(NamedTuple):
    """What one rule has against one node: a short name of the rule, what is wrong, what to do."""

    rule: str
    problem: str
    remedy: str


Rule = Callable[[GraphView, NodeProto, Version], Iterator[Problem]]

DECOMPOSED_OPERATORS = ("Attention", "RMSNormalization", "RotaryEmbedding", "Swish")
"""Operators that our exporter writes as primitive ones at opset 20."""

_LOCAL = "write it with operators that TensorRT reads"
_CAST = "cast to float32 before this node"


def unsupported_operator(view: GraphView, node: NodeProto, version: Version) -> Iterator[Problem]:
    """Source: list; later operators from the changelog and the release notes."""
    if accepted_types(node.op_type, version) is not None:
        return
    since = first_version(node.op_type)
    if since is None:
        yield Problem("operator", "no TensorRT known here reads this operator", _LOCAL)
    else:
        first = (
            "export with --opset 20, which writes it as primitive operators"
            if node.op_type in DECOMPOSED_OPERATORS
            else _LOCAL
        )
        yield Problem(
            "operator", f"read from TensorRT {since} on", f"{first}, or use TensorRT {since}"
        )


def type_of_operands(view: GraphView, node: NodeProto, version: Version) -> Iterator[Problem]:
    """Source: list, column of types. Types that no tensor may have are reported where the tensor is
    made."""
    types = accepted_types(node.op_type, version)
    if types is None or subgraphs(node):
        return
    for name in _data_operands(node):
        dtype = view.types.get(name)
        if dtype in TENSOR_TYPES and dtype not in types:
            advice = (
                "keep quantized values between Q and DQ"
                if dtype in ("INT8", "FLOAT8E4M3FN", "INT4")
                else _CAST
            )
            advice = (
                "store it as an initializer, or use TensorRT 10.15"
                if node.op_type == "Constant"
                else advice
            )
            yield Problem("type", f"{name!r} is {dtype}; allowed are {', '.join(types)}", advice)


def _data_operands(node: NodeProto) -> list[str]:
    """The tensors that the list's types are about: neither indices nor shapes nor conditions."""
    if not node.input or node.op_type == "ConstantOfShape":
        return [name for name in node.output if name]
    if node.op_type in ("Cast", "CastLike"):
        return [operand(node, 0), node.output[0]]
    if node.op_type == "Where":
        return [operand(node, 1), operand(node, 2)]
    if node.op_type == "OneHot":
        return [operand(node, 2)]
    if node.op_type in ("Concat", "Max", "Mean", "Min", "Sum"):
        return [name for name in node.input if name]
    many = {"Attention": 3, "Range": 3, "LayerNormalization": 3, "Gemm": 3, "Conv": 3}
    elementwise = (
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Equal",
        "Greater",
        "Less",
        "MatMul",
        "Mod",
        "And",
        "Or",
        "Xor",
    )
    count = many.get(node.op_type, 2 if node.op_type in elementwise else 1)
    return [name for name in node.input[:count] if name]


_FIRST_OUTPUT_ONLY = ("LayerNormalization", "BatchNormalization", "MaxPool")


def surplus_outputs(view: GraphView, node: NodeProto, version: Version) -> Iterator[Problem]:
    """Source: list (LayerNormalization, MaxPool) and parser (BatchNormalization)."""
    if node.op_type in _FIRST_OUTPUT_ONLY and any(node.output[1:]):
        yield Problem(
            "outputs",
            f"{len(node.output)} outputs; only the first is supported",
            "remove the others",
        )


def attention(view: GraphView, node: NodeProto, version: Version) -> Iterator[Problem]:
    """Source: list of 10.15; parser (10.16: three-dimensional operands, `softmax_precision`)."""
    if node.op_type != "Attention":
        return
    explicit = "concatenate past and present before the node, and attend without a cache"
    if any(node.output[1:]):
        yield Problem(
            "attention", "more than one output (present_key, present_value, scores)", explicit
        )
    for index, name in ((4, "past_key"), (5, "past_value"), (6, "nonpad_kv_seqlen")):
        if operand(node, index):
            yield Problem("attention", f"input {name} is not supported", explicit)
    for name, neutral in (
        ("softcap", 0.0),
        ("softmax_precision", None),
        ("qk_matmul_output_mode", 0),
    ):
        if attribute(node, name, neutral) != neutral:
            yield Problem(
                "attention",
                f"attribute {name} is not supported",
                "leave it out, or export with --opset 20",
            )
    ranks = {len(view.shapes[name]) for name in node.input[:3] if name in view.shapes}
    if len(ranks) > 1 or (ranks and ranks != {4} and version < Version(10, 16)):
        yield Problem(
            "attention",
            "Q, K and V have to have four dimensions",
            "split the heads with a Reshape before it",
        )


def constant_operands(view: GraphView, node: NodeProto, version: Version) -> Iterator[Problem]:
    """Source: list ("must be an initializer"); changelog 10.3 (Slice) and 10.4 (Pad); list of 10.15
    (Squeeze)."""
    index = {"CumSum": 1, "OneHot": 1, "Squeeze": 1, "Unsqueeze": 1, "Slice": 3, "Pad": 3}.get(
        node.op_type
    )
    index = 1 if node.op_type.startswith("Reduce") else index
    free = {"Slice": Version(10, 3), "Pad": Version(10, 4)}.get(node.op_type)
    if index is None or (free is not None and version >= free):
        return
    name = operand(node, index)
    role = {"OneHot": "depth", "CumSum": "axis"}.get(node.op_type, "axes")
    folds = version >= Version(10, 15) and not node.op_type.startswith("Reduce")
    if name and not view.is_constant(name, through=folds):
        advice = f"make {role} an initializer" + (f", or use TensorRT {free}" if free else "")
        yield Problem("constant", f"{role} {name!r} is computed while the graph runs", advice)


def computed_convolution(view: GraphView, node: NodeProto, version: Version) -> Iterator[Problem]:
    """Source: changelog 10.4, which mends the shape of a kernel that is not a weight (a computed
    bias leads there too)."""
    if node.op_type != "Conv" or version >= Version(10, 4):
        return
    for index, role in ((1, "kernel"), (2, "bias")):
        name = operand(node, index)
        if name and not view.is_constant(name):
            yield Problem(
                "constant",
                f"{role} {name!r} is computed while the graph runs",
                f"make the {role} an initializer",
            )


def squeeze_without_axes(view: GraphView, node: NodeProto, version: Version) -> Iterator[Problem]:
    """Source: parser 10.1; release notes of 11.5, which lifts it."""
    if (
        node.op_type != "Squeeze"
        or operand(node, 1)
        or attribute(node, "axes") is not None
        or version >= Version(11, 5)
    ):
        return
    shape = view.shapes.get(node.input[0])
    if shape is None or not all(isinstance(axis, int) for axis in shape):
        yield Problem(
            "squeeze",
            "no axes, and the input's shape is not fixed",
            "give the axes, or use TensorRT 11.5",
        )


def attributes(view: GraphView, node: NodeProto, version: Version) -> Iterator[Problem]:
    """Source: list, column of restrictions; parser for BatchNormalization."""
    allowed: dict[tuple[str, str], tuple[object, ...]] = {
        ("ScatterND", "reduction"): ("none",),
        ("TopK", "sorted"): (1,),
        ("LSTM", "input_forget"): (0,),
        ("LSTM", "layout"): (0,),
        ("BatchNormalization", "training_mode"): (0,),
        ("Resize", "mode"): ("nearest", "linear"),
        ("Resize", "antialias"): (0,),
        ("Resize", "keep_aspect_ratio_policy"): ("stretch",),
        ("TensorScatter", "axis"): (-2,),
        ("Constant", "sparse_value"): (),
        ("Constant", "value_string"): (),
        ("Constant", "value_strings"): (),
    }
    for a in node.attribute:
        choices = allowed.get((node.op_type, a.name))
        value = attribute(node, a.name)
        if choices is not None and value not in choices:
            text = " or ".join(map(str, choices)) if choices else "not to have it"
            yield Problem(
                "attribute", f"{a.name} is not supported as given; allowed is {text}", _LOCAL
            )
        if (
            a.name == "dilations"
            and node.op_type in ("AveragePool", "LpPool", "MaxPool")
            and set(value) - {1}
        ):
            yield Problem(
                "attribute", f"dilations {list(value)}; allowed is 1 on every axis", _LOCAL
            )


def size_limits(view: GraphView, node: NodeProto, version: Version) -> Iterator[Problem]:
    """Source: list (K of TopK below 3840, GridSample and TensorScatter 4-D, position_ids INT64);
    11.2 for 5-D GridSample."""
    if (
        node.op_type == "TopK"
        and (k := view.values(operand(node, 1))) is not None
        and k.size
        and int(k.max()) >= 3840
    ):
        yield Problem("limit", f"K is {int(k.max())}; allowed is less than 3840", _LOCAL)
    ranks = {
        "GridSample": (4,) if version < Version(11, 2) else (4, 5),
        "TensorScatter": (4,),
        "DepthToSpace": (4,),
    }
    shape = view.shapes.get(operand(node, 0))
    if node.op_type in ranks and shape is not None and len(shape) not in ranks[node.op_type]:
        allowed = " or ".join(map(str, ranks[node.op_type]))
        yield Problem(
            "limit",
            f"its input has {len(shape)} dimensions; allowed are {allowed}",
            "Reshape before it",
        )
    if node.op_type == "RotaryEmbedding" and view.types.get(operand(node, 3), "INT64") != "INT64":
        yield Problem(
            "limit",
            f"position_ids is {view.types[operand(node, 3)]}; allowed is INT64",
            "cast to int64",
        )


_SHAPE_OPERANDS = {
    "Reshape": (1,), "Expand": (1,), "ConstantOfShape": (0,), "Tile": (1,), "Slice": (1, 2, 4),
    "Range": (0, 1, 2),
    "Resize": (2, 3), "Pad": (1,), "Split": (1,), "TopK": (1,),
}  # fmt: skip


def shapes_from_data(view: GraphView, node: NodeProto, version: Version) -> Iterator[Problem]:
    """Source: guide, "Working with Dynamic Shapes": profiles hold shapes; a shape made of values
    needs their range too."""
    for index in _SHAPE_OPERANDS.get(node.op_type, ()):
        name = operand(node, index)
        if name and (source := view.find_data_source(name)) is not None:
            advice = "compute it from Shape, or make it constant"
            yield Problem(
                "data-dependent", f"its shape {name!r} hangs on the values of {source}", advice
            )
    if node.op_type in ("NonZero", "NonMaxSuppression"):
        yield Problem(
            "data-dependent",
            "the size of its result hangs on values, which no profile can bound",
            _LOCAL,
        )


def loops_and_branches(view: GraphView, node: NodeProto, version: Version) -> Iterator[Problem]:
    """Source: list, restrictions of Loop and If."""
    bodies = subgraphs(node)
    if node.op_type == "Loop" and bodies:
        scans = len(bodies[0].output) - 1 - max(0, len(node.input) - 2)
        if scans > 0 and not view.is_constant(operand(node, 0), through=True):
            yield Problem(
                "loop",
                "it collects outputs, and the number of turns is not constant",
                "make the trip count constant",
            )
    if node.op_type == "If" and len(bodies) == 2:
        ranks = [[len(out.type.tensor_type.shape.dim) for out in body.output] for body in bodies]
        if ranks[0] != ranks[1]:
            yield Problem(
                "branch",
                f"the branches give results of ranks {ranks[0]} and {ranks[1]}",
                "make them equal",
            )


def too_large_axes(view: GraphView, node: NodeProto, version: Version) -> Iterator[Problem]:
    """Source: parser (axes are 32-bit; other int64 constants, such as the end of a Slice, are read
    whole since 9.0)."""
    if node.op_type in ("Squeeze", "Unsqueeze") or node.op_type.startswith("Reduce"):
        axes = view.values(operand(node, 1))
        if axes is not None and axes.size and int(abs(axes).max()) >= math.pow(2, 31):
            yield Problem(
                "limit",
                f"axes reach {int(abs(axes).max())}, more than 32 bits hold",
                "give axes of the tensor",
            )


RULES: tuple[Rule, ...] = (
    unsupported_operator,
    type_of_operands,
    surplus_outputs,
    attention,
    constant_operands,
    computed_convolution,
    squeeze_without_axes,
    attributes,
    size_limits,
    shapes_from_data,
    loops_and_branches,
    too_large_axes,
)


def node_problems(
    view: GraphView, node: NodeProto, version: Version, rules: tuple[Rule, ...] = RULES
) -> Iterator[Problem]:
    """Everything against one node of ONNX's own operators."""
    if is_standard(node):
        for rule in rules:
            yield from rule(view, node, version)
