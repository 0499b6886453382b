"""Plans which layers are quantized, and with which scales, before any graph is traced.

Candidates are the linear layers of the blocks. A layer's input range comes from the calibration and
its weights' ranges from the weights. These are read once here, a group of layers with one input at
a time, and only vectors of them are kept. All graphs of a bundle are rewritten from one plan
(`qdq_pass`), and so are the weights (`weights`).

SmoothQuant (arXiv 2211.10438, equation 4) divides the input of a layer by a vector s and multiplies
its weight's columns by it, so that channels with outliers no longer set the scale of all others.
The division costs nothing where it can be folded into the operation that computes the input: a
norm, or the rows of `to_v` (attention mixes tokens, never channels). It is skipped for the text,
which all layers share, and for the input of `ffn.net.2`, which comes out of a GELU.

Legend: D channels in, N channels out of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anyflow_deploy.checkpoints.dtypes import BUNDLE_DTYPES, CHECKPOINT_DTYPES
from anyflow_deploy.checkpoints.weights import ParameterSpec, Weights, convert_parameter
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.precision import PrecisionSpec, get_precision
from anyflow_deploy.progress import Progress
from anyflow_deploy.quantization.calibration import Calibration
from anyflow_deploy.quantization.layers import (
    GROUPS,
    input_amax,
    input_channels,
    operand_amax,
    quantized_attentions,
    shared_input,
    split_layer,
    unquantized_attentions,
    unquantized_layers,
    validate_layers,
)

SMOOTH_STRENGTH = 0.5
"""alpha of SmoothQuant: the share of the outliers that moves into the weights. This is the paper's
value for most models."""

_SMOOTH_LIMIT = 1e3
"""Factors lie between 1/this and this: a channel with nearly no values in calibration must not be
amplified without bound."""

ZERO_POINT = "zero_point"

LARGEST = {"I8": 127.0, "F8_E4M3": 448.0}
"""The value that a range is mapped onto (INT8 also has -128, which only inputs beyond their range
reach)."""

_OUTPUTS = ("attn1.to_out.0", "attn2.to_out.0")
_UNFOLDED = ("attn2.to_k", "ffn.net.2")
"""The first layers of groups for whose input the division cannot be folded; see the module."""


@dataclass(frozen=True)
class QuantizationPlan:
    """The layers that are quantized, and their scales and factors.

    Attributes:
        kind: safetensors type of the quantized weights.
        base: precision of everything else.
        inputs: by quantized layer, the name of the scale of its input; layers with one input have
            one scale.
        norm_weights: by layer, the name of the vector 1/s that the norm in front of it takes as its
            weight.
        attentions: attentions whose products are quantized.
        constants: scales, vectors and the zero point, by initializer name, in the type they are
            stored in.
        smooth: by layer, SmoothQuant's s (K) that its input is divided by.
        factors: by parameter, the factors that it is multiplied by first, each of which broadcasts
            to it.
        full_precision_layers: by candidate that is not quantized, the reason.
    """

    kind: str
    base: str
    inputs: dict[str, str] = field(default_factory=dict)
    norm_weights: dict[str, str] = field(default_factory=dict)
    attentions: list[str] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    smooth: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, list[Tensor]] = field(default_factory=dict)
    full_precision_layers: dict[str, str] = field(default_factory=dict)

    def convert_specs(self, parameters: dict[str, ParameterSpec]) -> dict[str, ParameterSpec]:
        """Return the graph's parameters with the types they are stored in."""
        weights = {f"{layer}.weight" for layer in self.inputs}
        return {
            name: ParameterSpec(self.kind, p.shape) if name in weights else p
            for name, p in parameters.items()
        }

    def convert_parameter(self, name: str, tensor: Tensor, kind: str) -> Tensor:
        """Convert a parameter to the values and type it is stored in."""
        if name in self.factors:
            tensor = self.apply_factors(name, tensor)
        if kind != self.kind:
            return convert_parameter(name, tensor, kind)
        scale = self.constants[weight_scale_name(name)].float()
        values = convert_parameter(name, tensor, "F32").div(
            scale.unsqueeze(1) if scale.ndim else scale
        )
        limit = LARGEST[kind]
        return (
            (values.round_() if kind == "I8" else values)
            .clamp_(-limit, limit)
            .to(BUNDLE_DTYPES[kind])
        )

    def apply_factors(self, name: str, tensor: Tensor) -> Tensor:
        """Return a parameter in float32, multiplied by its factors."""
        tensor = tensor.to(torch.float32)
        for factor in self.factors.get(name, ()):
            tensor = tensor * factor
        return tensor


def weight_scale_name(parameter: str) -> str:
    """Return the name of the scale of a quantized weight."""
    return f"{parameter}_scale"


def zero_points_name(channels: int) -> str:
    """Return the name of the zero points of a weight with a scale per output channel.

    ONNX Runtime's fusion needs them.
    """
    return f"{ZERO_POINT}s.{channels}"


def scale_from_amax(amax: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Return the scale that maps `amax` onto a type's largest value, never rounded down.

    It has the type it is stored in.

    Scales are normal numbers (some hardware flushes others to zero), so that nothing is divided by
    zero either.
    """
    exact_scale = amax.float() / LARGEST[kind]
    scale = exact_scale.to(dtype).clamp_min(torch.finfo(dtype).tiny)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    next_scale = (scale.view(bits) + 1).view(dtype)  # the next number up, for positive ones
    return torch.where(scale.float() * LARGEST[kind] < amax.float(), next_scale, scale)


def smoothquant_factors(inputs: Tensor, weights: Tensor) -> Tensor:
    """Return SmoothQuant's factors s (D), float32.

    They come from the largest values of each channel in the input and in the weights' columns.
    """
    s = inputs.double() ** SMOOTH_STRENGTH / weights.double() ** (1 - SMOOTH_STRENGTH)
    s[(inputs == 0) | (weights == 0)] = 1.0
    return s.clamp(1 / _SMOOTH_LIMIT, _SMOOTH_LIMIT).float()


def plan_quantization(
    weights: Weights,
    calibration: Calibration,
    spec: PrecisionSpec,
    full_precision_layers: Sequence[str],
    progress: Progress,
) -> QuantizationPlan:
    """Plan which layers of a model are quantized, and with which scales.

    Args:
        weights, calibration: of one model.
        spec: a quantized precision, complete.
        full_precision_layers: names of layers to keep in the base's precision.
        progress: shows the progress of the work.

    Raises:
        AnyFlowError: a layer without a range in the calibration, a name in `full_precision_layers`
            that fits no layer, or nothing left to quantize.
    """
    a = weights.architecture
    plan = QuantizationPlan(get_precision(spec.precision).tensor_type, spec.base)
    plan.full_precision_layers.update(
        {
            **unquantized_layers(a, calibration),
            **dict.fromkeys(validate_layers(a, full_precision_layers), "asked for"),
        }
    )
    planner = _QuantizationPlanner(plan, weights, calibration, spec.smooth)
    with progress.stage("measuring weights", float(a.num_layers)) as advance:
        for index in range(a.num_layers):
            for group in _GROUP_ORDER:
                planner.plan_group([f"blocks.{index}.{layer}" for layer in group])
            advance(1)
    if spec.attention == "fp8":
        planner.plan_attention()
    if not plan.inputs:
        raise AnyFlowError(
            f"{spec.precision} would quantize nothing: {_reasons(plan)}. Choose --precision"
            f" {spec.base}."
        )
    plan.constants[ZERO_POINT] = torch.zeros((), dtype=BUNDLE_DTYPES[plan.kind])
    return plan


class _QuantizationPlanner:
    def __init__(
        self, plan: QuantizationPlan, weights: Weights, calibration: Calibration, smooth: bool
    ) -> None:
        self.plan = plan
        self.weights = weights
        self.calibration = calibration
        self.smooth = smooth
        self.shapes = weights.shapes()
        self.dtype = CHECKPOINT_DTYPES[get_precision(plan.base).tensor_type]

    def plan_group(self, names: Sequence[str]) -> None:
        """Plan the layers that share one input."""
        to_quantize = [name for name in names if name not in self.plan.full_precision_layers]
        if not to_quantize:
            return
        smooth = self._can_smooth(names[0])
        matrices = {name: self._matrix(name) for name in (names if smooth else to_quantize)}
        amax = input_amax(self.calibration, names[0])
        if smooth:
            channels = torch.tensor(input_channels(self.calibration, names[0]))
            s = smoothquant_factors(
                channels, torch.stack([matrices[name].abs().amax(0) for name in names]).amax(0)
            )
            s = torch.minimum(s, self._max_smoothing(names[0]))
            amax = float((channels / s).max())
            matrices = {name: matrix * s for name, matrix in matrices.items()}
            self._fold(names, s)
        self._quantize(to_quantize, matrices, f"{shared_input(names[0])}_scale", amax)

    def _matrix(self, name: str) -> Tensor:
        return self.plan.apply_factors(f"{name}.weight", self.weights.read(f"{name}.weight"))

    def _can_smooth(self, first: str) -> bool:
        block, layer = split_layer(first)
        if not self.smooth or layer in _UNFOLDED or not input_channels(self.calibration, first):
            return False
        return layer != "attn2.to_q" or f"{block}.norm2.weight" in self.shapes

    def _max_smoothing(self, first: str) -> Tensor:
        """Return how far smoothing an output may divide the rows of its `to_v`.

        A row whose scale would not be a normal number any more loses levels. Only float16 comes
        near that (a row below 0.0078); it is 1 where a row is as small by itself.
        """
        block, layer = split_layer(first)
        if layer not in _OUTPUTS:
            return torch.tensor(torch.inf)
        rows = self._matrix(f"{block}.{layer.removesuffix('.to_out.0')}.to_v").abs().amax(1)
        return (rows / (LARGEST[self.plan.kind] * torch.finfo(self.dtype).tiny)).clamp_min(1.0)

    def _check_range(self, name: str, amax: float) -> None:
        """Refuse a tensor that overflows the base, which would reach its quantizer as infinity."""
        top = torch.finfo(self.dtype).max
        if amax > top:
            raise AnyFlowError(
                f"{name} reached {amax:.3g} in calibration, more than {self.plan.base} holds"
                f" ({top:.6g}). Choose --base bf16 or fp32, or keep that layer with --keep-layers."
            )

    def _fold(self, names: Sequence[str], s: Tensor) -> None:
        """Multiply the layers' columns by s, and divide the weights that compute their input.

        That includes layers kept in full precision.
        """
        block, first = split_layer(names[0])
        self.plan.smooth.update(dict.fromkeys(names, s))
        for name in names:
            self._add_factor(f"{name}.weight", s)
        if first in _OUTPUTS:
            value = f"{block}.{first.removesuffix('.to_out.0')}.to_v"
            self._add_factor(f"{value}.weight", 1 / s.unsqueeze(1))
            self._add_factor(f"{value}.bias", 1 / s)
        elif first == "attn2.to_q":
            for part in ("weight", "bias"):
                self._add_factor(f"{block}.norm2.{part}", 1 / s)
        else:
            vector = f"{shared_input(names[0])}_smooth"
            self.plan.constants[vector] = 1 / s
            self.plan.norm_weights.update(dict.fromkeys(names, vector))

    def _add_factor(self, parameter: str, factor: Tensor) -> None:
        self.plan.factors.setdefault(parameter, []).append(factor)

    def _quantize(
        self, names: Sequence[str], matrices: dict[str, Tensor], scale: str, amax: float
    ) -> None:
        constants, kind = self.plan.constants, self.plan.kind
        self._check_range(f"the input of {names[0]}", amax)
        range_scale = scale_from_amax(torch.tensor(amax), kind, self.dtype)
        # The text's is the same in all layers
        constants[scale] = torch.maximum(constants.get(scale, range_scale), range_scale)
        for name in names:
            self.plan.inputs[name] = scale
            size = matrices[name].abs()
            if kind == "I8":
                constants[zero_points_name(len(size))] = torch.zeros(len(size), dtype=torch.int8)
            constants[weight_scale_name(f"{name}.weight")] = scale_from_amax(
                size.amax(1) if kind == "I8" else size.max(), kind, self.dtype
            )

    def plan_attention(self) -> None:
        """Plan the products of every attention.

        Raises:
            AnyFlowError: none of them can be quantized.
        """
        a = self.weights.architecture
        self.plan.full_precision_layers.update(unquantized_attentions(a, self.calibration))
        self.plan.attentions.extend(quantized_attentions(a, self.calibration))
        for name in self.plan.attentions:
            for operand, amax in operand_amax(self.calibration, name).items():
                self._check_range(operand, amax)
                self.plan.constants[f"{operand}_scale"] = scale_from_amax(
                    torch.tensor(amax), "F8_E4M3", self.dtype
                )
        if not self.plan.attentions:
            raise AnyFlowError(
                f"attention fp8 would quantize nothing: {_reasons(self.plan)}. Choose --attention"
                " high."
            )


_GROUP_ORDER = sorted(GROUPS, key=lambda group: group[0] not in _OUTPUTS)
"""Outputs first: smoothing them changes `to_v`, whose scales are computed later."""


def _reasons(plan: QuantizationPlan) -> str:
    return "; ".join(sorted(set(plan.full_precision_layers.values()))) or "the model has no layers"
