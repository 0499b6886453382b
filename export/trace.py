"""From an architecture to a graph, without weights.

The network is built on fake tensors, which have shapes and types but no memory, and `torch.export` records it with
every declared axis symbolic. A 14B model is traced this way in about a minute and under 1 GB. The ExportedProgram is
the one program that every engine comes from: ONNX here, AOTInductor and torch-tensorrt later.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from anyflow_deploy.export.transformer import FlowMapTransformer
from anyflow_deploy.export.types import SAFETENSORS, TORCH
from anyflow_deploy.models import Architecture
from anyflow_deploy.precision import get_precision
from anyflow_deploy.ranges import Range, Ranges

INPUTS = ("latents", "t", "r", "text")
OUTPUTS = ("z_r", "velocity")

_EXAMPLE = {"batch": 2, "frames": 3, "height": 6, "width": 10, "text": 7}
"""Sizes to trace at, in patches where the axis has patches: all different and above 1, so that torch cannot mistake one
axis for another or for a constant."""


@dataclass(frozen=True)
class Parameter:
    """A tensor the graph needs: its safetensors type and shape."""

    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Traced:
    """A recorded transition.

    Attributes:
        program: the graph; its weights are fake.
        parameters: what the checkpoint must provide, by name.
        symbols: torch's name of a symbolic size -> the name of the axis.
    """

    program: ExportedProgram
    parameters: dict[str, Parameter]
    symbols: dict[str, str]


def traced_transition(architecture: Architecture, ranges: Ranges, precision: str = "fp32", fused: bool = True) -> Traced:
    """Record the transition of a bidirectional model.

    Args:
        architecture: which network.
        ranges: axes with one allowed size become constants, all others stay symbolic.
        precision: "fp32", "fp16" or "bf16".
        fused: attention and RMS norm as single operators, see `transformer`.
    """
    axes = {axis: _axis(axis, getattr(ranges, axis)) for axis in _EXAMPLE}
    size = {axis: example for axis, (_, example) in axes.items()}
    dim = {axis: symbol for axis, (symbol, _) in axes.items()}
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        network = FlowMapTransformer(architecture, TORCH[get_precision(precision).tensor_type], fused).eval()
        example = (
            torch.empty(size["batch"], size["frames"], architecture.in_channels, size["height"], size["width"]),
            torch.empty(size["batch"], size["frames"]),
            torch.empty(size["batch"], size["frames"]),
            torch.empty(size["batch"], size["text"], architecture.text_dim),
        )
    per_frame = {0: dim["batch"], 1: dim["frames"]}
    shapes = ({**per_frame, 3: dim["height"], 4: dim["width"]}, per_frame, per_frame, {0: dim["batch"], 1: dim["text"]})
    program = torch.export.export(network, example, dynamic_shapes=shapes)
    parameters = {n: Parameter(SAFETENSORS[p.dtype], tuple(p.shape)) for n, p in network.named_parameters()}
    return Traced(program, parameters, _symbols(program))


def _axis(name: str, allowed: Range) -> tuple[object, int]:
    """torch's description of an axis, and the size to trace it at."""
    if allowed.minimum == allowed.maximum:
        return Dim.STATIC, allowed.minimum
    unit = allowed.multiple
    low, high = allowed.minimum // unit, None if allowed.maximum is None else allowed.maximum // unit
    example = max(2, low, _EXAMPLE[name])
    example = example if high is None else min(example, high)
    symbol = Dim(name, min=low, max=high) if high is not None else Dim(name, min=low)
    return (unit * symbol if unit > 1 else symbol), unit * example


def _symbols(program: ExportedProgram) -> dict[str, str]:
    """Which symbol stands for which axis: torch forgets the names it was given."""
    names = {"latents": ("batch", "frames", None, "height", "width"), "text": ("batch", "text", None)}
    found = {}
    for node in program.graph.nodes:
        for axis, length in zip(names.get(node.name, ()), getattr(node.meta.get("val"), "shape", ()), strict=False):
            if axis is not None and isinstance(length, torch.SymInt):
                found.update({str(symbol): axis for symbol in length.node.expr.free_symbols})
    return found
