"""ONNX Runtime's own profiler: the time of each operator of a graph, with its shapes.

The profiler is switched on when a session is opened, so layers are profiled in another engine than
the one whose steps are timed. It writes a list of events in Chrome's trace format; those of
category "Node" are operators. Weights that ONNX Runtime has packed for its products are missing
from an operator's shapes and sizes, so a product is counted from its input and output.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.dtypes import DTYPES
from anyflow_deploy.engines.layer_timing import LayerTiming, merge_timings
from anyflow_deploy.engines.onnxruntime.engine import OnnxRuntimeEngine
from anyflow_deploy.engines.registry import EngineOptions

_INTEGER = (
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QLinearMatMul",
    "QGemm",
    "DynamicQuantizeMatMul",
    "QLinearConv",
)
_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulNBits", *_INTEGER)
_ATTENTIONS = ("MultiHeadAttention", "Attention")
_BYTES = {row.onnxruntime: row.bytes for row in DTYPES.values() if row.onnxruntime}


class ProfiledEngine(OnnxRuntimeEngine):
    """An `OnnxRuntimeEngine` whose sessions write a trace.

    Args:
        bundle: an opened bundle.
        options: how to run.
        folder: of the traces.
    """

    def __init__(self, bundle: Bundle, options: EngineOptions, folder: Path) -> None:
        self._folder = folder
        super().__init__(bundle, options)

    def _session_options(self, name: str, threads: int | None) -> Any:
        options = super()._session_options(name, threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(self._folder / name)
        return options

    def layers(self, graph: str, last: int) -> list[LayerTiming]:
        """Stop profiling a graph and return the timings of its last runs.

        Args:
            graph: its name in the manifest.
            last: how many runs to count, from the end; earlier runs were warm-up.
        """
        trace = Path(self._sessions[graph].end_profiling())
        return timings_from_trace(json.loads(trace.read_text()), last)


def timings_from_trace(events: list[dict[str, Any]], last: int) -> list[LayerTiming]:
    """Add up the operators of the last runs in a trace, by node."""
    runs = sorted(
        (e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("cat") == "Session" and e["name"] == "model_run"
    )
    begin = runs[-last][0]
    nodes = (
        e
        for e in events
        if e.get("cat") == "Node" and e["name"].endswith("_kernel_time") and e["ts"] >= begin
    )
    return merge_timings(_node_timings(nodes))


def _node_timings(nodes: Iterator[dict[str, Any]]) -> Iterator[LayerTiming]:
    for event in nodes:
        arguments = event["args"]
        operator = arguments["op_name"]
        inputs = _shapes(arguments, "input_type_shape")
        outputs = _shapes(arguments, "output_type_shape")
        bytes_moved = sum(
            int(arguments.get(key) or 0)
            for key in ("activation_size", "parameter_size", "output_size")
        )
        yield LayerTiming(
            name=event["name"].removesuffix("_kernel_time"),
            operator=operator,
            seconds=event["dur"] * 1e-6,
            calls=1,
            operations=_count_operations(operator, inputs, outputs),
            bytes=float(bytes_moved + _packed_weight_bytes(operator, inputs, outputs)),
        )


def _shapes(arguments: dict[str, Any], key: str) -> list[tuple[str, list[int]]]:
    """Return (type, shape) of each tensor."""
    tensors = arguments.get(key) or []
    tensors = json.loads(tensors) if isinstance(tensors, str) else tensors
    return [next(iter(tensor.items())) for tensor in tensors if tensor]


def _count_operations(
    operator: str, inputs: list[tuple[str, list[int]]], outputs: list[tuple[str, list[int]]]
) -> float:
    """Count two for each multiplication with addition; 0 for an operator that is no product."""
    if not inputs or not outputs:
        return 0.0
    first, output = inputs[0][1], outputs[0][1]
    if operator in _PRODUCTS and first:
        return 2.0 * math.prod(output) * first[-1]
    if operator in _ATTENTIONS and len(inputs) > 1 and len(first) == 3:
        return 4.0 * math.prod(first) * inputs[1][1][1]
    if operator in ("Conv", "FusedConv", "NhwcFusedConv") and len(inputs) > 1:
        return 2.0 * math.prod(output) * math.prod(inputs[1][1][1:])
    return 0.0


def _packed_weight_bytes(
    operator: str, inputs: list[tuple[str, list[int]]], outputs: list[tuple[str, list[int]]]
) -> int:
    """Return the bytes of a product's weight that the trace leaves out."""
    if (
        operator not in _PRODUCTS
        or not inputs
        or not outputs
        or any(len(shape) >= 2 for _, shape in inputs[1:])
    ):
        return 0
    rows = inputs[0][1][-1] * outputs[0][1][-1]
    return rows * (1 if operator in _INTEGER else _BYTES.get(inputs[0][0], 4))
