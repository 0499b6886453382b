"""Whether this processor multiplies INT8 exactly.

x86 processors with AVX2 or AVX-512 but without VNNI add two products of u8 and s8 in 16 bits, which overflows: ONNX
Runtime's integer products are then wrong by as much as the weights are large, and nobody is told. (Its own remedy, the
session option `x64quantprecision`, fails on our graphs in 1.32.) So the processor is asked, with one small product.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


@functools.cache
def saturates(runtime: Any) -> bool:
    """True where a sum of u8 x s8 products comes out wrong. `runtime` is the onnxruntime module."""
    from onnx import TensorProto, helper, numpy_helper

    count = 64
    given = helper.make_tensor_value_info("a", TensorProto.UINT8, [1, count])
    product = helper.make_tensor_value_info("y", TensorProto.INT32, [1, 1])
    weight = numpy_helper.from_array(np.full((count, 1), 127, np.int8), "b")
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["y"])], "probe", [given], [product], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"a": np.full((1, count), 255, np.uint8)})
    return bool(found[0, 0] != count * 255 * 127)
