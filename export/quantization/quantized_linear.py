"""Eight-bit linear layers in torch, with the grids and scales of the bundle's ONNX graphs.

A layer whose weight has a scale in the bundle rounds its input to eight bits and multiplies with
torch's own operator:

- fp8: `torch._scaled_mm`, one scale on either side; tensor cores of compute capability 8.9 and up,
  oneDNN on a CPU. Sums use the tensor cores' fast accumulation (14 bits on Hopper), as torchao's
  inference does.
- int8: `torch._int_mm` into 32 bits, then the scale of the input times one scale for each output
  channel.

Layers that read one tensor round it once. Where SmoothQuant divides an input, all layers that read
it take the divided one, those kept in full precision included, since their weights were multiplied.
Scales and factors have the same names as in the bundle.

Legend: M rows of tokens, K channels in, N channels out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from anyflow_deploy.engines.torch_common.compat import multiply_fp8, multiply_int8
from anyflow_deploy.model.transformer import Linear
from anyflow_deploy.models import Architecture
from anyflow_deploy.quantization.layers import quantizable_layers, shared_input

_FP8_LARGEST = 448.0


class QuantizedInput:
    """An input that several layers read: its scale and factors, and the result of rounding it.

    The result is computed once.

    Args:
        network: holds scale and factors as buffers.
        name: of the input; its buffers end in `_scale` and `_smooth`.
        smooth: whether there are factors.
        dtype: torch's 8-bit type.
    """

    def __init__(self, network: nn.Module, name: str, smooth: bool, dtype: torch.dtype) -> None:
        self._network = network
        self._name = name
        self._smooth = smooth
        self._type = dtype
        self._smooth_cache: tuple[Tensor, Tensor] | None = None
        self._quantize_cache: tuple[Tensor, Tensor] | None = None

    @property
    def scale(self) -> Tensor:
        """Scale of the rounded input, float32, one number."""
        return self._network.get_buffer(f"{self._name}_scale").float()

    def smooth(self, x: Tensor) -> Tensor:
        """Return the input divided by SmoothQuant's factors, (M, K)."""
        if not self._smooth:
            return x
        if self._smooth_cache is None or self._smooth_cache[0] is not x:
            self._smooth_cache = (
                x,
                x * self._network.get_buffer(f"{self._name}_smooth").to(x.dtype),
            )
        return self._smooth_cache[1]

    def quantize(self, x: Tensor) -> Tensor:
        """Return the smoothed input in eight bits, (M, K)."""
        if self._quantize_cache is None or self._quantize_cache[0] is not x:
            values = self.smooth(x).float() / self.scale
            low, high = (
                (-128.0, 127.0) if self._type == torch.int8 else (-_FP8_LARGEST, _FP8_LARGEST)
            )
            if self._type == torch.int8:
                values = values.round()
            self._quantize_cache = x, values.clamp(low, high).to(self._type)
        return self._quantize_cache[1]


class EightBitLinear(nn.Module):
    """A linear layer on a `QuantizedInput`, (M, K) to (M, N) in the base's type.

    Args:
        original: the layer it replaces.
        quantized_input: its input.
        weight, scale: as stored: (N, K) in eight bits, and one number or (N).
    """

    def __init__(
        self, original: Linear, quantized_input: QuantizedInput, weight: Tensor, scale: Tensor
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
        self.register_buffer("weight_scale", torch.empty_like(scale, device="meta"))
        self.bias = original.bias
        self.input_type = original.input_type
        self.quantized_input = quantized_input

    def forward(self, x: Tensor) -> Tensor:
        quantized_x = self.quantized_input.quantize(x)
        scale = self.get_buffer("weight_scale").float()
        if self.weight.dtype == torch.int8:
            sums = multiply_int8(quantized_x, self.weight.t())
            product = (sums.float() * (self.quantized_input.scale * scale)).to(self.input_type)
        else:
            product = multiply_fp8(
                quantized_x, self.weight.t(), self.quantized_input.scale, scale, self.input_type
            )
        return product + self.bias


class SmoothedLinear(Linear):
    """A layer kept in full precision whose input SmoothQuant divides."""

    def __init__(self, original: Linear, quantized_input: QuantizedInput) -> None:
        super().__init__(
            original.in_features, original.out_features, dtype=original.input_type, device="meta"
        )
        self.requires_grad_(False)
        self.quantized_input = quantized_input

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.quantized_input.smooth(x.to(self.input_type)))


def quantize_linear_layers(
    network: nn.Module, a: Architecture, weights: Mapping[str, Tensor]
) -> None:
    """Replace a network's layers in place by those that the bundle's weights need.

    A network of another precision stays as it is.

    Args:
        network: on the meta device.
        a: its architecture.
        weights: of the bundle, by name.
    """
    quantized_layers = [
        layer for layer in quantizable_layers(a) if f"{layer}.weight_scale" in weights
    ]
    if not quantized_layers:
        return
    kind = weights[f"{quantized_layers[0]}.weight"].dtype
    quantized_inputs: dict[str, QuantizedInput] = {}
    for layer in quantizable_layers(a):
        name = shared_input(layer)
        smooth = f"{name}_smooth" in weights
        if layer not in quantized_layers and not smooth:
            continue
        quantized_input = quantized_inputs.setdefault(
            name, QuantizedInput(network, name, smooth, kind)
        )
        original = cast(Linear, network.get_submodule(layer))
        replacement: nn.Module = SmoothedLinear(original, quantized_input)
        if layer in quantized_layers:
            replacement = EightBitLinear(
                original,
                quantized_input,
                weights[f"{layer}.weight"],
                weights[f"{layer}.weight_scale"],
            )
        parent, _, attribute = layer.rpartition(".")
        setattr(network.get_submodule(parent), attribute, replacement)
    for name in (
        f"{quantized_input}_{what}"
        for quantized_input in quantized_inputs
        for what in ("scale", "smooth")
    ):
        if name in weights:
            owner, _, buffer = name.rpartition(".")
            network.get_submodule(owner).register_buffer(
                buffer, torch.empty_like(weights[name], device="meta")
            )
