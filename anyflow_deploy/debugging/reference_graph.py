"""A reference out of a bundle's own graph: the same weights, computed in float32.

Quantizers of activations are removed (weights keep their DequantizeLinear, which turns them into
numbers), and everything in 16 bits becomes float32, the graph's border included. What is left to
differ is how the candidate computes. What this cannot find is a wrong weight, because both sides
read it: for that another bundle of the same checkpoint is the reference.
"""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

_NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def is_float32(model: ModelProto) -> bool:
    """Tell whether a graph computes in float32 already, so that there is nothing to widen."""
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    quantizers = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    return not quantizers and not kinds.intersection(_NARROW)


def widen_graph(model: ModelProto) -> ModelProto:
    """Copy a graph, computing in float32. Weights stay where they are, and are cast when used."""
    wide = ModelProto()
    wide.CopyFrom(model)
    _remove_quantizers(wide.graph)
    _widen_types(wide.graph)
    _cast_weights(wide.graph)
    return wide


def _remove_quantizers(graph: GraphProto) -> None:
    """Let everything read what was in front of a pair of QuantizeLinear and DequantizeLinear."""
    quantizers = {node.output[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    before: dict[str, str] = {}
    kept: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in quantizers:
            before[node.output[0]] = quantizers[node.input[0]].input[0]
        elif node.op_type != "QuantizeLinear":
            kept.append(node)
    for node in kept:
        for index, name in enumerate(node.input):
            node.input[index] = before.get(name, name)
    del graph.node[:]
    graph.node.extend(kept)


def _widen_types(graph: GraphProto) -> None:
    """Casts, constants and the border."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i in _NARROW:
                attribute.i = TensorProto.FLOAT
            elif attribute.HasField("t") and attribute.t.data_type in _NARROW:
                values = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
    for info in (*graph.input, *graph.output, *graph.value_info):
        if info.type.tensor_type.elem_type in _NARROW:
            info.type.tensor_type.elem_type = TensorProto.FLOAT


def _cast_weights(graph: GraphProto) -> None:
    """Put a cast behind every 16-bit weight, scales of DequantizeLinear included: they decide its
    type."""
    narrow = [tensor.name for tensor in graph.initializer if tensor.data_type in _NARROW]
    wide = {name: f"{name}/float32" for name in narrow}
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = wide.get(name, name)
    casts = [
        helper.make_node("Cast", [name], [cast], name=f"{cast}/Cast", to=TensorProto.FLOAT)
        for name, cast in wide.items()
    ]
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
