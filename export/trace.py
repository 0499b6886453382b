"""From an architecture to a graph, without weights.

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
"""What computes each graph of a bundle (`manifest.GRAPHS` says which kind of model has which)."""

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
        parameters: what the checkpoint must provide, by name.
        symbols: torch's name of a symbolic size -> what it counts (`rows` and `columns` are patches
            of height and width).
        inputs, outputs: names in order, with their axes.
    """

    program: ExportedProgram
    parameters: dict[str, ParameterSpec]
    symbols: dict[str, str]
    inputs: dict[str, Axes]
    outputs: dict[str, Axes]


@dataclass(frozen=True)
class _Input:
    """A graph's input: its axes (numbers are fixed sizes) and its type."""

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
        a: which network.
        ranges: axes with one allowed size become constants, all others stay symbolic.
        precision: "fp32", "fp16" or "bf16".
        fused: attention and RMS norm as single operators, see `transformer`.
        fused_attention: attention otherwise than RMS norm; None: as `fused` says.
    """
    compute_type = CHECKPOINT_DTYPES[get_precision(precision).tensor_type]
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
    """What to call a network with while it is recorded, and torch's description of the axes; see
    `trace_graph`."""
    return _example_arguments(
        _io_spec(graph, a, CHECKPOINT_DTYPES[get_precision(precision).tensor_type])[0],
        ranges,
        device,
    )


def _example_arguments(
    inputs: dict[str, _Input], ranges: ShapeRanges, device: str
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """What to call a network with while it is recorded, and torch's description of the axes."""
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
    named = sum("." not in name for name in inputs)
    return example, (
        (*shapes[:named], tuple(shapes[named:])) if named < len(shapes) else tuple(shapes)
    )


def _io_spec(
    graph: str, a: Architecture, compute_type: torch.dtype
) -> tuple[dict[str, _Input], dict[str, Axes]]:
    """Inputs and outputs of a graph."""
    video: Axes = ("batch", "frames", a.in_channels, "height", "width")
    latents = {"latents": _Input(video)}
    times = {name: _Input(("batch", "frames")) for name in ("t", "r")}
    text = {"text": _Input(("batch", "text", a.text_dim))}
    if graph == "transition":
        return {**latents, **times, **text}, {"z_r": video, "velocity": video}
    channels = (a.num_attention_heads, a.attention_head_dim)
    names = [f"{part}.{layer}" for layer in range(a.num_layers) for part in ("key", "value")]
    own: Axes = ("batch", "text" if graph == "text" else "tokens", *channels)
    present = dict.fromkeys(names, own)
    if graph == "text":
        return text, {f"text_{name}": axes for name, axes in present.items()}
    # The last layer of compress attends to nothing
    seen = names if graph == "chunk" else names[:-2]
    memory = {
        f"{what}_{name}": _Input(("batch", what, *channels), compute_type)
        for what in ("text", "past")
        for name in seen
    }
    positions = {"positions": _Input(("frames",), torch.int64)}
    if graph == "compress":
        return {**latents, **positions, **memory}, present
    return {**latents, **times, **positions, **memory}, {"z_r": video, "velocity": video, **present}


def _axis_size(axis: int | str, axes: dict[str, tuple[object, int]]) -> int:
    return axis if isinstance(axis, int) else axes[axis][1]


def _dynamic_axis(name: str, allowed: Range) -> tuple[object, int]:
    """torch's description of an axis, and the size to trace it at."""
    if allowed.minimum == allowed.maximum:
        return Dim.STATIC, allowed.minimum
    unit = allowed.multiple
    low = allowed.minimum // unit
    high = None if allowed.maximum is None else allowed.maximum // unit
    example = max(2, low, _EXAMPLE[name])
    example = example if high is None else min(example, high)
    symbol = Dim(name, min=low, max=high) if high is not None else Dim(name, min=low)
    return (unit * symbol if unit > 1 else symbol), unit * example


def _name_symbols(program: ExportedProgram, inputs: dict[str, _Input]) -> dict[str, str]:
    """What each symbol counts: torch forgets the names it was given."""
    found: dict[str, str] = {}
    placeholders = [
        node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs
    ]
    for node, given in zip(placeholders, inputs.values(), strict=True):
        for axis, length in zip(given.shape, node.meta["val"].shape, strict=True):
            if isinstance(axis, str) and isinstance(length, torch.SymInt):
                found.update(
                    {
                        str(symbol): _PATCHES.get(axis, axis)
                        for symbol in length.node.expr.free_symbols
                    }
                )
    return found
