"""The TensorRT lint: a small bad model for every rule, the bundles we export, and the command.

`CASES` is the list of bad models. A test takes each rule away in turn and expects some case to go
unnoticed, so a rule without a model of its own fails here.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper

from anyflow_deploy import AnyFlowError, Bundle, load_bundle
from anyflow_deploy.bundle.manifest import GRAPHS
from anyflow_deploy.cli import lint as shown
from anyflow_deploy.cli.inspect_bundle import InspectOptions, inspect
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.engines.tensorrt.lint import lint as tensorrt_lint
from anyflow_deploy.engines.tensorrt.lint import model_rules, node_rules, qdq_rules
from anyflow_deploy.engines.tensorrt.lint.lint import Finding, lint, lint_bundle
from anyflow_deploy.engines.tensorrt.lint.operators import (
    OPERATORS,
    accepted_types,
    first_version,
    max_opset,
    version_from_text,
)
from tests.conftest import SMALL, Export

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
        tensor("w", kind, [0] * count, shape), tensor("s", T.FLOAT, [0.5] * many, scales),
        tensor("z", kind, [0] * many, scales),
    ]  # fmt: skip
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
    "too new: Attention": Case("operator", attention(), "from TensorRT 10.14", "--opset 20", (OLD,
    )),
    "too new: RMSNormalization": Case(
        "operator", one("RMSNormalization", "x w", weights=[tensor("w", T.FLOAT, [1.0] * 4, [4])],
        opset=23),
        "from TensorRT 10.15", "--opset 20", (OLD, "10.14"), (OLD, "10.14", "10.15"),
    ),
    "too new: RotaryEmbedding": Case(
        "operator", one("RotaryEmbedding", "q c c p", kinds={**HEADS, "c": (T.FLOAT, [9, 4]),
        "p": (T.INT64, [1, 9])}, opset=23),
        "from TensorRT 10.15", "--opset 20", (OLD,),
    ),
    "type": Case("type", one("Sin", kinds={"x": (T.INT64, F)}, outputs="y"),
    "'x' is INT64; allowed are FLOAT,", "cast"),
    "type: bool sum": Case("type", one("Mul", "x x", kinds={"x": (T.BOOL, F)}), "'x' is BOOL"),
    "type: FP8 constant": Case(
        "type", one("Constant", "", value=tensor("v", T.FLOAT8E4M3FN, 0.0)), "FLOAT8E4M3FN",
        "initializer", (OLD,)
    ),
    "type: quantized product": Case("type", one("Transpose", kinds={"x": (T.INT8, [2, 4])}),
    "'x' is INT8", "between Q and DQ"),
    "double": Case("tensor-type", one("Sin", kinds={"x": (T.DOUBLE, F)}), "'x' is DOUBLE",
    "cast to float32"),
    "complex": Case("tensor-type", one("Mul", "x x", kinds={"x": (T.COMPLEX128, F)}), "COMPLEX128",
    "real float32"),
    "uint16": Case("tensor-type", one("Cast", to=T.UINT16), "'y' is UINT16", "int64"),
    "opset": Case("opset", one("Sin", opset=23), "opset 23; TensorRT 10.3 reads 9 to 20",
    "--opset 20", (OLD,)),
    "opset of tomorrow": Case("opset", one("Sin", opset=25), "opset 25; TensorRT 11.4",
    "--opset 23", (NEW,), (NEW, "11.5")),
    "old opset": Case("opset", one("Sin", opset=8), "opset 8", "--opset 20"),
    "layer norm's mean": Case(
        "outputs", one("LayerNormalization", "x w", "y mean", weights=[tensor("w", T.FLOAT,
        [1.0] * 4, [4])]), "2 outputs"
    ),
    "attention: present": Case("attention", attention("q k v - pk pv", "y a b", PAST),
    "more than one", "", (NEW,), (NEW,)),
    "attention: past": Case("attention", attention("q k v - pk pv", kinds=PAST), "past_key is not",
    "", (NEW,), (NEW,)),
    "attention: key lengths": Case(
        "attention", attention("q k v - - - l", kinds={**HEADS, "l": (T.INT64, ["b"])}, opset=24),
        "nonpad_kv_seqlen",
        "", (NEW,), (NEW,),
    ),
    "attention: softcap": Case("attention", attention(softcap=5.0), "softcap", "", (NEW,), (NEW,)),
    "attention: three axes": Case(
        "attention", attention(kinds=dict(FLAT), q_num_heads=2, kv_num_heads=2), "four dimensions",
        "Reshape", ("10.15",),
        ("10.15", NEW),
    ),
    "computed axes": Case("constant", one("ReduceMean", "x a", kinds=AXES), "axes 'a' is computed",
    "initializer"),
    "reshaped axes": Case(
        "constant",
        model(
            [node("Reshape", "c m", "a"), node("ReduceMean", "x a")],
            weights=[tensor("c", T.INT64, [-1], [1]), tensor("m", T.INT64, [-1], [1])],
        ),
        "axes 'a' is computed",
    ),
    "computed slice axes": Case(
        "constant", one("Slice", "x a a a", kinds=AXES), "axes 'a'", "TensorRT 10.3", ("10.1",),
        ("10.1", OLD)
    ),
    "computed bias": Case(
        "constant",
        one("Conv", "i w b", kinds={"i": (T.FLOAT, [1, 1, 4, 4]), "b": (T.FLOAT, [1])},
            weights=[tensor("w", T.FLOAT, [1.0], [1, 1, 1, 1])]),
        "bias 'b' is computed", "", (OLD,),
    ),
    "squeeze": Case("squeeze", one("Squeeze"), "shape is not fixed", "axes", BOTH, (*BOTH, "11.5")),
    "attribute": Case(
        "attribute", one("ScatterND", "x a u", kinds={"x": (T.FLOAT, [4]), "a": (T.INT64, [1, 1]),
        "u": (T.FLOAT, [1])},
                         reduction="add"), "reduction is not supported"
    ),
    "dilations": Case(
        "attribute", one("MaxPool", "i", kinds={"i": (T.FLOAT, [1, 1, 8, 8])}, kernel_shape=[2, 2],
        dilations=[2, 1]), "dilations"
    ),
    "limit": Case("limit", one("TopK", "x big", "y i", weights=[BIG]), "K is 5000"),
    "large axes": Case("limit", one("Unsqueeze", "x a", weights=[WRONG_AXES]), "more than 32 bits"),
    "shape from values": Case("data-dependent", one("Reshape", "x a", kinds=AXES),
    "values of input 'a'", "Shape"),
    "nonzero": Case("data-dependent", one("NonZero"), "hangs on values"),
    "loop": Case("loop", collecting_loop(), "number of turns", "trip count"),
    "branch": Case("branch", branches(), r"ranks \[2\] and \[1\]"),
    "domain": Case("domain", foreign(), "'com.microsoft'"),
    "unnamed axis": Case("axis", one("Sin", kinds={"x": (T.FLOAT, [None, 4])}), "has no name"),  # type: ignore[list-item]
    "parent folder": Case("weights", outside("../weights.bin"), "leaves the bundle's folder",
    "export again"),
    "absolute": Case("weights", outside("/weights.bin"), "leaves the bundle's folder"),
    "absolute on Windows": Case("weights", outside("C:\\weights.bin"),
    "leaves the bundle's folder"),
    "nobody's weight": Case("weights", one("Add", "x w"), "'w', which nothing makes"),
    "unknown": Case("unknown", one("Add", "x w"), "cannot be inferred"),
    "zero point": Case("quantization", quantized(zero=3), "zero point 'z' is not 0",
    "symmetrically"),
    "uint8": Case("quantization", quantized(T.UINT8), "quantizes to UINT8", "INT8"),
    "E5M2": Case("quantization", quantized(T.FLOAT8E5M2, 0.0), "quantizes to FLOAT8E5M2",
    "FP8 E4M3"),
    "FP4": Case("quantization", weight(T.FLOAT4E2M1, [2, 2], [], axis=0), "quantizes to FLOAT4E2M1",
    "", (OLD,)),
    "no zero point": Case("quantization", one("QuantizeLinear", "x s", weights=[ONE]),
    "ONNX means UINT8", "zero point of 0"),
    "negative scale": Case("quantization", quantized(scale=-0.1), "not positive"),
    "scale of zero": Case("quantization", quantized(scale=0.0), "not positive", "channel of zeros"),
    "computed scale": Case(
        "quantization",
        one("QuantizeLinear", "x t z", kinds={"x": (T.FLOAT, F), "t": (T.FLOAT, [])},
        weights=[tensor("z", T.INT8, 0)]),
        "scale 't' is computed",
    ),
    "zero points": Case("quantization", quantized(zero=[0, 0]), "2 zero points and 1 scales"),
    "axis": Case("quantization", weight(T.INT8, [2, 4], [2], axis=1),
    "2 scales for 4 channels of axis 1"),
    "no such axis": Case("quantization", weight(T.INT8, [2, 4], [2], axis=2),
    "axis 2 of a tensor with 2"),
    "no axis": Case("quantization", weight(T.INT8, [4, 4], [4]), "without an axis",
    "write the axis"),
    "scale's rank": Case("quantization", weight(T.INT8, [2, 2, 2], [2, 2], axis=0),
    "2 dimensions, the data 3"),
    "channels of activations": Case("quantization", quantized(zero=[0] * 4, scale=[0.1] * 4,
    axis=1), "an activation has"),
    "odd INT4": Case("quantization", weight(T.INT4, [2, 3], [], axis=0), "odd last axis"),
}  # fmt: skip


def found(case: Case) -> list[Finding]:
    return [f for f in lint(case.model, case.asked) if f.rule == case.rule]


@pytest.mark.parametrize("name", CASES)
def test_every_rule_notices_its_model(name: str) -> None:
    case = CASES[name]
    hits = [f for f in found(case) if re.search(case.problem, f.problem)]
    assert hits, [str(f) for f in lint(case.model, case.asked)]
    assert tuple(dict.fromkeys(version for f in hits for version in f.versions)) == case.versions
    assert case.remedy in hits[0].remedy
    assert hits[0].node or case.rule == "opset"


NODE_RULES = [*node_rules.RULES, *qdq_rules.RULES]


@pytest.mark.parametrize("rule", NODE_RULES, ids=lambda rule: rule.__name__)
def test_no_rule_for_nodes_is_idle(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: lint(case.model, case.asked) for name, case in CASES.items()}
    monkeypatch.setattr(tensorrt_lint, "RULES", tuple(r for r in node_rules.RULES if r is not rule))
    rest = tuple(r for r in qdq_rules.RULES if r is not rule)
    monkeypatch.setattr(qdq_rules, "RULES", rest)
    assert any(lint(case.model, case.asked) != before[name] for name, case in CASES.items())


@pytest.mark.parametrize(
    "rule",
    [
        "opset",
        "foreign_operators",
        "missing_tensors",
        "tensor_types",
        "unknown_types",
        "dynamic_axes",
        "weights",
    ],
)
def test_no_rule_for_graphs_is_idle(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: lint(case.model, case.asked) for name, case in CASES.items()}
    monkeypatch.setattr(model_rules, rule, lambda *_: iter(()))
    assert any(lint(case.model, case.asked) != before[name] for name, case in CASES.items())


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


@pytest.mark.parametrize("name", GOOD)
def test_good_models_are_clean(name: str) -> None:
    newest = GOOD[name].opset_import[0].version
    for version in (OLD, "10.16", NEW):
        found = lint(GOOD[name], [version])
        assert [f for f in found if f.rule != "opset"] == [] or newest > max_opset(
            version_from_text(version)
        ), found


@pytest.mark.parametrize("opset", [20, 21])
@pytest.mark.parametrize("kind", [T.INT8, T.FLOAT8E4M3FN])
def test_quantized_graphs_are_clean_where_their_opset_is_read(kind: int, opset: int) -> None:
    made = quantized(kind, 0 if kind == T.INT8 else 0.0)
    made.opset_import[0].version = opset
    assert lint(made, ["10.15", NEW]) == []
    assert [f.rule for f in lint(made, [OLD])] == ([] if opset == 20 else ["opset"])


def test_a_declared_range_makes_an_axis_good() -> None:
    made = one("Sin")
    assert lint(made, axes=["n"]) == []
    assert (
        "axis 'n' of input 'x' has no declared range (known: batch)"
        in lint(made, axes=["batch"])[0].problem
    )


def test_nodes_of_subgraphs_are_looked_at() -> None:
    made = node("If", "c", then_branch=branch("a", [2]), else_branch=branch("b", [2]))
    made.attribute[0].g.node[0].op_type = "StringSplit"
    hits = lint(model([made], {"c": (T.BOOL, [])}, outputs={"y": (T.FLOAT, None)}))
    assert [f.operator for f in hits if f.rule == "operator"] == ["StringSplit"]


def test_a_local_function_is_no_foreign_operator() -> None:
    made = foreign()
    body = [helper.make_node("Identity", ["q"], ["out"])]
    imports = [helper.make_opsetid("", 20)]
    made.functions.append(
        helper.make_function(
            "com.microsoft", "MultiHeadAttention", ["q", "k", "v"], ["out"], body, imports
        )
    )
    assert not [f for f in lint(made) if f.rule == "domain"]


def test_linting_changes_nothing() -> None:
    made = quantized(T.UINT8)
    before = made.SerializeToString()
    lint(made)
    assert made.SerializeToString() == before


def test_the_table_covers_the_operators_it_should() -> None:
    assert len(OPERATORS) == 196 and sum(types is None for types in OPERATORS.values()) == 46
    assert accepted_types("Attention", version_from_text("10.13")) is None
    assert first_version("Attention") == (10, 14) and first_version("Unique") is None
    newest = {"10.3": 20, "10.14.1": 23, "10.16": 24, "11.4": 24, "11.5": 25, "12.0": 25}
    assert {text: max_opset(version_from_text(text)) for text in newest} == newest


@pytest.mark.parametrize("text", ["10", "ten", "10.3,11", "-1.2", "", "8.6", "10.0"])
def test_versions_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(AnyFlowError, match="allowed is"):
        lint(one("Sin"), [text])


EXPORTS = [("fp32", 20), ("fp16", 20), ("bf16", 20), ("fp32", 23), ("fp16", 23), ("bf16", 23)]


@pytest.mark.parametrize(("precision", "opset"), EXPORTS)
def test_what_we_export_is_clean_where_its_opset_is_read(
    small_bundle: Export, precision: str, opset: int
) -> None:
    bundle = small_bundle(precision, opset, "h100" if precision == "bf16" else "cpu")
    assert lint_bundle(bundle, ["10.15", NEW]) == []
    for_jetpack = lint_bundle(bundle, [OLD])
    assert {f.rule for f in for_jetpack} == ({"opset", "operator"} if opset == 23 else set())
    assert all("--opset 20" in f.remedy for f in for_jetpack)


@pytest.mark.parametrize(("precision", "opset"), [("fp16", 20), ("fp32", 23)])
def test_causal_exports_are_clean_too(export_once: Export, precision: str, opset: int) -> None:
    bundle = export_once(SMALL.parent / "causal", precision, opset)
    assert set(bundle.manifest.graphs) == set(GRAPHS["causal"])
    assert lint_bundle(bundle, ["10.15", NEW] if opset == 23 else [OLD, NEW]) == []


@pytest.fixture
def copied(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))


def relinted(folder: Path, change: Any) -> list[Finding]:
    """The findings of a bundle whose first initializer was changed."""
    path = folder / "transition.onnx"
    made = onnx.load(str(path), load_external_data=False)
    change(made.graph.initializer[0])
    return lint(made, [NEW], folder=folder)


def test_weights_that_are_not_where_they_should_be(copied: Path) -> None:
    def entry(stored: onnx.TensorProto, key: str) -> Any:
        return next(e for e in stored.external_data if e.key == key)

    def moved(stored: onnx.TensorProto) -> None:
        entry(stored, "offset").value = str(int(entry(stored, "offset").value) + 8)

    def beyond(stored: onnx.TensorProto) -> None:
        entry(stored, "offset").value = str(10**9)

    def elsewhere(stored: onnx.TensorProto) -> None:
        entry(stored, "location").value = "other.safetensors"

    assert relinted(copied, lambda stored: None) == []
    for change, words in (
        (moved, "holds that weight at"),
        (beyond, "which has"),
        (elsewhere, "cannot be read"),
    ):
        hits = relinted(copied, change)
        assert [f.rule for f in hits] == ["weights"] and words in hits[0].problem
    name = (
        onnx.load(str(copied / "transition.onnx"), load_external_data=False)
        .graph.initializer[0]
        .name
    )
    data = (copied / "weights.safetensors").read_bytes()
    (copied / "weights.safetensors").write_bytes(
        data.replace(f'"{name}"'.encode(), f'"{name[:-1]}?"'.encode(), 1)
    )
    assert "holds no weight of that name" in relinted(copied, lambda stored: None)[0].problem


def test_scales_are_read_from_the_weights_file(tmp_path: Path) -> None:
    made = quantized(scale=-0.5)
    onnx.save_model(
        made,
        str(tmp_path / "m.onnx"),
        save_as_external_data=True,
        location="w.bin",
        size_threshold=0,
    )
    stored = onnx.load(str(tmp_path / "m.onnx"), load_external_data=False)
    assert any("not positive" in f.problem for f in lint(stored, folder=tmp_path))


def test_the_command_says_clean_or_not(
    small_bundle: Export, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = small_bundle("fp32", 20)
    newer = small_bundle("fp32", 23)
    assert inspect(InspectOptions(bundle=clean.path, lint=True)) == 0
    assert "TensorRT 10.3, 11.4: nothing found" in capsys.readouterr().out
    assert inspect(InspectOptions(bundle=newer.path, lint=True, tensorrt=(NEW,))) == 0
    capsys.readouterr()
    assert inspect(InspectOptions(bundle=newer.path, lint=True)) == 1
    assert "--opset 20" in capsys.readouterr().out.replace("\n", " ")
    assert inspect(InspectOptions(bundle=newer.path, lint=True, json=True)) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert findings[0] == {
        "rule": "opset", "graph": "transition.onnx", "node": "", "operator": "",
        "versions": ["10.3"],
        "problem": "opset 23; TensorRT 10.3 reads 9 to 20", "remedy": "export with --opset 20",
    }  # fmt: skip
    assert all(f["node"] for f in findings[1:]) and {f["operator"] for f in findings[1:]} == {
        "Attention",
        "RMSNormalization",
    }


def test_the_flags_refuse_nonsense() -> None:
    for words, message in (
        (["b", "--tensorrt", "10.3"], "--tensorrt names the versions that --lint is for"),
        (["b", "--lint", "--tensorrt", "10.3,9.0"], "TensorRT 9.0 is older"),
        (["b", "--lint", "--tensorrt", "x"], "allowed is a number like 10.3 or 11.4"),
    ):
        with pytest.raises(AnyFlowError, match=message):
            parse_options(InspectOptions, words)
    assert parse_options(InspectOptions, ["b", "--lint", "--tensorrt", "10.3,11.4"]).tensorrt == (
        OLD,
        NEW,
    )


def test_a_damaged_graph_is_a_bundle_error(copied: Path) -> None:
    bundle = load_bundle(copied)
    (copied / "transition.onnx").write_bytes(b"not onnx")
    with pytest.raises(AnyFlowError, match="is not an ONNX file"):
        lint_bundle(bundle)


@pytest.mark.parametrize(("target", "warned"), [("orin", True), ("h100", False), ("cpu", False)])
def test_an_export_warns_about_its_target(
    small_bundle: Export, capsys: pytest.CaptureFixture[str], target: str, warned: bool
) -> None:
    bundle = small_bundle("fp32", 23)
    for_target = Bundle(
        bundle.path, bundle.manifest.model_copy(update={"target": target}), bundle.digest
    )
    shown.warn_about_tensorrt(for_target)
    assert ("warning: transition.onnx: opset 23" in capsys.readouterr().err) == warned


def test_the_document_names_every_rule() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reference" / "lint.md").read_text()
    assert not [case.rule for case in CASES.values() if f"| `{case.rule}` |" not in text]
