"""What is quantized, with which scales: decided once, before any graph is traced.

Candidates are the linear layers of the blocks. A layer's input range comes from the calibration and its weights' ranges
from the weights, which are read once here, a group of layers with one input at a time; what is kept of them is vectors.
All graphs of a bundle are rewritten from one plan (`quantize`), and the weights written by it (`weights`).

SmoothQuant (arXiv 2211.10438, equation 4) divides the input of a layer by a vector s and multiplies its weight's columns
by it, so that channels with outliers no longer set the scale of all others. Dividing costs nothing where it can be folded
into what makes the input: a norm, or the rows of `to_v` (attention mixes tokens, never channels). It is skipped for the
text, which all layers share, and for the input of `ffn.net.2`, which comes out of a GELU.

Legend: D channels in, N channels out of a layer.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anyflow_deploy.calibration import Calibration
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.export.trace import Parameter
from anyflow_deploy.export.types import STORED, TORCH
from anyflow_deploy.export.weights import Weights, converted
from anyflow_deploy.models import Architecture
from anyflow_deploy.precision import get_precision
from anyflow_deploy.progress import Report

SMOOTH_STRENGTH = 0.5
"""alpha of SmoothQuant: how much of the difficulty moves into the weights. The paper's value for most models."""

_SMOOTH_LIMIT = 1e3
"""Factors stay within 1/this and this: a channel that calibration saw nearly silent must not be amplified without end."""

MULTIPLE = 16
"""Both sides of a quantized weight are multiples of this: what tensor cores take."""

ZERO_POINT = "zero_point"

LARGEST = {"I8": 127.0, "F8_E4M3": 448.0}
"""The largest value of each type (INT8 is used symmetrically, without -128)."""

GROUPS = {
    "attn1.output": ("attn1.to_out.0",),
    "attn2.output": ("attn2.to_out.0",),
    "attn1.input": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn2.input": ("attn2.to_q",),
    "attn2.text": ("attn2.to_k", "attn2.to_v"),
    "ffn.input": ("ffn.net.0.proj",),
    "ffn.hidden": ("ffn.net.2",),
}
"""The quantized layers of a block, by the input they share. Outputs first: smoothing them changes `to_v`."""

OPERANDS = ("query", "key", "value", "probabilities")
"""What the two products of an attention multiply."""

TEXT = "text"


@dataclass(frozen=True)
class Plan:
    """See the module's text.

    Attributes:
        kind: safetensors type of the quantized weights.
        base: precision of everything else.
        inputs: quantized layer -> name of the scale of its input; layers with one input have one scale.
        smoothed: layer -> name of the vector 1/s that the norm in front of it takes as its weight.
        attentions: attentions whose products are quantized.
        constants: scales, vectors and the zero point, by initializer name, in the type they are stored in.
        factors: parameter -> what it is multiplied by before anything else, each broadcasting to it.
        kept: candidates that are not quantized -> why.
    """

    kind: str
    base: str
    inputs: dict[str, str] = field(default_factory=dict)
    smoothed: dict[str, str] = field(default_factory=dict)
    attentions: list[str] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, list[Tensor]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def parameters(self, parameters: dict[str, Parameter]) -> dict[str, Parameter]:
        """The graph's parameters as they will be stored."""
        weights = {f"{layer}.weight" for layer in self.inputs}
        return {name: Parameter(self.kind, p.shape) if name in weights else p for name, p in parameters.items()}

    def converted(self, name: str, tensor: Tensor, kind: str) -> Tensor:
        """A parameter as it will be stored."""
        if name in self.factors:
            tensor = self.factored(name, tensor)
        if kind != self.kind:
            return converted(name, tensor, kind)
        scale = self.constants[weight_scale(name)].float()
        scaled = converted(name, tensor, "F32").div(scale.unsqueeze(1) if scale.ndim else scale)
        limit = LARGEST[kind]
        return (scaled.round_() if kind == "I8" else scaled).clamp_(-limit, limit).to(STORED[kind])

    def factored(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter in float32, multiplied by its factors."""
        tensor = tensor.to(torch.float32)
        for factor in self.factors.get(name, ()):
            tensor = tensor * factor
        return tensor


def candidates(a: Architecture) -> Iterator[str]:
    """Every layer that may be quantized."""
    for index in range(a.num_layers):
        for layers in GROUPS.values():
            yield from (f"blocks.{index}.{layer}" for layer in layers)


def weight_scale(parameter: str) -> str:
    """Name of the scale of a quantized weight."""
    return f"{parameter}_scale"


def stored_scale(amax: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The scale that maps `amax` onto a type's largest value, in the type it is stored in, never rounded down.

    Scales are normal numbers (some hardware flushes others to zero), so that nothing is divided by zero either.
    """
    wanted = amax.float() / LARGEST[kind]
    scale = wanted.to(dtype).clamp_min(torch.finfo(dtype).tiny)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    above = (scale.view(bits) + 1).view(dtype)  # the next number up, for positive ones
    return torch.where(scale.float() * LARGEST[kind] < amax.float(), above, scale)


def smoothing(inputs: Tensor, weights: Tensor) -> Tensor:
    """SmoothQuant's s, from the largest values of each channel (D) in the input and in the weights' columns."""
    s = inputs.double() ** SMOOTH_STRENGTH / weights.double() ** (1 - SMOOTH_STRENGTH)
    s[(inputs == 0) | (weights == 0)] = 1.0
    return s.clamp(1 / _SMOOTH_LIMIT, _SMOOTH_LIMIT).float()


def planned(
    weights: Weights,
    calibration: Calibration,
    precision: str,
    base: str,
    smooth: bool,
    attention: str,
    kept: Sequence[str],
    report: Report,
) -> Plan:
    """Decide.

    Args:
        weights, calibration: of one model.
        precision: "int8" or "fp8".
        base: precision of the rest.
        smooth: SmoothQuant, for int8 (fp8 has range enough for outliers).
        attention: "high" or "fp8".
        kept: names of layers to keep high; `*` stands for anything.

    Raises:
        AnyFlowError: a layer that the calibration knows nothing of, a name in `kept` that fits no layer, or nothing left
            to quantize.
    """
    plan = Plan(get_precision(precision).tensor_type, base)
    planner = _Planner(plan, weights, calibration, smooth and precision == "int8")
    planner.keep(kept)
    with report.stage("measuring weights", float(weights.architecture.num_layers)) as advance:
        for index in range(weights.architecture.num_layers):
            planner.block(f"blocks.{index}")
            advance(1)
    if attention == "fp8":
        planner.attention()
    if not plan.inputs:
        raise AnyFlowError(f"{precision} would quantize nothing: {_reasons(plan)}. Choose --precision {base}.")
    plan.constants[ZERO_POINT] = torch.zeros((), dtype=STORED[plan.kind])
    return plan


class _Planner:
    def __init__(self, plan: Plan, weights: Weights, calibration: Calibration, smooth: bool) -> None:
        self.plan, self.weights, self.calibration, self.smooth = plan, weights, calibration, smooth
        self.shapes = weights.shapes()
        self.dtype = TORCH[get_precision(plan.base).tensor_type]

    def keep(self, patterns: Sequence[str]) -> None:
        """Enter the layers that cannot or shall not be quantized."""
        names = list(candidates(self.weights.architecture))
        for pattern in patterns:
            if not (found := fnmatch.filter(names, pattern)):
                raise AnyFlowError(f"no layer is called {pattern!r}. Names are like {names[0]}; * stands for anything: *.attn2.*")
            self.plan.kept.update(dict.fromkeys(found, "asked for"))
        for name in names:
            outputs, inputs = self.shapes[f"{name}.weight"]
            if outputs % MULTIPLE or inputs % MULTIPLE:
                self.plan.kept[name] = f"its weight is {outputs} x {inputs}, and both have to be multiples of {MULTIPLE}"
            elif name not in self.plan.kept and self._range(f"{name}.input") == 0:
                self.plan.kept[name] = "its input was zero throughout the calibration"

    def _range(self, tensor: str) -> float:
        if tensor not in self.calibration.tensors:
            raise AnyFlowError(f"the calibration has no range for {tensor}: it is incomplete. Calibrate again.")
        return self.calibration.tensors[tensor].amax

    def block(self, block: str) -> None:
        """Plan the layers of a block, group by group."""
        for group, layers in GROUPS.items():
            names = [f"{block}.{layer}" for layer in layers]
            quantized = [name for name in names if name not in self.plan.kept]
            if not quantized:
                continue
            shared = TEXT if group == "attn2.text" else f"{block}.{group}"
            matrices = {n: self._matrix(n) for n in names if n in quantized or self._can_smooth(group, block)}
            amax = max(self._range(f"{name}.input") for name in quantized)
            if (s := self._smoothing(group, block, quantized, matrices)) is not None:
                amax = float((self._channels(quantized) / s).max())
                matrices = {name: matrix * s for name, matrix in matrices.items()}
                self._fold(group, block, names, s)
            self._quantize(quantized, matrices, f"{shared}_scale", amax)

    def _matrix(self, name: str) -> Tensor:
        return self.plan.factored(f"{name}.weight", self.weights.read(f"{name}.weight"))

    def _channels(self, names: Sequence[str]) -> Tensor:
        """The largest values of each input channel, over layers that share the input."""
        return torch.tensor([self.calibration.tensors[f"{name}.input"].channels for name in names]).amax(0)

    def _can_smooth(self, group: str, block: str) -> bool:
        if not self.smooth or group in ("attn2.text", "ffn.hidden"):
            return False
        return group != "attn2.input" or f"{block}.norm2.weight" in self.shapes

    def _smoothing(self, group: str, block: str, quantized: Sequence[str], matrices: dict[str, Tensor]) -> Tensor | None:
        known = all(self.calibration.tensors[f"{name}.input"].channels is not None for name in quantized)
        if not known or not self._can_smooth(group, block):
            return None
        columns = torch.stack([matrices[name].abs().amax(0) for name in quantized]).amax(0)
        return smoothing(self._channels(quantized), columns)

    def _fold(self, group: str, block: str, names: Sequence[str], s: Tensor) -> None:
        """Multiply columns by s, those of layers kept high as well, and divide whatever makes the input."""
        for name in names:
            self._factor(f"{name}.weight", s)
        if group.endswith(".output"):
            value = f"{block}.{group.removesuffix('.output')}.to_v"
            self._factor(f"{value}.weight", 1 / s.unsqueeze(1))
            self._factor(f"{value}.bias", 1 / s)
        elif group == "attn2.input":
            for part in ("weight", "bias"):
                self._factor(f"{block}.norm2.{part}", 1 / s)
        else:
            vector = f"{block}.{group}_smooth"
            self.plan.constants[vector] = 1 / s
            self.plan.smoothed.update(dict.fromkeys(names, vector))

    def _factor(self, parameter: str, factor: Tensor) -> None:
        self.plan.factors.setdefault(parameter, []).append(factor)

    def _quantize(self, names: Sequence[str], matrices: dict[str, Tensor], scale: str, amax: float) -> None:
        constants, kind = self.plan.constants, self.plan.kind
        own = stored_scale(torch.tensor(amax), kind, self.dtype)
        constants[scale] = torch.maximum(constants.get(scale, own), own)  # the text's is the same in all layers
        for name in names:
            self.plan.inputs[name] = scale
            size = matrices[name].abs()
            constants[weight_scale(f"{name}.weight")] = stored_scale(size.amax(1) if kind == "I8" else size.max(), kind, self.dtype)

    def attention(self) -> None:
        """Plan the products of every attention."""
        width = self.weights.architecture.attention_head_dim
        for index in range(self.weights.architecture.num_layers):
            for name in (f"blocks.{index}.attn1", f"blocks.{index}.attn2"):
                if width % MULTIPLE:
                    self.plan.kept[name] = f"its heads have {width} channels, and FP8 attention takes multiples of {MULTIPLE}"
                    continue
                self.plan.attentions.append(name)
                for operand in OPERANDS:
                    amax = torch.tensor(self._range(f"{name}.{operand}"))
                    self.plan.constants[f"{name}.{operand}_scale"] = stored_scale(amax, "F8_E4M3", self.dtype)


def _reasons(plan: Plan) -> str:
    return "; ".join(sorted(set(plan.kept.values()))) or "the model has no layers"
