"""INT8 on a CPU: exact on every processor, and fast.

ONNX Runtime's fast product takes unsigned activations, u8 x s8. Given signed ones it takes twelve
times as long (1950 x 1536 x 1536: 140 ms against 11.6) and does not even pack the weights. It makes
signed activations unsigned itself, but not where several layers read one: there each layer has its
own DequantizeLinear by then, and ONNX Runtime's rewrite expects a single one. `shift_activations`
does it before.

x86 processors with AVX2 or AVX-512 but without VNNI (Intel before Ice Lake, AMD before Zen 4) add
two u8 x s8 products in 16 bits, which overflows: the results are then wrong, without a message.
`saturates` tests the processor with one small product. Where it overflows, `shift_weights` makes
the weights unsigned as well: u8 x u8 is exact there. (ONNX Runtime's own remedy, the session option
`x64quantprecision`, fails on our graphs in 1.32.)

[-128, 127] about 0 and [0, 255] about 128 are the same numbers, so neither shift changes a result.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

_UNSIGNED_ZERO_POINT = "unsigned_zero_point"
_SIGN_BIT = "sign_bit"


@functools.cache
def saturates(runtime: Any) -> bool:
    """Tell whether a sum of u8 x s8 products comes out wrong on this processor.

    `runtime` is the onnxruntime module.
    """
    return not is_exact(runtime, np.int8)


def is_exact(runtime: Any, weights: type[np.int8] | type[np.uint8]) -> bool:
    """Tell whether ONNX Runtime adds up 64 of the largest products correctly on the CPU.

    Args:
        runtime: the onnxruntime module.
        weights: type of the second factors; the first are uint8.
    """
    count, largest = 64, int(np.iinfo(weights).max)
    activation = helper.make_tensor_value_info("a", TensorProto.UINT8, [1, count])
    product = helper.make_tensor_value_info("y", TensorProto.INT32, [1, 1])
    weight = numpy_helper.from_array(np.full((count, 1), largest, weights), "b")
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    graph = helper.make_graph([node], "probe", [activation], [product], [weight])
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()
    session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (total,) = session.run(None, {"a": np.full((1, count), 255, np.uint8)})
    return bool(total[0, 0] == count * 255 * largest)


def shift_activations(model: ModelProto) -> int:
    """Round activations to unsigned instead of signed integers, in place.

    Returns how many activations there were.
    """
    graph = model.graph
    int8_zero_points = {
        tensor.name
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.INT8 and not tensor.dims
    }
    quantized_names: set[str] = set()
    for node in graph.node:
        if (
            node.op_type == "QuantizeLinear"
            and len(node.input) == 3
            and node.input[2] in int8_zero_points
        ):
            node.input[2] = _UNSIGNED_ZERO_POINT
            quantized_names.add(node.output[0])
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in quantized_names:
            node.input[2] = _UNSIGNED_ZERO_POINT
    for value in graph.value_info:
        if value.name in quantized_names:
            value.type.tensor_type.elem_type = TensorProto.UINT8
    if quantized_names:
        graph.initializer.append(
            numpy_helper.from_array(np.array(128, np.uint8), _UNSIGNED_ZERO_POINT)
        )
    return len(quantized_names)


def shift_weights(model: ModelProto) -> int:
    """Make int8 weights uint8, and their zero points 128 instead of 0, in place.

    A two's complement byte with its sign bit inverted is the byte of the number plus 128. So the
    graph reads the weights' bytes, still in the bundle's file, as uint8, and inverts the sign bit
    with a `BitwiseXor` that ONNX Runtime computes once, when the session opens: this process holds
    no copy, and the model stays small.

    Args:
        model: whose int8 weights are read by `DequantizeLinear` alone, with zero points of 0.

    Returns:
        How many weights there were.
    """
    graph = model.graph
    weights = {t.name: t for t in graph.initializer if t.data_type == TensorProto.INT8 and t.dims}
    zero_point_names: dict[tuple[int, ...], str] = {}
    shifts: dict[str, NodeProto] = {}
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in weights:
            continue
        name = node.input[0]
        unsigned_name = f"{name}_unsigned"
        weights[name].data_type = TensorProto.UINT8
        shifts[name] = helper.make_node(
            "BitwiseXor", [name, _SIGN_BIT], [unsigned_name], name=unsigned_name
        )
        dims = tuple(weights[node.input[2]].dims)
        zero_point = zero_point_names.setdefault(
            dims, "_".join(map(str, ("weight_zero_point", *dims)))
        )
        node.input[0] = unsigned_name
        node.input[2] = zero_point
    if shifts:
        constants = {_SIGN_BIT: np.array(128, np.uint8)}
        constants |= {name: np.full(dims, 128, np.uint8) for dims, name in zero_point_names.items()}
        graph.initializer.extend(
            numpy_helper.from_array(array, name) for name, array in constants.items()
        )
        nodes = [*shifts.values(), *graph.node]
        del graph.node[:]
        graph.node.extend(nodes)
    return len(shifts)
