"""Inserts standard Q/DQ into a traced graph, by a plan.

Every planned Gemm is found by the name of its weight, so that all graphs of a bundle are treated
alike:

    x -> QuantizeLinear -> DequantizeLinear -+
    weight (eight bits) -> DequantizeLinear -+-> Gemm -> Add(bias)

Layers that read one tensor share its QuantizeLinear. The bias is moved out of the Gemm, because
ONNX Runtime's own fusion takes only a Gemm without one (3 times as fast as with it, measured), and
TensorRT adds it in the product's epilogue either way. That fusion also needs explicit zero points
(1.32 fused nothing without them), so the INT8 weights have theirs; FP8 weights need none.
Everything here is in opset 20, and valid in 23.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from anyflow_deploy.checkpoints.dtypes import ONNX_DTYPES, SAFETENSORS_NAMES
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.export.quantization.plan import (
    ZERO_POINT,
    QuantizationPlan,
    weight_scale_name,
    zero_points_name,
)
from anyflow_deploy.quantization.layers import OPERANDS

_WEIGHT = ".weight"
_CHANNELS_OUT = 0  # the axis of a weight (N, K)


def insert_qdq(model: ir.Model, plan: QuantizationPlan) -> None:
    """Rewrite a graph in place; scales become initializers without data, like the weights.

    Raises:
        AnyFlowError: a planned layer consists of other operators than this pass expects.
    """
    rewriter = _QdqRewriter(model.graph, plan)
    gemms = [(layer, node) for node in model.graph if (layer := _layer_of_gemm(node)) is not None]
    for layer, node in gemms:
        if layer in plan.norm_weights:
            rewriter.divide_norm(layer, node)
    for layer, node in gemms:
        if layer in plan.inputs:
            rewriter.quantize_gemm(layer, node)
    for name in plan.attentions:
        rewriter.quantize_attention(name)


def _layer_of_gemm(node: ir.Node) -> str | None:
    """Return the layer that a Gemm computes, by its weight's name."""
    if node.op_type != "Gemm" or node.inputs[1] is None or not node.inputs[1].is_initializer():
        return None
    return (node.inputs[1].name or "").removesuffix(_WEIGHT)


class _QdqRewriter:
    def __init__(self, graph: ir.Graph, plan: QuantizationPlan) -> None:
        self.graph = graph
        self.plan = plan
        self.nodes = {node.name: node for node in graph}
        self._pairs: dict[tuple[int, str], ir.Value] = {}
        self._norm_sums: set[int] = set()

    def quantize_gemm(self, layer: str, node: ir.Node) -> None:
        """Quantize the operands of one Gemm and move its bias behind it."""
        x, weight = node.inputs[0], node.inputs[1]
        assert x is not None and weight is not None
        operand = self._insert_qdq_pair(x, self.plan.inputs[layer], node)
        base_type = weight.type
        weight.type = ir.TensorType(ONNX_DTYPES[self.plan.kind])
        scale = self._get_constant(weight_scale_name(f"{layer}{_WEIGHT}"))
        inputs, attributes = [weight, scale], []
        if scale.shape is not None and len(scale.shape):
            inputs.append(self._get_constant(zero_points_name(scale.shape.numpy()[0])))
            attributes.append(ir.AttrInt64("axis", _CHANNELS_OUT))
        dequantize_output = self._insert_node(
            "DequantizeLinear", inputs, f"{layer}/DequantizeLinear", node, attributes
        )
        dequantize_output.type = base_type
        dequantize_output.shape = weight.shape
        node.replace_input_with(0, operand)
        node.replace_input_with(1, dequantize_output)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            self._add_bias(layer, node, node.inputs[2])

    def _add_bias(self, layer: str, node: ir.Node, bias: ir.Value) -> None:
        old = node.outputs[0]
        product = ir.Node(
            "", "Gemm", list(node.inputs[:2]), node.attributes.values(), name=node.name
        )
        total = ir.Node("", "Add", [product.outputs[0], bias], name=f"{layer}/Add")
        product.outputs[0].name = f"{layer}_product"
        product.outputs[0].type = old.type
        product.outputs[0].shape = old.shape
        ir.convenience.replace_nodes_and_values(
            self.graph, node, [node], [product, total], [old], [total.outputs[0]]
        )

    def divide_norm(self, layer: str, node: ir.Node) -> None:
        """Divide the modulated norm in front of a layer by s.

        Its weight becomes 1/s, and its shift is multiplied by 1/s.
        """
        total = _find_producer(node.inputs[0], ("Reshape", "Cast", "Identity"))
        if id(total) in self._norm_sums:
            return
        norm, shift = _find_modulated_norm(total, layer)
        assert total is not None
        vector = self._get_constant(self.plan.norm_weights[layer])
        norm.replace_input_with(1, vector)
        old = total.inputs[shift]
        assert old is not None
        shifted_out = self._insert_node(
            "Mul", [old, vector], f"{self.plan.norm_weights[layer]}/Mul", total
        )
        shifted_out.type, shifted_out.shape = old.type, old.shape
        total.replace_input_with(shift, shifted_out)
        self._norm_sums.add(id(total))

    def quantize_attention(self, name: str) -> None:
        """Quantize the operands of both products of an attention that the graph has."""
        scores = self.nodes.get(f"{name}/MatMul")
        output_product = self.nodes.get(f"{name}/MatMul_2")
        if scores is None and output_product is None:
            return
        if (
            scores is None
            or output_product is None
            or output_product.inputs[0] is None
            or _producer(output_product.inputs[0]).op_type != "Softmax"
        ):
            raise AnyFlowError(
                f"{name} does not consist of two products and a softmax. Export with --opset 20, or"
                " --attention high."
            )
        places = {
            "query": (scores, 0),
            "key": (scores, 1),
            "probabilities": (output_product, 0),
            "value": (output_product, 1),
        }
        for operand in OPERANDS:
            node, index = places[operand]
            value = node.inputs[index]
            assert value is not None
            node.replace_input_with(
                index, self._insert_qdq_pair(value, f"{name}.{operand}_scale", node)
            )

    def _insert_qdq_pair(self, x: ir.Value, scale_name: str, node: ir.Node) -> ir.Value:
        """Quantize and dequantize `x` in front of `node`.

        Nodes that read it with the same scale share one pair.
        """
        key = (id(x), scale_name)
        if key not in self._pairs:
            stem = scale_name.removesuffix("_scale")
            scale = self._get_constant(scale_name)
            zero = self._get_constant(ZERO_POINT)
            quantize_output = self._insert_node(
                "QuantizeLinear", [x, scale, zero], f"{stem}/QuantizeLinear", node
            )
            quantize_output.type = ir.TensorType(ONNX_DTYPES[self.plan.kind])
            quantize_output.shape = x.shape
            dequantize_output = self._insert_node(
                "DequantizeLinear", [quantize_output, scale, zero], f"{stem}/DequantizeLinear", node
            )
            dequantize_output.type, dequantize_output.shape = x.type, x.shape
            self._pairs[key] = dequantize_output
        return self._pairs[key]

    def _get_constant(self, name: str) -> ir.Value:
        """Return an initializer of the plan, without data."""
        if name not in self.graph.initializers:
            tensor = self.plan.constants[name]
            value = ir.Value(
                name=name,
                shape=ir.Shape(tensor.shape),
                type=ir.TensorType(ONNX_DTYPES[SAFETENSORS_NAMES[tensor.dtype]]),
            )
            self.graph.initializers[name] = value
        return self.graph.initializers[name]

    def _insert_node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        name: str,
        place: ir.Node,
        attributes: list[ir.Attr] | None = None,
    ) -> ir.Value:
        """Insert a new node in front of another, and return its output."""
        node = ir.Node("", op_type, inputs, attributes or [], name=name)
        node.outputs[0].name = name.replace("/", "_")
        self.graph.insert_before(place, node)
        return node.outputs[0]


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _find_producer(value: ir.Value | None, op_types: tuple[str, ...]) -> ir.Node | None:
    """Return the node that computes a value, skipping nodes that only pass it on."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in op_types:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node


def _find_modulated_norm(total: ir.Node | None, layer: str) -> tuple[ir.Node, int]:
    """Return the norm in `norm * (1 + scale) + shift`, and which input of the sum the shift is."""
    for index, norm in _iter_factors(total) if total is not None else ():
        if norm.op_type == "LayerNormalization":
            return norm, 1 - index
    raise AnyFlowError(
        f"the input of {layer} is not a modulated norm, so SmoothQuant cannot be folded into it."
        " Export with --no-smoothquant."
    )


def _iter_factors(total: ir.Node) -> Iterator[tuple[int, ir.Node]]:
    """Yield the factors of the products in a sum, each with the index of its product."""
    for index, value in enumerate(total.inputs):
        product = value.producer() if value is not None else None
        if total.op_type == "Add" and product is not None and product.op_type == "Mul":
            for factor in product.inputs:
                if factor is not None and (node := factor.producer()) is not None:
                    yield index, node
