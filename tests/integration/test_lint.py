"""The TensorRT lint: a small bad model for every rule, the bundles we export, and the command.

`CASES` is the list of bad models. A test takes each rule away in turn and expects some case to go
unnoticed, so a rule without a model of its own fails here.
"""

from __future__ import annotations

import json
import re
import shutil
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
from tests.lint_cases import (
    CASES,
    GOOD,
    NEW,
    OLD,
    Case,
    branch,
    foreign,
    model,
    node,
    one,
    quantized,
)


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
