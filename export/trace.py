"""Records the graph of an architecture, without weights.

The network is built on fake tensors, which have shapes and types but no memory, and `torch.export`
records it with every declared axis symbolic. A 14B model is traced this way in about a minute and
under 1 GB. The ExportedProgram is the one program that every engine comes from: ONNX here,
AOTInductor and torch-tensorrt in `program`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from anyflow_deploy.checkpoints.dtypes import CHECKPOINT_DTYPES, SAFETENSORS_NAMES
from anyflow_deploy.checkpoints.weights import ParameterSpec
from anyflow_deploy.engines.torch_common.compat import make_fake_tensor_mode
from anyflow_deploy.model.causal import ChunkCompressor, ChunkTransition, TextKVEncoder
from anyflow_deploy.model.transformer import FlowMapTransformer
from anyflow_deploy.models import Architecture
from anyflow_deploy.precision import get_precision
from anyflow_deploy.shape_ranges import AXES, Range, ShapeRanges

MODULES = {
    "transition": FlowMapTransformer,
    "text": TextKVEncoder,
    "chunk": ChunkTransition,
    "compress": ChunkCompressor,
}
"""The module of each graph of a bundle (`manifest.GRAPHS` lists the graphs of a kind of model)."""

_EXAMPLE = {"batch": 2, "frames": 3, "height": 6, "width": 10, "text": 7, "past": 11}
"""Sizes to trace at, in patches where the axis has patches: all different and above 1, so that
torch cannot mistake one axis for another or for a constant."""


Axes = tuple[int | str, ...]

_PATCHES = {"height": "rows", "width": "columns"}


@dataclass(frozen=True)
class TracedGraph:
    """A recorded graph.

    Attributes:
        program: the graph; its weights are fake.
        parameters: the tensors that the checkpoint must provide, by name.
        symbols: the axis of each symbolic size, by torch's name of the size (`rows` and `columns`
            are patches of height and width).
        inputs, outputs: names in order, with their axes.
    """

    program: ExportedProgram
    parameters: dict[str, ParameterSpec]
    symbols: dict[str, str]
    inputs: dict[str, Axes]
    outputs: dict[str, Axes]


@dataclass(frozen=True)
class _Input:
    """An input of a graph: its axes (numbers are fixed sizes) and its type."""

    shape: Axes
    dtype: torch.dtype = torch.float32


def trace_graph(
    graph: str,
    a: Architecture,
    ranges: ShapeRanges,
    precision: str = "fp32",
    fused: bool = True,
    fused_attention: bool | None = None,
) -> TracedGraph:
    """Record one graph of a model.

    Args:
        graph: a name in `MODULES`.
        a: architecture of the network.
        ranges: axes with one allowed size become constants, all others stay symbolic.
        precision: "fp32", "fp16" or "bf16".
        fused: attention and RMS norm as single operators, see `transformer`.
        fused_attention: attention otherwise than RMS norm; None: as `fused` says.
    """
    compute_type = _compute_type(precision)
    inputs, outputs = _io_spec(graph, a, compute_type)
    with make_fake_tensor_mode(ShapeEnv()):
        network = MODULES[graph](a, compute_type, fused).eval()
        if fused_attention is not None:
            network.set_fused_attention(fused_attention)
        example, dynamic = _example_arguments(inputs, ranges, "cpu")
    program = torch.export.export(network, example, dynamic_shapes=dynamic)
    parameters = {
        n: ParameterSpec(SAFETENSORS_NAMES[p.dtype], tuple(p.shape))
        for n, p in network.named_parameters()
    }
    symbols = _name_symbols(program, inputs)
    return TracedGraph(
        program, parameters, symbols, {name: i.shape for name, i in inputs.items()}, outputs
    )


def record_network(
    network: FlowMapTransformer,
    graph: str,
    a: Architecture,
    ranges: ShapeRanges,
    precision: str,
    device: str,
) -> ExportedProgram:
    """Record a network that has its weights, on the device they are on.

    Args:
        network: one of `MODULES[graph]`.
        graph, a, ranges, precision: see `trace_graph`.
        device: torch device.
    """
    example, dynamic = example_arguments(graph, a, ranges, precision, device)
    with torch.no_grad():
        return torch.export.export(network, example, dynamic_shapes=dynamic)


def example_arguments(
    graph: str, a: Architecture, ranges: ShapeRanges, precision: str, device: str
) -> tuple[tuple[Tensor, ...], Any]:
    """Return example inputs to record a network with, and torch's description of their axes.

    The parameters are those of `trace_graph`, and the torch device of the inputs.
    """
    inputs, _ = _io_spec(graph, a, _compute_type(precision))
    return _example_arguments(inputs, ranges, device)


def _compute_type(precision: str) -> torch.dtype:
    return CHECKPOINT_DTYPES[get_precision(precision).tensor_type]


def _example_arguments(
    inputs: dict[str, _Input], ranges: ShapeRanges, device: str
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Return example inputs to record a network with, and torch's description of their axes."""
    axes = {axis: _dynamic_axis(axis, getattr(ranges, axis)) for axis in AXES}
    axes["past"] = (Dim("past"), _EXAMPLE["past"])
    example = tuple(
        torch.zeros([_axis_size(x, axes) for x in i.shape], dtype=i.dtype, device=device)
        for i in inputs.values()
    )
    shapes = [
        {n: axes[x][0] for n, x in enumerate(i.shape) if isinstance(x, str)}
        for i in inputs.values()
    ]
    # The others, one for each layer, are one *argument
    named_count = sum("." not in name for name in inputs)
    return example, (
        (*shapes[:named_count], tuple(shapes[named_count:]))
        if named_count < len(shapes)
        else tuple(shapes)
    )


def _io_spec(
    graph: str, a: Architecture, compute_type: torch.dtype
) -> tuple[dict[str, _Input], dict[str, Axes]]:
    """Return the inputs and outputs of a graph."""
    video: Axes = ("batch", "frames", a.in_channels, "height", "width")
    latents = {"latents": _Input(video)}
    times = {name: _Input(("batch", "frames")) for name in ("t", "r")}
    text = {"text": _Input(("batch", "text", a.text_dim))}
    states: dict[str, Axes] = {"z_r": video, "velocity": video}
    if graph == "transition":
        return {**latents, **times, **text}, states
    channels = (a.num_attention_heads, a.attention_head_dim)
    names = [f"{part}.{layer}" for layer in range(a.num_layers) for part in ("key", "value")]
    kv_axes: Axes = ("batch", "text" if graph == "text" else "tokens", *channels)
    kv_outputs = dict.fromkeys(names, kv_axes)
    if graph == "text":
        return text, {f"text_{name}": axes for name, axes in kv_outputs.items()}
    # The last layer of compress attends to nothing
    kv_names = names if graph == "chunk" else names[:-2]
    kv_inputs = {
        f"{what}_{name}": _Input(("batch", what, *channels), compute_type)
        for what in ("text", "past")
        for name in kv_names
    }
    positions = {"positions": _Input(("frames",), torch.int64)}
    if graph == "compress":
        return {**latents, **positions, **kv_inputs}, kv_outputs
    return {**latents, **times, **positions, **kv_inputs}, {**states, **kv_outputs}


def _axis_size(axis: int | str, axes: dict[str, tuple[object, int]]) -> int:
    return axis if isinstance(axis, int) else axes[axis][1]


def _dynamic_axis(name: str, axis_range: Range) -> tuple[object, int]:
    """Return torch's description of an axis, and the size to trace it at."""
    if axis_range.minimum == axis_range.maximum:
        return Dim.STATIC, axis_range.minimum
    unit = axis_range.multiple
    low = axis_range.minimum // unit
    high = None if axis_range.maximum is None else axis_range.maximum // unit
    example = max(2, low, _EXAMPLE[name])
    example = example if high is None else min(example, high)
    symbol = Dim(name, min=low, max=high) if high is not None else Dim(name, min=low)
    return (unit * symbol if unit > 1 else symbol), unit * example


def _name_symbols(program: ExportedProgram, inputs: dict[str, _Input]) -> dict[str, str]:
    """Return the axis of each of torch's symbols, which loses the names it was given."""
    names: dict[str, str] = {}
    placeholders = [
        node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs
    ]
    for node, spec in zip(placeholders, inputs.values(), strict=True):
        for axis, length in zip(spec.shape, node.meta["val"].shape, strict=True):
            if isinstance(axis, str) and isinstance(length, torch.SymInt):
                names.update(
                    {
                        str(symbol): _PATCHES.get(axis, axis)
                        for symbol in length.node.expr.free_symbols
                    }
                )
    return names
