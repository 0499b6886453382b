"""Small ONNX models for the lint: `CASES` has a bad one for every rule, `GOOD` has good ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import TensorProto as T
from onnx import helper

F = ["n", 4]
OLD, NEW = "10.3", "11.4"
BOTH = (OLD, NEW)
Kinds = dict[str, tuple[int, Sequence[int | str] | None]]


def tensor(name: str, kind: int, values: Any, shape: Sequence[int] = ()) -> onnx.TensorProto:
    return helper.make_tensor(
        name, kind, list(shape), values if isinstance(values, list) else [values]
    )


def model(
    nodes: list[onnx.NodeProto],
    inputs: Kinds | None = None,
    weights: Sequence[onnx.TensorProto] = (),
    opset: int = 20,
    outputs: Kinds | None = None,
) -> onnx.ModelProto:
    """A model from nodes; x is float (n, 4) where nothing else is said, and y the last node's
    result."""
    ins = inputs or {"x": (T.FLOAT, F)}
    outs = outputs or {nodes[-1].output[0]: (0, None)}
    values = [
        [helper.make_tensor_value_info(n, k, s) for n, (k, s) in side.items()]
        for side in (ins, outs)
    ]
    graph = helper.make_graph(nodes, "g", values[0], values[1], list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def node(op: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    """`inputs` and `outputs` are names with blanks between; `-` leaves one out."""
    names = [["" if n == "-" else n for n in side.split()] for side in (inputs, outputs)]
    return helper.make_node(op, *names, name=f"the/{op}", **attributes)


def one(
    op: str, inputs: str = "x", outputs: str = "y", kinds: Kinds | None = None, **rest: Any
) -> onnx.ModelProto:
    """A model of one node."""
    weights = rest.pop("weights", ())
    opset = rest.pop("opset", 20)
    return model([node(op, inputs, outputs, **rest)], kinds, weights, opset)


HEADS = {name: (T.FLOAT, ["b", 2, "n", 8]) for name in ("q", "k", "v")}
ONE = tensor("s", T.FLOAT, 0.1)


def attention(
    inputs: str = "q k v", outputs: str = "y", kinds: Kinds | None = None, **rest: Any
) -> onnx.ModelProto:
    return one(
        "Attention", inputs, outputs, kinds or dict(HEADS), opset=rest.pop("opset", 23), **rest
    )


def quantized(
    kind: int = T.INT8, zero: Any = 0, *, scale: Any = 0.1, **rest: Any
) -> onnx.ModelProto:
    """x through Q and DQ."""
    size = [len(scale)] if isinstance(scale, list) else []
    weights = [
        tensor("s", T.FLOAT, scale, size),
        tensor("z", kind, zero, [len(zero)] if isinstance(zero, list) else []),
    ]
    nodes = [
        node("QuantizeLinear", "x s z", "q", **rest),
        node("DequantizeLinear", "q s z", **rest),
    ]
    return model(nodes, {"x": (T.FLOAT, [3, 4])}, weights, 21)


def weight(kind: int, shape: Sequence[int], scales: Sequence[int], **rest: Any) -> onnx.ModelProto:
    """A quantized weight and its DequantizeLinear."""
    count, many = 1, 1
    for length in shape:
        count *= length
    for length in scales:
        many *= length
    weights = [
        tensor("w", kind, [0] * count, shape),
        tensor("s", T.FLOAT, [0.5] * many, scales),
        tensor("z", kind, [0] * many, scales),
    ]
    return model([node("DequantizeLinear", "w s z", **rest)], weights=weights, opset=21)


def branch(name: str, shape: Sequence[int]) -> onnx.GraphProto:
    made = node("Constant", "", name, value=tensor(name, T.FLOAT, [0.0, 0.0], shape))
    return helper.make_graph(
        [made], name, [], [helper.make_tensor_value_info(name, T.FLOAT, shape)]
    )


def collecting_loop() -> onnx.ModelProto:
    turn = helper.make_tensor_value_info("i", T.INT64, [])
    go = helper.make_tensor_value_info("go", T.BOOL, [])
    nodes = [node("Identity", "go", "on"), node("Cast", "i", "item", to=T.FLOAT)]
    outs = [
        helper.make_tensor_value_info("on", T.BOOL, []),
        helper.make_tensor_value_info("item", T.FLOAT, []),
    ]
    body = helper.make_graph(nodes, "body", [turn, go], outs)
    return model(
        [node("Loop", "count yes", body=body)], {"count": (T.INT64, []), "yes": (T.BOOL, [])}
    )


def foreign() -> onnx.ModelProto:
    made = model(
        [node("MultiHeadAttention", "x x x", domain="com.microsoft")], outputs={"y": (T.FLOAT, F)}
    )
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return made


def outside(location: str) -> onnx.ModelProto:
    made = model([node("Add", "x w")], weights=[tensor("w", T.FLOAT, [0.0] * 4, [4])])
    stored = made.graph.initializer[0]
    stored.data_location = T.EXTERNAL
    stored.ClearField("float_data")
    stored.external_data.add(key="location", value=location)
    return made


def branches() -> onnx.ModelProto:
    made = node("If", "c", then_branch=branch("a", [2]), else_branch=branch("b", [2, 1]))
    return model([made], {"c": (T.BOOL, [])}, outputs={"y": (T.FLOAT, None)})


AXES = {"x": (T.FLOAT, F), "a": (T.INT64, [1])}
BIG = tensor("big", T.INT64, [5000], [1])
WRONG_AXES = tensor("a", T.INT64, [2**40], [1])
PAST = {**HEADS, "pk": (T.FLOAT, ["b", 2, "m", 8]), "pv": (T.FLOAT, ["b", 2, "m", 8])}
FLAT = {name: (T.FLOAT, ["b", "n", 16]) for name in ("q", "k", "v")}


@dataclass(frozen=True)
class Case:
    """A bad model, the rule that has to notice, words of the finding, and in which versions."""

    rule: str
    model: onnx.ModelProto
    problem: str
    remedy: str = ""
    versions: tuple[str, ...] = BOTH
    asked: tuple[str, ...] = field(default=BOTH)


CASES = {
    "unsupported": Case("operator", one("Unique"), "no TensorRT known here reads"),
    "too new: Attention": Case(
        "operator", attention(), "from TensorRT 10.14", "--opset 20", (OLD,)
    ),
    "too new: RMSNormalization": Case(
        "operator",
        one("RMSNormalization", "x w", weights=[tensor("w", T.FLOAT, [1.0] * 4, [4])], opset=23),
        "from TensorRT 10.15",
        "--opset 20",
        (OLD, "10.14"),
        (OLD, "10.14", "10.15"),
    ),
    "too new: RotaryEmbedding": Case(
        "operator",
        one(
            "RotaryEmbedding",
            "q c c p",
            kinds={**HEADS, "c": (T.FLOAT, [9, 4]), "p": (T.INT64, [1, 9])},
            opset=23,
        ),
        "from TensorRT 10.15",
        "--opset 20",
        (OLD,),
    ),
    "type": Case(
        "type",
        one("Sin", kinds={"x": (T.INT64, F)}, outputs="y"),
        "'x' is INT64; allowed are FLOAT,",
        "cast",
    ),
    "type: bool sum": Case("type", one("Mul", "x x", kinds={"x": (T.BOOL, F)}), "'x' is BOOL"),
    "type: FP8 constant": Case(
        "type",
        one("Constant", "", value=tensor("v", T.FLOAT8E4M3FN, 0.0)),
        "FLOAT8E4M3FN",
        "initializer",
        (OLD,),
    ),
    "type: quantized product": Case(
        "type", one("Transpose", kinds={"x": (T.INT8, [2, 4])}), "'x' is INT8", "between Q and DQ"
    ),
    "double": Case(
        "tensor-type", one("Sin", kinds={"x": (T.DOUBLE, F)}), "'x' is DOUBLE", "cast to float32"
    ),
    "complex": Case(
        "tensor-type",
        one("Mul", "x x", kinds={"x": (T.COMPLEX128, F)}),
        "COMPLEX128",
        "real float32",
    ),
    "uint16": Case("tensor-type", one("Cast", to=T.UINT16), "'y' is UINT16", "int64"),
    "opset": Case(
        "opset", one("Sin", opset=23), "opset 23; TensorRT 10.3 reads 9 to 20", "--opset 20", (OLD,)
    ),
    "opset of tomorrow": Case(
        "opset",
        one("Sin", opset=25),
        "opset 25; TensorRT 11.4",
        "--opset 23",
        (NEW,),
        (NEW, "11.5"),
    ),
    "old opset": Case("opset", one("Sin", opset=8), "opset 8", "--opset 20"),
    "layer norm's mean": Case(
        "outputs",
        one("LayerNormalization", "x w", "y mean", weights=[tensor("w", T.FLOAT, [1.0] * 4, [4])]),
        "2 outputs",
    ),
    "attention: present": Case(
        "attention", attention("q k v - pk pv", "y a b", PAST), "more than one", "", (NEW,), (NEW,)
    ),
    "attention: past": Case(
        "attention", attention("q k v - pk pv", kinds=PAST), "past_key is not", "", (NEW,), (NEW,)
    ),
    "attention: key lengths": Case(
        "attention",
        attention("q k v - - - l", kinds={**HEADS, "l": (T.INT64, ["b"])}, opset=24),
        "nonpad_kv_seqlen",
        "",
        (NEW,),
        (NEW,),
    ),
    "attention: softcap": Case("attention", attention(softcap=5.0), "softcap", "", (NEW,), (NEW,)),
    "attention: three axes": Case(
        "attention",
        attention(kinds=dict(FLAT), q_num_heads=2, kv_num_heads=2),
        "four dimensions",
        "Reshape",
        ("10.15",),
        ("10.15", NEW),
    ),
    "computed axes": Case(
        "constant", one("ReduceMean", "x a", kinds=AXES), "axes 'a' is computed", "initializer"
    ),
    "reshaped axes": Case(
        "constant",
        model(
            [node("Reshape", "c m", "a"), node("ReduceMean", "x a")],
            weights=[tensor("c", T.INT64, [-1], [1]), tensor("m", T.INT64, [-1], [1])],
        ),
        "axes 'a' is computed",
    ),
    "computed slice axes": Case(
        "constant",
        one("Slice", "x a a a", kinds=AXES),
        "axes 'a'",
        "TensorRT 10.3",
        ("10.1",),
        ("10.1", OLD),
    ),
    "computed bias": Case(
        "constant",
        one(
            "Conv",
            "i w b",
            kinds={"i": (T.FLOAT, [1, 1, 4, 4]), "b": (T.FLOAT, [1])},
            weights=[tensor("w", T.FLOAT, [1.0], [1, 1, 1, 1])],
        ),
        "bias 'b' is computed",
        "",
        (OLD,),
    ),
    "squeeze": Case("squeeze", one("Squeeze"), "shape is not fixed", "axes", BOTH, (*BOTH, "11.5")),
    "attribute": Case(
        "attribute",
        one(
            "ScatterND",
            "x a u",
            kinds={"x": (T.FLOAT, [4]), "a": (T.INT64, [1, 1]), "u": (T.FLOAT, [1])},
            reduction="add",
        ),
        "reduction is not supported",
    ),
    "dilations": Case(
        "attribute",
        one(
            "MaxPool",
            "i",
            kinds={"i": (T.FLOAT, [1, 1, 8, 8])},
            kernel_shape=[2, 2],
            dilations=[2, 1],
        ),
        "dilations",
    ),
    "limit": Case("limit", one("TopK", "x big", "y i", weights=[BIG]), "K is 5000"),
    "large axes": Case("limit", one("Unsqueeze", "x a", weights=[WRONG_AXES]), "more than 32 bits"),
    "shape from values": Case(
        "data-dependent", one("Reshape", "x a", kinds=AXES), "values of input 'a'", "Shape"
    ),
    "nonzero": Case("data-dependent", one("NonZero"), "hangs on values"),
    "loop": Case("loop", collecting_loop(), "number of turns", "trip count"),
    "branch": Case("branch", branches(), r"ranks \[2\] and \[1\]"),
    "domain": Case("domain", foreign(), "'com.microsoft'"),
    "unnamed axis": Case("axis", one("Sin", kinds={"x": (T.FLOAT, [None, 4])}), "has no name"),  # type: ignore[list-item]
    "parent folder": Case(
        "weights", outside("../weights.bin"), "leaves the bundle's folder", "export again"
    ),
    "absolute": Case("weights", outside("/weights.bin"), "leaves the bundle's folder"),
    "absolute on Windows": Case(
        "weights", outside("C:\\weights.bin"), "leaves the bundle's folder"
    ),
    "nobody's weight": Case("weights", one("Add", "x w"), "'w', which nothing makes"),
    "unknown": Case("unknown", one("Add", "x w"), "cannot be inferred"),
    "zero point": Case(
        "quantization", quantized(zero=3), "zero point 'z' is not 0", "symmetrically"
    ),
    "uint8": Case("quantization", quantized(T.UINT8), "quantizes to UINT8", "INT8"),
    "E5M2": Case(
        "quantization", quantized(T.FLOAT8E5M2, 0.0), "quantizes to FLOAT8E5M2", "FP8 E4M3"
    ),
    "FP4": Case(
        "quantization",
        weight(T.FLOAT4E2M1, [2, 2], [], axis=0),
        "quantizes to FLOAT4E2M1",
        "",
        (OLD,),
    ),
    "no zero point": Case(
        "quantization",
        one("QuantizeLinear", "x s", weights=[ONE]),
        "ONNX means UINT8",
        "zero point of 0",
    ),
    "negative scale": Case("quantization", quantized(scale=-0.1), "not positive"),
    "scale of zero": Case("quantization", quantized(scale=0.0), "not positive", "channel of zeros"),
    "computed scale": Case(
        "quantization",
        one(
            "QuantizeLinear",
            "x t z",
            kinds={"x": (T.FLOAT, F), "t": (T.FLOAT, [])},
            weights=[tensor("z", T.INT8, 0)],
        ),
        "scale 't' is computed",
    ),
    "zero points": Case("quantization", quantized(zero=[0, 0]), "2 zero points and 1 scales"),
    "axis": Case(
        "quantization", weight(T.INT8, [2, 4], [2], axis=1), "2 scales for 4 channels of axis 1"
    ),
    "no such axis": Case(
        "quantization", weight(T.INT8, [2, 4], [2], axis=2), "axis 2 of a tensor with 2"
    ),
    "no axis": Case(
        "quantization", weight(T.INT8, [4, 4], [4]), "without an axis", "write the axis"
    ),
    "scale's rank": Case(
        "quantization", weight(T.INT8, [2, 2, 2], [2, 2], axis=0), "2 dimensions, the data 3"
    ),
    "channels of activations": Case(
        "quantization", quantized(zero=[0] * 4, scale=[0.1] * 4, axis=1), "an activation has"
    ),
    "odd INT4": Case("quantization", weight(T.INT4, [2, 3], [], axis=0), "odd last axis"),
}


GOOD = {
    "INT8": quantized(),
    "INT8 weight by channel": weight(T.INT8, [2, 4], [2], axis=0),
    "negative axis": weight(T.INT8, [2, 4], [4], axis=-1),
    "FP8": quantized(T.FLOAT8E4M3FN, 0.0),
    "INT4 in blocks": weight(T.INT4, [4, 4], [2, 4], axis=0, block_size=2),
    "end of a slice": one(
        "Slice",
        "x a b a",
        weights=[tensor("a", T.INT64, [0], [1]), tensor("b", T.INT64, [2**63 - 1], [1])],
    ),
    "squeeze of a fixed shape": one("Squeeze", kinds={"x": (T.FLOAT, [1, 4])}),
    "attention": attention(),
}
