"""Would TensorRT's ONNX parser take this graph? Asked before shipping, without TensorRT and without
a GPU.

    for finding in lint(onnx.load("transition.onnx"), ["10.3", "11.4"]): print(finding)
    lint_bundle(load_bundle("bundle"), ["10.3"])

A bundle is made on one machine and its engine is built on another, often one in a car or a robot:
that is a late place to learn that an operator is too new. Every node is held against rules taken
from the parser's published operator list and source code; docs/reference/lint.md lists them, each
with its source. It needs onnx alone. What it cannot see: whether the builder finds a kernel and
what that costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.tensorrt.lint import model_rules
from anyflow_deploy.engines.tensorrt.lint import qdq_rules as quantization
from anyflow_deploy.engines.tensorrt.lint.model_rules import LocatedProblem
from anyflow_deploy.engines.tensorrt.lint.node_rules import RULES, node_problems
from anyflow_deploy.engines.tensorrt.lint.onnx_graph import GraphView, graph_views
from anyflow_deploy.engines.tensorrt.lint.operators import (
    CURRENT,
    JETPACK_6,
    Version,
    version_from_text,
)
from anyflow_deploy.errors import BundleError

DEFAULT_VERSIONS = (str(JETPACK_6), str(CURRENT))

CACHE_AXES = ("past",)
"""Axes that need no declared range: the cache's length follows from the chunk plan
(engines/kv_cache.py)."""


@dataclass(frozen=True)
class Finding:
    """One thing that TensorRT refuses, or reads otherwise than ONNX means it.

    Attributes:
        rule: which rule, as docs/reference/lint.md calls it.
        graph: file or name of the graph.
        node: name of the node, or of the tensor; empty where the whole graph is meant.
        operator: the node's operator; empty where no node is meant.
        problem: what is wrong.
        remedy: what to do.
        versions: the TensorRT versions this is about.
    """

    rule: str
    graph: str
    node: str
    operator: str
    problem: str
    remedy: str
    versions: tuple[str, ...]

    def __str__(self) -> str:
        place = " ".join(
            part for part in (self.graph, self.node, self.operator and f"({self.operator})") if part
        )
        return f"{place}: {self.problem} [TensorRT {', '.join(self.versions)}]. {self.remedy}."

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def lint(
    model: ModelProto,
    versions: Sequence[str] = DEFAULT_VERSIONS,
    *,
    graph: str = "",
    folder: Path | None = None,
    axes: Iterable[str] | None = None,
) -> list[Finding]:
    """Everything in a model that a TensorRT version would refuse.

    Args:
        model: loaded, with or without its external data; it is not changed.
        versions: as "10.3".
        graph: what findings call it.
        folder: where its external data lies; without, weights in files are not looked at.
        axes: names of dynamic axes that have a declared range; None leaves that unchecked.

    Raises:
        AnyFlowError: a version that is no number, or older than the table.
    """
    parsed_versions = [version_from_text(text) for text in dict.fromkeys(versions)]
    inferred = _infer_types(model)
    declared = None if axes is None else frozenset(axes)
    findings: dict[tuple[Any, ...], list[str]] = {}
    all_views = list(graph_views(inferred, folder))
    common = [item for view in all_views for item in _common_problems(inferred, view, declared)]
    for version in parsed_versions:
        for name, operator, problem in [*_version_problems(inferred, all_views, version), *common]:
            names = findings.setdefault((name, operator, problem), [])
            if str(version) not in names:
                names.append(str(version))
    return [
        Finding(p.rule, graph, node, op, p.problem, p.remedy, tuple(v))
        for (node, op, p), v in findings.items()
    ]


def _infer_types(model: ModelProto) -> ModelProto:
    """The model with the type of every tensor written down, as far as ONNX can tell."""
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        # A graph this broken has findings of its own; the rule for unknown types says what was
        # not seen.
        return model


def _version_problems(
    model: ModelProto, all_views: list[GraphView], version: Version
) -> Iterator[LocatedProblem]:
    yield from model_rules.opset(model, version)
    for view in all_views:
        for node in view.nodes:
            rules = RULES + quantization.RULES if node.op_type in quantization.QUANTIZERS else RULES
            for problem in node_problems(view, node, version, rules):
                yield LocatedProblem(node.name or ", ".join(node.output), node.op_type, problem)


def _common_problems(
    model: ModelProto, view: GraphView, declared: frozenset[str] | None
) -> Iterator[LocatedProblem]:
    yield from model_rules.foreign_operators(model, view)
    yield from model_rules.missing_tensors(view)
    yield from model_rules.tensor_types(view)
    yield from model_rules.unknown_types(view)
    yield from model_rules.dynamic_axes(view, declared)
    yield from model_rules.weights(view)


def lint_bundle(bundle: Bundle, versions: Sequence[str] = DEFAULT_VERSIONS) -> list[Finding]:
    """The same for every graph of a bundle, with its weights and declared ranges.

    Raises:
        BundleError: a graph that is not ONNX.
    """
    manifest = bundle.manifest
    findings: list[Finding] = []
    for record in manifest.graphs.values():
        path = bundle.file(record.file)
        try:
            model = onnx.load(str(path), load_external_data=False)
        except Exception as error:  # noqa: BLE001 - protobuf's errors have no common name across its versions
            raise BundleError(f"{path} is not an ONNX file ({error}). Export again.") from None
        findings += lint(
            model,
            versions,
            graph=record.file,
            folder=bundle.path,
            axes=(*manifest.ranges, *CACHE_AXES),
        )
    return findings
