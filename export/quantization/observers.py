"""Our layers with ModelOpt's quantizers.

ModelOpt (`modelopt.torch.quantization`) replaces modules by quantized ones that hold
`TensorQuantizer`s. A quantizer either records how large a tensor becomes (calibration) or rounds it
like an 8-bit engine (fake quantization). ModelOpt knows `nn.Linear` but neither our `Linear` nor
our `Attention`; both are entered in its registry here. A linear layer gets `input_quantizer` and
`weight_quantizer`; an attention gets one for each operand of its two products: `query` (scaled
already), `key`, `value` and the softmax's `probabilities`.

Quantizers belong to modules, not to graphs: whichever graph of a causal model runs a module, it
uses the same quantizer. All are off until `install_quantizers` enables them.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyflow_deploy.model.transformer import Attention, Linear
from anyflow_deploy.quantization.layers import OPERANDS

with warnings.catch_warnings():
    # On import, ModelOpt compares the versions of libraries that are not used here.
    warnings.simplefilter("ignore")
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.calib import MaxCalibrator
    from modelopt.torch.quantization.nn import (
        QuantLinearConvBase,
        QuantModule,
        QuantModuleRegistry,
        TensorQuantizer,
        register_quant_backend,
    )
    from modelopt.torch.quantization.utils import reduce_amax

_MAX_SCORES = 1 << 26
"""Scores computed at once, 256 MB in float32: a whole table of them would be 51 GB at 480x832 and
81 frames."""


@QuantModuleRegistry.register({Linear: "anyflow.Linear"})
class QuantizedLinear(QuantLinearConvBase):  # type: ignore[misc]
    """`Linear` with its input and its weight passed through quantizers."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, (rows, channels) to (rows, outputs)."""
        weight = self.weight
        return F.linear(
            self.input_quantizer(x.to(weight.dtype)), self.weight_quantizer(weight), self.bias
        )


@QuantModuleRegistry.register({Attention: "anyflow.Attention"})
class QuantizedAttention(QuantModule):  # type: ignore[misc]
    """`Attention` with the operands of its two products passed through quantizers."""

    def _setup(self) -> None:
        for name in OPERANDS:
            self._register_temp_attribute(f"{name}_quantizer", TensorQuantizer())
        self._register_temp_attribute("last_key_count", 1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend like `Attention._attend`, in pieces of rows where probabilities are quantized."""
        if not any(getattr(self, f"{name}_quantizer").is_enabled for name in OPERANDS):
            result: Tensor = super()._attend(query, key, value)
            return result
        query = self.query_quantizer((query * self.scale).to(value.dtype)).transpose(1, 2)
        key = self.key_quantizer(key).transpose(1, 2)
        value = self.value_quantizer(value).transpose(1, 2)
        rows = max(1, _MAX_SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
        pieces = [
            self._weigh(piece @ key.transpose(-1, -2), value)
            for piece in torch.split(query, rows, dim=2)
        ]
        return torch.cat(pieces, dim=2).transpose(1, 2)

    def _weigh(self, scores: Tensor, value: Tensor) -> Tensor:
        """Weigh values (B, A, L, E) by the probabilities of scores (B, A, N, L).

        Where the last key stands for n equal ones, log n on its score makes its probability the
        sum of theirs; the observer then sees that of one.
        """
        if self.last_key_count == 1:
            rounded: Tensor = self.probabilities_quantizer(torch.softmax(scores, dim=-1))
            return rounded @ value
        scores[..., -1] += math.log(self.last_key_count)
        probabilities = torch.softmax(scores, dim=-1)
        result = probabilities @ value
        probabilities[..., -1] /= self.last_key_count
        self.probabilities_quantizer(probabilities)
        return result


class MaxObserver(MaxCalibrator):  # type: ignore[misc]
    """The largest absolute value of a tensor.

    ModelOpt's own observer stops with an assertion at the first infinity, which does not name the
    tensor, and waits for the device three times a tensor to find it. This one keeps infinities and
    NaN, so that the reader can name the tensor.
    """

    def __init__(self, axis: int | None) -> None:
        super().__init__(8, axis, False)
        self._calib_amax: Tensor | None = None

    def collect(self, x: Tensor) -> None:
        """Include one tensor, of any shape."""
        if self._axis is None:
            smallest, largest = torch.aminmax(x.detach())  # one pass; reduce_amax makes two
            largest = torch.maximum(smallest.abs(), largest.abs()).reshape(-1)
        else:
            rest = tuple(range(x.dim() - 1))
            largest = reduce_amax(x, axis=rest, keepdims=False).detach().reshape(-1)
        self._calib_amax = (
            largest if self._calib_amax is None else torch.maximum(self._calib_amax, largest)
        )


def install_quantizers(network: nn.Module, entries: list[dict[str, Any]]) -> None:
    """Convert a network to ModelOpt's quantizers, in place; those that no entry names stay off.

    Args:
        network: of `export.transformer` or `export.causal`; converted at the first call, configured
            at every one.
        entries: as in ModelOpt's `quant_cfg`, in order: `quantizer_name` (a pattern) and `cfg`.
    """
    config = {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *entries], "algorithm": None}
    # ModelOpt prints, and standard output is for programs.
    with contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(network, config)


def insert_observers(
    network: nn.Module, layers: Iterable[str], last_text_count: int = 1
) -> dict[str, MaxObserver]:
    """Make the quantizers record maxima, and round nothing.

    Args:
        network: see `install_quantizers`.
        layers: linear layers whose inputs are observed, by channel; every attention's operands are
            observed, too.
        last_text_count: how many equal rows of text the last one stands for, see
            `prompts.collapse_padding`.

    Returns:
        The observers of the largest values, by the names of `Calibration.tensors`.
    """
    by_channel = [
        _quantizer_config(f"{layer}.input_quantizer", calibrator=(MaxObserver, (-1,)))
        for layer in layers
    ]
    operands = [
        _quantizer_config(f"blocks.*.attn?.{name}_quantizer", calibrator=(MaxObserver, (None,)))
        for name in OPERANDS
    ]
    install_quantizers(network, by_channel + operands)
    for name, module in network.named_modules():
        if name.endswith(".attn2"):
            module.last_key_count = last_text_count
    observers = {}
    for name, quantizer in quantizers(network, "*").items():
        if quantizer.is_enabled:
            quantizer.disable_quant()
            quantizer.enable_calib()
            observers[name.removesuffix("_quantizer")] = quantizer._calibrator
    return observers


def insert_fake_quant(
    network: nn.Module,
    layers: Mapping[str, tuple[float, Tensor | None]],
    operands: Mapping[str, float],
    bits: int | tuple[int, int],
    weight_axis: int | None,
) -> dict[str, tuple[Any, Any]]:
    """Make the quantizers round.

    Args:
        network: see `install_quantizers`.
        layers: each quantized layer's input: its amax, and SmoothQuant's factors s where there are
            some.
        operands: amax of the attention operands to be rounded: `blocks.0.attn1.query`.
        bits, weight_axis: ModelOpt's `num_bits`, and the `axis` of a weight's scales.

    Returns:
        By layer, the quantizers of its input and of its weight, to be switched on and off.
    """
    grid = {"num_bits": bits, "backend": GRID_BACKEND}
    entries = [_quantizer_config(f"{layer}.input_quantizer", **grid) for layer in layers]
    entries += [
        _quantizer_config(f"{layer}.weight_quantizer", axis=weight_axis, **grid) for layer in layers
    ]
    install_quantizers(
        network, entries + [_quantizer_config(f"{name}_quantizer", **grid) for name in operands]
    )
    for name, amax in operands.items():
        _set_range(network.get_submodule(f"{name}_quantizer"), torch.tensor(amax), None)
    pairs = {}
    for layer, (amax, smooth) in layers.items():
        module: Any = network.get_submodule(layer)
        weight = (
            module.weight if smooth is None else module.weight * smooth.to(module.weight.device)
        )
        rest = None if weight_axis is None else 1
        _set_range(
            module.input_quantizer, torch.tensor(amax), None if smooth is None else 1 / smooth
        )
        _set_range(module.weight_quantizer, reduce_amax(weight, axis=rest, keepdims=True), smooth)
        pairs[layer] = (module.input_quantizer, module.weight_quantizer)
    return pairs


def _set_range(quantizer: Any, amax: Tensor, factors: Tensor | None) -> None:
    """Set the range that a quantizer rounds in, and the factors it multiplies by first."""
    quantizer.reset_amax()
    quantizer.amax = amax
    if hasattr(quantizer, "_pre_quant_scale"):
        del quantizer._pre_quant_scale
    if factors is not None:
        quantizer.pre_quant_scale = factors.to(amax.device)
    quantizer.disable_calib()
    quantizer.enable_quant()


def _fake_quantize(x: Tensor, quantizer: Any) -> Tensor:
    """Round like ONNX's QuantizeLinear and DequantizeLinear.

    They divide by the scale, and saturate at the type's ends.

    ModelOpt multiplies by the scale's inverse instead, which now and then rounds to the neighbour
    (one value moved a layer by 1e-4, measured), and saturates INT8 at -127, where inputs beyond
    their calibrated range then differ (5e-4).
    """
    is_int8 = quantizer.num_bits == 8
    largest = 127.0 if is_int8 else 448.0
    amax = quantizer.amax.to(x.device)
    scale = torch.where(amax > 0, amax, largest) / largest
    if is_int8:
        return (x / scale).round().clamp(-128, 127) * scale
    return (x / scale).clamp(-largest, largest).to(torch.float8_e4m3fn).to(x.dtype) * scale


GRID_BACKEND = "anyflow.grid"
register_quant_backend(GRID_BACKEND, _fake_quantize)


def _quantizer_config(pattern: str, **attributes: Any) -> dict[str, Any]:
    return {"quantizer_name": pattern, "cfg": attributes}


def quantizers(network: nn.Module, pattern: str) -> dict[str, Any]:
    """Return the `TensorQuantizer`s whose name matches a pattern, by name."""
    modules = {n: m for n, m in network.named_modules() if isinstance(m, TensorQuantizer)}
    return {name: modules[name] for name in fnmatch.filter(modules, pattern)}
