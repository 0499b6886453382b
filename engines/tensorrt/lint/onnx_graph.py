"""One ONNX graph, laid out for questions: who makes this tensor, what type and shape has it, is it
constant?

A `GraphProto` is a list of nodes and lists of names. The lint asks the same few things of it again
and again, so they are looked up once here. Subgraphs (of If, Loop and Scan) see their parent's
names, as ONNX says. Weights stay on disk; `values` reads a single tensor where a rule needs its
numbers (scales and zero points, which are small).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    numpy_helper,
)

Axis = int | str
"""A length, the name of a dynamic axis, or "" where nothing is known."""

_SHAPE_READERS = ("Shape", "Size")


def type_name(number: int) -> str:
    """ONNX's name of an element type: FLOAT, FLOAT8E4M3FN, …"""
    return str(TensorProto.DataType.Name(number))


class GraphView:
    """A graph and everything its names mean.

    Args:
        graph: the graph; types come from its value_info, so infer shapes first.
        folder: where external data lies; None if it is not at hand.
        parent: the view of the graph around this one.
    """

    def __init__(
        self, graph: GraphProto, folder: Path | None = None, parent: GraphView | None = None
    ) -> None:
        self.graph, self.folder, self.parent = graph, folder, parent
        self.nodes: list[NodeProto] = list(graph.node)
        self.producers: dict[str, NodeProto] = dict(parent.producers) if parent else {}
        self.tensors: dict[str, TensorProto] = dict(parent.tensors) if parent else {}
        self.types: dict[str, str] = dict(parent.types) if parent else {}
        self.shapes: dict[str, list[Axis]] = dict(parent.shapes) if parent else {}
        self.inputs = {value.name for value in graph.input} - {
            tensor.name for tensor in graph.initializer
        }
        self.producers.update((name, node) for node in graph.node for name in node.output if name)
        for value in [*graph.input, *graph.value_info, *graph.output]:
            self._add_value(value)
        for tensor in graph.initializer:
            self._add_tensor(tensor.name, tensor)
        for node in graph.node:
            self._add_constant(node)

    def _add_value(self, value: ValueInfoProto) -> None:
        if value.type.HasField("tensor_type"):
            kind = value.type.tensor_type
            if kind.elem_type:
                self.types[value.name] = type_name(kind.elem_type)
            if kind.HasField("shape"):
                self.shapes[value.name] = [
                    d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim
                ]

    def _add_tensor(self, name: str, tensor: TensorProto) -> None:
        self.tensors[name] = tensor
        self.types[name] = type_name(tensor.data_type)
        self.shapes[name] = list(tensor.dims)

    def _add_constant(self, node: NodeProto) -> None:
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx") or not node.output:
            return
        for a in node.attribute:
            if a.name == "value":
                self._add_tensor(node.output[0], a.t)
            elif a.name in ("value_int", "value_ints", "value_float", "value_floats"):
                kind = TensorProto.INT64 if "int" in a.name else TensorProto.FLOAT
                many = a.name.endswith("s")
                items: list[Any] = (
                    list(onnx.helper.get_attribute_value(a))
                    if many
                    else [onnx.helper.get_attribute_value(a)]
                )
                tensor = onnx.helper.make_tensor(
                    node.output[0], kind, [len(items)] if many else [], items
                )
                self._add_tensor(node.output[0], tensor)

    def values(self, name: str) -> NDArray[Any] | None:
        """Numbers of a constant; None where it is none, or where its file cannot be read."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        if self.folder is None:
            return None
        copy = TensorProto()
        copy.CopyFrom(tensor)  # reading fills the tensor in place
        try:
            return numpy_helper.to_array(copy, str(self.folder))
        except (OSError, ValueError, onnx.checker.ValidationError):
            return None

    def is_constant(self, name: str, through: bool = False) -> bool:
        """Whether a tensor is a weight or a Constant; with `through`, also what only constants lead
        to."""
        if name in self.tensors:
            return True
        node = self.producers.get(name)
        if not through or node is None or node.op_type.startswith("Random") or subgraphs(node):
            return False
        return bool(node.input) and all(
            self.is_constant(source, through) for source in node.input if source
        )

    def find_data_source(self, name: str) -> str | None:
        """What a tensor's *values* hang on: the first graph input or data-dependent node, or None
        for shapes and constants."""
        waiting, seen = [name], set[str]()
        while waiting:
            name = waiting.pop()
            if name in seen or name in self.tensors:
                continue
            seen.add(name)
            node = self.producers.get(name)
            if node is None:
                if name in self.inputs and self.parent is None:
                    return f"input {name!r}"
            elif node.op_type in ("NonZero", "NonMaxSuppression"):
                return f"node {node.name!r}"
            elif node.op_type not in _SHAPE_READERS:
                waiting.extend(source for source in node.input if source)
        return None


def subgraphs(node: NodeProto) -> list[GraphProto]:
    """Bodies of an If, Loop or Scan."""
    found = [a.g for a in node.attribute if a.type == AttributeProto.GRAPH]
    return found + [g for a in node.attribute if a.type == AttributeProto.GRAPHS for g in a.graphs]


def graph_views(model: ModelProto, folder: Path | None = None) -> Iterator[GraphView]:
    """The model's graph and every graph inside it, outermost first."""
    waiting = [GraphView(model.graph, folder)]
    while waiting:
        view = waiting.pop()
        yield view
        waiting.extend(
            GraphView(graph, folder, view) for node in view.nodes for graph in subgraphs(node)
        )


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """Value of an attribute; strings are decoded."""
    for a in node.attribute:
        if a.name == name:
            value = onnx.helper.get_attribute_value(a)
            return value.decode() if isinstance(value, bytes) else value
    return default


def operand(node: NodeProto, index: int) -> str:
    """Name of an input; "" where it was left out."""
    return str(node.input[index]) if index < len(node.input) else ""


def is_standard(node: NodeProto) -> bool:
    """Whether a node is of ONNX's own operator set."""
    return node.domain in ("", "ai.onnx")
