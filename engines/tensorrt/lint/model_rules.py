"""What TensorRT's ONNX parser refuses in a whole graph: its opset, foreign operators, weights,
types and axes.

Same form as the rules for nodes, but each looks at the model or at one graph of it, and says itself
which tensor or node it means. Sources are named as there.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from onnx import ModelProto, TensorProto

from anyflow_deploy.engines.tensorrt.lint.node_rules import Problem
from anyflow_deploy.engines.tensorrt.lint.onnx_graph import GraphView, is_standard
from anyflow_deploy.engines.tensorrt.lint.operators import (
    MIN_OPSET,
    TENSOR_TYPES,
    Version,
    max_opset,
)

_EXPORTED = (20, 23)
"""Opsets that our exporter writes."""


class LocatedProblem(NamedTuple):
    """A problem and what has it: a node's or tensor's name, and a node's operator."""

    name: str
    operator: str
    problem: Problem


def opset(model: ModelProto, version: Version) -> Iterator[LocatedProblem]:
    """Source: first line of the operator list (10.1: 9 to 20; 10.15: to 24); release notes of 11.5
    (25)."""
    newest = max_opset(version)
    for entry in model.opset_import:
        if entry.domain not in ("", "ai.onnx"):
            continue
        found = f"opset {entry.version}; TensorRT {version} reads {MIN_OPSET} to {newest}"
        if entry.version > newest:
            choice = max(number for number in _EXPORTED if number <= newest)
            yield LocatedProblem("", "", Problem("opset", found, f"export with --opset {choice}"))
        elif entry.version < MIN_OPSET:
            yield LocatedProblem("", "", Problem("opset", found, "export with --opset 20"))


def foreign_operators(model: ModelProto, view: GraphView) -> Iterator[LocatedProblem]:
    """Source: guide, "Extending TensorRT with Custom Layers"; local functions are read since 9.0
    (changelog)."""
    local = {(function.domain, function.name) for function in model.functions}
    for node in view.nodes:
        if not is_standard(node) and (node.domain, node.op_type) not in local:
            problem = (
                f"from domain {node.domain!r}, which TensorRT reads only where a plugin of that"
                " name is loaded"
            )
            yield LocatedProblem(
                node.name,
                node.op_type,
                Problem("domain", problem, "write it with ONNX's own operators"),
            )


def missing_tensors(view: GraphView) -> Iterator[LocatedProblem]:
    """Source: ONNX's specification: what a node reads has to be an input, a weight or another
    node's result."""
    known = set(view.types) | set(view.producers) | set(view.tensors)
    for node in view.nodes:
        for name in node.input:
            if name and name not in known:
                problem = Problem(
                    "weights", f"it reads {name!r}, which nothing makes", "export again"
                )
                yield LocatedProblem(node.name, node.op_type, problem)


def tensor_types(view: GraphView) -> Iterator[LocatedProblem]:
    """Source: list, types of tensors (double is read as float32, with its range cut; complex and
    strings are not)."""
    used = {name for node in view.nodes for name in (*node.input, *node.output)} | {
        v.name for v in view.graph.input
    }
    for name in sorted(used):
        found = view.types.get(name)
        if not found or found in TENSOR_TYPES:
            continue
        remedy = (
            "cast to float32"
            if found == "DOUBLE"
            else "cast to int64"
            if "INT" in found
            else "do without that type"
        )
        remedy = (
            "use real float32 tables instead of complex numbers"
            if found.startswith("COMPLEX")
            else remedy
        )
        maker = view.producers.get(name)
        place = maker.name if maker is not None and maker.name else name
        operator = maker.op_type if maker is not None else ""
        yield LocatedProblem(
            place,
            operator,
            Problem("tensor-type", f"{name!r} is {found}, which TensorRT lacks", remedy),
        )


def unknown_types(view: GraphView) -> Iterator[LocatedProblem]:
    """Our own: what cannot be seen cannot be checked, and says so. Once a graph."""
    for node in view.nodes:
        for name in (*node.input, *node.output):
            if name and name not in view.types and is_standard(node):
                problem = f"the type of {name!r} cannot be inferred, so its types were not checked"
                yield LocatedProblem(
                    node.name,
                    node.op_type,
                    Problem("unknown", problem, "mend the findings above, and lint again"),
                )
                return


def dynamic_axes(view: GraphView, declared: frozenset[str] | None) -> Iterator[LocatedProblem]:
    """Source: guide, "Optimization Profiles": every dynamic axis of an input needs a minimum and a
    maximum."""
    if view.parent is not None:
        return
    for name in sorted(view.inputs):
        for index, axis in enumerate(view.shapes.get(name, [])):
            if axis == "":
                problem = f"axis {index} of input {name!r} is dynamic and has no name"
            elif isinstance(axis, str) and declared is not None and axis not in declared:
                problem = (
                    f"axis {axis!r} of input {name!r} has no declared range (known:"
                    f" {', '.join(sorted(declared))})"
                )
            else:
                continue
            yield LocatedProblem(
                name,
                "",
                Problem("axis", problem, "declare its range in the manifest, or fix its length"),
            )


def weights(view: GraphView) -> Iterator[LocatedProblem]:
    """Source: parser (`../` is refused); bundle format: each weight lies in weights.safetensors
    under its own name."""
    headers: dict[str, dict[str, Any] | None] = {}
    for tensor in view.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        where = {entry.key: entry.value for entry in tensor.external_data}
        location = where.get("location", "")
        problem = _path_problem(location)
        if problem is None and view.folder is not None:
            if location not in headers:
                headers[location] = safetensors_header(view.folder / location)
            problem = _location_problem(
                tensor.name, where, view.folder / location, headers[location]
            )
        if problem is not None:
            yield LocatedProblem(
                tensor.name,
                "",
                Problem("weights", problem, "export again, and keep weights beside the graph"),
            )


def _path_problem(location: str) -> str | None:
    path = PurePosixPath(location.replace("\\", "/"))
    if (
        not location
        or path.is_absolute()
        or ".." in path.parts
        or path.drive
        or location[1:2] == ":"
    ):
        return f"its data is at {location!r}, which leaves the bundle's folder"
    return None


def _location_problem(
    name: str, where: dict[str, str], path: Path, header: dict[str, Any] | None
) -> str | None:
    """What is wrong with a weight's place in its file."""
    try:
        size = path.stat().st_size
        start = int(where.get("offset", 0))
        end = start + int(where.get("length", size - start))
    except (OSError, ValueError):
        return f"its file {path.name!r} cannot be read"
    if end > size:
        return f"its data ends at byte {end} of {path.name!r}, which has {size}"
    if header is None:
        return None
    if name not in header:
        return f"{path.name!r} holds no weight of that name"
    if header[name] != (start, end):
        return (
            f"its data is at bytes {start} to {end}; {path.name!r} holds that weight at"
            f" {header[name][0]} to {header[name][1]}"
        )
    return None


def safetensors_header(path: Path) -> dict[str, Any] | None:
    """Name to (first byte, byte behind the last) in the file; None for a file of another kind."""
    if path.suffix != ".safetensors":
        return None
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            entries = json.loads(file.read(min(length, 1 << 28)))
        base = 8 + length
        return {
            name: (base + entry["data_offsets"][0], base + entry["data_offsets"][1])
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return {}
