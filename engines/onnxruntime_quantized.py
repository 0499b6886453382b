"""INT8 layers for ONNX Runtime on a CPU: the same numbers, in the kernels that are fast there.

The bundle says QuantizeLinear, DequantizeLinear, Gemm, Add. ONNX Runtime's own fusion of that is at the mercy of details
(since 1.31 it wants a zero point on the weight; a bias inside the Gemm stops it), and what is not fused is slower than
float32. So each such layer becomes QuantizeLinear and `com.microsoft.MatMulIntegerToFloat`, which also takes scales and
bias, and layers with one input share one QuantizeLinear. Measured on two cores with VNNI, 1,950 x 1,536 by 8,960: Gemm in
float32 626 ms, Q/DQ as it stands 735 ms, ORT's fusion 220 ms, this 220 ms without depending on it; with signed activations
2,272 ms, because that product has no fast kernel. Hence activations are unsigned here, with zero point 128: the same
integers, shifted.

A processor without VNNI adds two products of u8 and s8 in 16 bits, and saturates. `saturates` asks the processor itself;
where it does, weights become unsigned too, which is exact everywhere, and slower.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from anyflow_deploy.engines.onnxruntime_graph import drop_unused

_DOMAIN = "com.microsoft"
_HALF = 128
_ZERO_U8 = "anyflow_zero_u8"
_SHIFT = "anyflow_shift"

FP8_CURED = (1, 32)
"""Older versions of ONNX Runtime fuse FP8 Q/DQ into operators that do not take FP8, and then refuse the graph."""


def has_fp8(model: onnx.ModelProto) -> bool:
    """Whether a graph holds FP8 weights."""
    return any(tensor.data_type == TensorProto.FLOAT8E4M3FN for tensor in model.graph.initializer)


def breaks_fp8(version: str) -> bool:
    """Whether this version of ONNX Runtime needs its Q/DQ fusions switched off for FP8 (they do nothing else there)."""
    return tuple(int(part) for part in version.split(".")[:2]) < FP8_CURED


@functools.cache
def saturates(runtime: Any) -> bool:
    """Whether products of u8 and s8 overflow on this processor."""
    count = 64
    nodes = [helper.make_node("MatMulInteger", ["a", "b"], ["y"])]
    given = helper.make_tensor_value_info("a", TensorProto.UINT8, [1, count])
    product = helper.make_tensor_value_info("y", TensorProto.INT32, [1, 1])
    weight = numpy_helper.from_array(np.full((count, 1), 127, np.int8), "b")
    graph = helper.make_graph(nodes, "probe", [given], [product], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"a": np.full((1, count), 255, np.uint8)})
    return bool(found[0, 0] != count * 255 * 127)


def use_integer_products(model: onnx.ModelProto, unsigned_weights: bool) -> int:
    """Rewrite every INT8 layer with float32 around it, in place.

    Args:
        model: its weights may lie in another file.
        unsigned_weights: for processors where `saturates`.

    Returns:
        How many there were.
    """
    rewriter = _Rewriter(model.graph, unsigned_weights)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if id(node) not in rewriter.absorbed:
            nodes.extend(rewriter.rewritten(node))
    if rewriter.count:
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        drop_unused(model.graph)
        model.graph.initializer.append(numpy_helper.from_array(np.array(_HALF, np.uint8), _ZERO_U8))
        model.graph.initializer.append(numpy_helper.from_array(np.array(_HALF, np.int32), _SHIFT))
        if all(opset.domain != _DOMAIN for opset in model.opset_import):
            model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    return rewriter.count


class _Rewriter:
    def __init__(self, graph: onnx.GraphProto, unsigned_weights: bool) -> None:
        self.kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
        self.maker = {name: node for node in graph.node for name in node.output}
        self.users: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.unsigned = unsigned_weights
        self.quantized: set[str] = set()
        self.count = 0
        self.absorbed = {id(add) for node in graph.node if self._operands(node) and (add := self._bias(node)) is not None}

    def rewritten(self, node: NodeProto) -> list[NodeProto]:
        """What stands in place of a node."""
        operands = self._operands(node)
        if operands is None:
            return [node]
        x, weight = operands
        self.count += 1
        nodes, add = self._turned(weight), self._bias(node)
        matrix, zero = nodes[-1].output[0], _ZERO_U8 if self.unsigned else ""
        activation = f"{x.input[0]}_u8"
        if activation not in self.quantized:
            self.quantized.add(activation)
            source = self.maker[x.input[0]]
            nodes.append(
                helper.make_node("QuantizeLinear", [*source.input[:2], _ZERO_U8], [activation], name=f"{source.name}_u8")
            )
        bias = "" if add is None else next(name for name in add.input if name != node.output[0])
        inputs = [activation, matrix, x.input[1], weight.input[1], _ZERO_U8, zero, bias]
        output = node.output[0] if add is None else add.output[0]
        name = f"{node.name.removesuffix('/Gemm')}/MatMulIntegerToFloat"
        return [*nodes, helper.make_node("MatMulIntegerToFloat", inputs, [output], name=name, domain=_DOMAIN)]

    def _operands(self, node: NodeProto) -> tuple[NodeProto, NodeProto] | None:
        """The two DequantizeLinear in front of an INT8 layer."""
        if node.op_type != "Gemm" or len(node.input) > 2:
            return None
        x, weight = (self.maker.get(name) for name in node.input)
        if x is None or weight is None or x.op_type != "DequantizeLinear" or weight.op_type != "DequantizeLinear":
            return None
        fits = self.kinds.get(weight.input[0]) == TensorProto.INT8 and self.kinds.get(weight.input[1]) == TensorProto.FLOAT
        return (x, weight) if fits and x.input[0] in self.maker else None

    def _bias(self, node: NodeProto) -> NodeProto | None:
        """The Add of a constant behind a layer."""
        users = self.users.get(node.output[0], [])
        if len(users) != 1 or users[0].op_type != "Add" or not any(name in self.kinds for name in users[0].input):
            return None
        return users[0]

    def _turned(self, weight: NodeProto) -> list[NodeProto]:
        """Makes (K, N) of a weight (N, K). All is constant, and worked out when the session opens."""
        source, stem = weight.input[0], weight.output[0]
        nodes = []
        if self.unsigned:
            wide, moved, small = f"{stem}_i32", f"{stem}_moved", f"{stem}_u8"
            nodes = [
                helper.make_node("Cast", [source], [wide], name=wide, to=TensorProto.INT32),
                helper.make_node("Add", [wide, _SHIFT], [moved], name=moved),
                helper.make_node("Cast", [moved], [small], name=small, to=TensorProto.UINT8),
            ]
            source = small
        return [*nodes, helper.make_node("Transpose", [source], [f"{stem}_turned"], name=f"{stem}_turned", perm=[1, 0])]
