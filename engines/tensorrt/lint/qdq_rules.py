"""What TensorRT's ONNX parser refuses in QuantizeLinear and DequantizeLinear.

TensorRT quantizes symmetrically (zero point 0), to INT8, FP8 E4M3 or INT4 (FP4 later), with scales
that are known when the engine is built. ONNX allows more, and where the two differ in meaning the
parser is not always the one to say so: without a zero point ONNX means UINT8 and TensorRT takes
INT8. Source of every rule: the parser's QuantizeLinear and DequantizeLinear importer (10.1, and
10.16 where said); for constant scales and for which tensors may have a scale per channel,
IQuantizeLayer in the API reference and "Explicit Quantization" in NVIDIA's guide.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto

from anyflow_deploy.engines.tensorrt.lint.node_rules import Problem, Rule
from anyflow_deploy.engines.tensorrt.lint.onnx_graph import GraphView, attribute, operand, type_name
from anyflow_deploy.engines.tensorrt.lint.operators import QUANTIZED_TYPES, Version

_RULE = "quantization"


def quantized_type(view: GraphView, node: NodeProto, version: Version) -> Iterator[Problem]:
    """INT8, FP8 E4M3, INT4, and FP4 from 10.15 on; nothing unsaid."""
    known = QUANTIZED_TYPES if version >= Version(10, 15) else QUANTIZED_TYPES[:3]
    allowed = ", ".join(known)
    point = operand(node, 2)
    written = attribute(node, "output_dtype", 0) if node.op_type == "QuantizeLinear" else 0
    found = view.types.get(point) if point else type_name(written) if written else None
    if found is None and not point and node.op_type == "QuantizeLinear":
        yield Problem(
            _RULE,
            "no zero point: ONNX means UINT8, TensorRT takes INT8",
            "give a zero point of 0, of type INT8",
        )
    elif found is not None and found not in known:
        yield Problem(
            _RULE,
            f"quantizes to {found}; allowed are {allowed}",
            "quantize to INT8, or FP8 E4M3 where the GPU has it",
        )


def zero_point(view: GraphView, node: NodeProto, version: Version) -> Iterator[Problem]:
    """Symmetric only; as many zero points as scales."""
    point = operand(node, 2)
    if not point:
        return
    values = view.values(point)
    if values is not None and np.any(values.astype(np.float32)):
        yield Problem(
            _RULE, f"zero point {point!r} is not 0", "quantize symmetrically, with zero point 0"
        )
    sizes = [_size(view, name) for name in (point, operand(node, 1))]
    if None not in sizes and sizes[0] != sizes[1]:
        yield Problem(
            _RULE,
            f"{sizes[0]} zero points and {sizes[1]} scales",
            "give one zero point for each scale",
        )


def scale(view: GraphView, node: NodeProto, version: Version) -> Iterator[Problem]:
    """Known at build time, and positive."""
    name = operand(node, 1)
    if not view.is_constant(name, through=True):
        yield Problem(
            _RULE,
            f"scale {name!r} is computed while the graph runs",
            "store a calibrated scale as an initializer",
        )
    values = view.values(name)
    if values is not None and not np.all(values.astype(np.float32) > 0):
        yield Problem(
            _RULE,
            f"scale {name!r} is not positive everywhere",
            "calibrate again; use 1 for a channel of zeros",
        )


def channels(view: GraphView, node: NodeProto, version: Version) -> Iterator[Problem]:
    """One scale, one for each length of one axis, or a block table; per channel only for weights,
    with the axis written."""
    data = view.shapes.get(operand(node, 0))
    scales = view.shapes.get(operand(node, 1))
    if scales is None or _size(view, operand(node, 1)) == 1:
        return
    if len(scales) != 1 and data is not None and len(scales) != len(data):
        yield Problem(
            _RULE,
            f"scale has {len(scales)} dimensions, the data {len(data)}",
            "give 0, 1 or as many as the data",
        )
    if len(scales) != 1:
        return
    axis = attribute(node, "axis")
    if axis is None:
        advice = "write the axis"
        yield Problem(
            _RULE, "scales per channel without an axis: TensorRT 10.1 reads 0, ONNX means 1", advice
        )
    elif (
        data is not None
        and -len(data) <= axis < len(data)
        and isinstance(data[axis], int)
        and data[axis] != scales[0]
    ):
        yield Problem(
            _RULE,
            f"{scales[0]} scales for {data[axis]} channels of axis {axis}",
            "give one for each channel",
        )
    elif data is not None and not -len(data) <= axis < len(data):
        yield Problem(
            _RULE,
            f"axis {axis} of a tensor with {len(data)} dimensions",
            "give an axis that the tensor has",
        )
    if not view.is_constant(operand(node, 0), through=True):
        yield Problem(
            _RULE,
            "an activation has a scale per channel",
            "use one scale for an activation; channels are for weights",
        )


def packing(view: GraphView, node: NodeProto, version: Version) -> Iterator[Problem]:
    """Two 4-bit numbers share a byte: the last axis has to be even."""
    kind = view.types.get(operand(node, 2))
    shape = view.shapes.get(operand(node, 0))
    if kind in ("INT4", "FLOAT4E2M1") and shape and isinstance(shape[-1], int) and shape[-1] % 2:
        yield Problem(
            _RULE,
            f"{kind} with an odd last axis ({shape[-1]})",
            "pad it to an even length, or leave it unquantized",
        )


def _size(view: GraphView, name: str) -> int | None:
    shape = view.shapes.get(name)
    lengths = [axis for axis in shape if isinstance(axis, int)] if shape is not None else []
    return int(np.prod(lengths)) if shape is not None and len(lengths) == len(shape) else None


RULES: tuple[Rule, ...] = (quantized_type, zero_point, scale, channels, packing)

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
