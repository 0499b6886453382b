"""Counts what a bundle's graphs really compute in eight bits.

A product counts as quantized only when both of its operands come out of a DequantizeLinear in the
finished graph, whatever the plan was. Operations are counted for all Gemm, MatMul, Attention and
Conv at the bundle's default video, from the graph's own shapes.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping

import onnx_ir as ir

from anyflow_deploy.bundle.manifest import AchievedPrecision, VideoDefaults
from anyflow_deploy.checkpoints.safetensors_stream import TensorEntry
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.models import Architecture

_EIGHT_BITS = ("I8", "F8_E4M3")
_PRODUCTS = ("Gemm", "MatMul", "Attention", "Conv")
_OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}


def count_precisions(
    models: Mapping[str, ir.Model],
    entries: Mapping[str, TensorEntry],
    a: Architecture,
    video: VideoDefaults,
    full_precision_layers: Mapping[str, str],
) -> AchievedPrecision:
    """Count the bytes and the operations of a bundle's graphs, by precision.

    Args:
        models: the finished graphs, by name; each is counted once.
        entries: the weights' types and sizes.
        a, video: decide the sizes of the symbols in shapes.
        full_precision_layers: the reason for each layer that was kept in full precision.
    """
    # Weights that graphs share are counted once
    names = {name for model in models.values() for name in model.graph.initializers}
    weight_bytes: dict[str, int] = {}
    for entry in (entries[name] for name in sorted(names)):
        weight_bytes[entry.type] = weight_bytes.get(entry.type, 0) + entry.bytes
    counts = [count_product_flops(model, symbol_sizes(a, video)) for model in models.values()]
    total, quantized_flops = (sum(values) for values in zip(*counts, strict=True))
    small = sum(weight_bytes.get(kind, 0) for kind in _EIGHT_BITS)
    return AchievedPrecision(
        weight_bytes=weight_bytes,
        quantized_flops=round(quantized_flops / total, 4),
        quantized_weights=round(small / sum(weight_bytes.values()), 4),
        full_precision_layers=dict(full_precision_layers),
    )


def symbol_sizes(a: Architecture, video: VideoDefaults) -> dict[str, int]:
    """Return the sizes of the symbols in shapes, at the default video.

    For a causal model that is the largest chunk, on a cache full of recent chunks.
    """
    rows, columns = (
        side // video.spatial_factor // a.patch_size[1] for side in (video.height, video.width)
    )
    grid = {"batch": 1, "rows": rows, "columns": columns, "text": video.text_tokens}
    if a.chunk_partition is not None and a.full_chunk_limit is not None:
        chunk = max(a.chunk_partition)
        return {**grid, "frames": chunk, "past": (a.full_chunk_limit - 1) * chunk * rows * columns}
    return {**grid, "frames": (video.frames - 1) // video.temporal_factor + 1}


def count_product_flops(model: ir.Model, symbols: Mapping[str, int]) -> tuple[int, int]:
    """Count the operations of all products of a graph, and those with two 8-bit operands."""
    total = quantized_flops = 0
    for node in model.graph:
        if node.op_type in _PRODUCTS:
            flops = _count_flops(node, symbols)
            total += flops
            quantized_flops += flops if _is_quantized(node) else 0
    return total, quantized_flops


def _is_quantized(node: ir.Node) -> bool:
    producers = [value.producer() if value is not None else None for value in node.inputs[:2]]
    return all(
        producer is not None and producer.op_type == "DequantizeLinear" for producer in producers
    )


def _count_flops(node: ir.Node, symbols: Mapping[str, int]) -> int:
    """Count two operations for every multiplication with addition."""
    output = _resolve_shape(node.outputs[0], symbols)
    if node.op_type == "Conv":
        return 2 * math.prod(output) * math.prod(_resolve_shape(node.inputs[1], symbols)[1:])
    first = _resolve_shape(node.inputs[0], symbols)
    if node.op_type == "Attention":  # (B, A, N, E) on (B, A, M, E): scores, then mixing
        return 4 * math.prod(first) * _resolve_shape(node.inputs[1], symbols)[-2]
    return 2 * math.prod(output) * first[-1]


def _resolve_shape(value: ir.Value | None, symbols: Mapping[str, int]) -> list[int]:
    if value is None or value.shape is None:
        raise AnyFlowError(
            f"{value.name if value else 'an operand'} has no shape in the graph, so its operations"
            " cannot be counted."
        )
    return [
        d if isinstance(d, int) else _evaluate(ast.parse(str(d.value), mode="eval").body, symbols)
        for d in value.shape
    ]


def _evaluate(expression: ast.expr, symbols: Mapping[str, int]) -> int:
    """Evaluate a size like `4*frames*rows*columns + past`."""
    if isinstance(expression, ast.BinOp) and type(expression.op) in _OPERATIONS:
        return _OPERATIONS[type(expression.op)](
            _evaluate(expression.left, symbols), _evaluate(expression.right, symbols)
        )
    if isinstance(expression, ast.Constant) and isinstance(expression.value, int):
        return expression.value
    if isinstance(expression, ast.Name) and expression.id in symbols:
        return symbols[expression.id]
    raise AnyFlowError(
        f"a shape in the graph is {ast.unparse(expression)!r}; known are {', '.join(symbols)}."
    )
