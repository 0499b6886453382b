"""INT8 on a processor: does it multiply exactly, and does ONNX Runtime multiply fast.

x86 processors with AVX2 or AVX-512 but without VNNI add two products of u8 and s8 in 16 bits, which overflows: ONNX
Runtime's integer products are then wrong by as much as the weights are large, and nobody is told. (Its own remedy, the
session option `x64quantprecision`, fails on our graphs in 1.32.) So the processor is asked, with one small product.

ONNX Runtime's fast product takes unsigned activations, u8 x s8; given signed ones it multiplies twelve times as slowly
(1950 x 1536 x 1536: 140 ms against 11.6) and does not even pack the weights. It makes signed activations unsigned itself,
but not where several layers read one: there each layer has its own DequantizeLinear by then, and the rewrite wants one.
So we shift them before. [-128, 127] about 0 and [0, 255] about 128 are the same numbers: every result stays the same.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

_MIDDLE = "unsigned_zero_point"


@functools.cache
def saturates(runtime: Any) -> bool:
    """True where a sum of u8 x s8 products comes out wrong. `runtime` is the onnxruntime module."""
    count = 64
    given = helper.make_tensor_value_info("a", TensorProto.UINT8, [1, count])
    product = helper.make_tensor_value_info("y", TensorProto.INT32, [1, 1])
    weight = numpy_helper.from_array(np.full((count, 1), 127, np.int8), "b")
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["y"])], "probe", [given], [product], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"a": np.full((1, count), 255, np.uint8)})
    return bool(found[0, 0] != count * 255 * 127)


def shift_activations(model: ModelProto) -> int:
    """Round activations to unsigned instead of signed integers, in place; returns how many there were."""
    graph = model.graph
    signed = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.INT8 and not tensor.dims}
    rounded: set[str] = set()
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and len(node.input) == 3 and node.input[2] in signed:
            node.input[2] = _MIDDLE
            rounded.add(node.output[0])
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in rounded:
            node.input[2] = _MIDDLE
    for value in graph.value_info:
        if value.name in rounded:
            value.type.tensor_type.elem_type = TensorProto.UINT8
    if rounded:
        graph.initializer.append(numpy_helper.from_array(np.array(128, np.uint8), _MIDDLE))
    return len(rounded)
