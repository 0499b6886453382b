"""Places that two graphs of one network have in common, and graphs that show them.

Two bundles of a checkpoint differ in precision, and so in nodes: one has casts, another has Q/DQ
and its biases behind the products. What they share are the names that the exporter gives to nodes,
`blocks.3.attn1.to_q/Gemm`: the module's scope and the operator. Points are matched by these names,
never by their place in the file.

A *point* of detail "blocks" is what a whole block gives (or a module outside of the blocks), one of
"layers" is what a module gives, one of "nodes" a single operator's result. What a module gives is
the result of the last of its nodes that is not a cast: casts exist in one precision and not in the
other. Among the layers are also the sums that belong to no smaller module, such as a block's
`blocks.3/Add_5`: modulation and residual are computed there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from onnx import ModelProto, NodeProto, TensorProto, helper

from anyflow_deploy.errors import AnyFlowError

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_NOT_SHARED = ("Cast", "Constant", "QuantizeLinear", "DequantizeLinear")
"""Operators that depend on the precision, and Constants, whose names count them."""

_BLOCK = re.compile(r"blocks\.\d+(?=[./]|$)")
_SCALED_BY_SMOOTHQUANT = re.compile(r"blocks\.\d+(/.+|\.(norm2|attn[12](\.to_v)?))")
_MARK = "/marked"


@dataclass(frozen=True)
class Point:
    """A place in both graphs.

    Attributes:
        name: the module's scope, the node's name, or the name of a graph's output.
        depth: the number of its node in the candidate's graph.
        candidate, reference: the tensor's name in either graph.
    """

    name: str
    depth: int
    candidate: str
    reference: str

    @property
    def block(self) -> str | None:
        """Name the block it lies in; None outside of the blocks."""
        match = _BLOCK.match(self.name)
        return match[0] if match else None


def find_points(
    candidate: ModelProto, reference: ModelProto, detail: str, smoothed: bool = False
) -> list[Point]:
    """Match two graphs of one network.

    Args:
        candidate, reference: as their runtimes get them.
        detail: one of `debugging.DETAILS`.
        smoothed: the candidate's SmoothQuant factors are missing from the reference. Layers whose
            results carry such factors are left out: they differ by the factor, and nothing is wrong
            with them.

    Returns:
        Points in the candidate's order, the graph's outputs not among them.

    Raises:
        AnyFlowError: the graphs have no point in common.
    """
    ours, theirs = named_tensors(candidate, detail), named_tensors(reference, detail)
    points = [
        Point(name, depth, tensor, theirs[name][1])
        for name, (depth, tensor) in ours.items()
        if name in theirs and not (smoothed and _SCALED_BY_SMOOTHQUANT.fullmatch(name))
    ]
    if not points:
        raise AnyFlowError(
            f"the two graphs have no {detail} in common: {_example(ours)} in the one,"
            f" {_example(theirs)} in the other. Give a --reference that this version exported from"
            " the same checkpoint."
        )
    return sorted(points, key=lambda point: point.depth)


def output_points(candidate: ModelProto, reference: ModelProto) -> list[Point]:
    """List the outputs that both graphs have, in the candidate's order of computing them."""
    depths = {
        tensor: depth for depth, node in enumerate(candidate.graph.node) for tensor in node.output
    }
    theirs = {output.name for output in reference.graph.output}
    return sorted(
        (
            Point(output.name, depths[output.name], output.name, output.name)
            for output in candidate.graph.output
            if output.name in theirs
        ),
        key=lambda point: point.depth,
    )


def named_tensors(model: ModelProto, detail: str) -> dict[str, tuple[int, str]]:
    """List every point of a graph: its name, and the depth and name of its tensor."""
    floats = {
        info.name
        for info in (*model.graph.value_info, *model.graph.output)
        if info.type.tensor_type.elem_type in _FLOATS
    }
    modules: dict[str, tuple[int, str]] = {}
    nodes: dict[str, tuple[int, str]] = {}
    for depth, node in enumerate(model.graph.node):
        if node.op_type in _NOT_SHARED or node.output[0] not in floats:
            continue
        module, name = _point_names(node, detail)
        if module:
            modules[module] = (depth, node.output[0])  # in the place of an earlier node's
        if name:
            nodes[name] = (depth, node.output[0])
    known = set(modules.values())
    return modules | {name: place for name, place in nodes.items() if place not in known}


def _point_names(node: NodeProto, detail: str) -> tuple[str, str]:
    """The module that a node is a point of, and its own name where it is a point itself."""
    scope = str(node.name.rpartition("/")[0])
    block = _BLOCK.match(scope)
    if detail == "nodes":
        return "", str(node.name)
    if detail == "blocks":
        return block[0] if block else scope, ""
    is_sum = node.op_type == "Add" and scope in ("", block[0] if block else "")
    return scope, str(node.name) if is_sum else ""


def mark_outputs(model: ModelProto, tensors: Mapping[str, str]) -> ModelProto:
    """Copy a graph, with other outputs.

    Args:
        model: without its weights in memory.
        tensors: name of a point -> tensor in the graph.

    Returns:
        The copy. Its only outputs are the points, cast to float32: so a comparison rounds nothing
        once more, and both sides have one type.
    """
    from polygraphy.backend.onnx import modify_outputs

    marked = ModelProto()
    marked.CopyFrom(model)
    outputs = {f"{name}{_MARK}": tensor for name, tensor in tensors.items()}
    for name, tensor in outputs.items():
        marked.graph.node.append(
            helper.make_node("Cast", [tensor], [name], name=name, to=TensorProto.FLOAT)
        )
        marked.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    result: ModelProto = modify_outputs(marked, outputs=list(outputs))
    return result


def point_of_output(output: str) -> str:
    """Return the name of the point that an output of a marked graph shows."""
    return output.removesuffix(_MARK)


def _example(tensors: Mapping[str, Any]) -> str:
    names: Iterator[str] = iter(tensors)
    return repr(next(names, "nothing with a name"))
