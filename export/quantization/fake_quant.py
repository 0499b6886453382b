"""8-bit arithmetic in PyTorch: the results of an engine with Q/DQ nodes, without an engine.

Every quantized layer rounds its input and its weight to the 8-bit grid and back, and multiplies in
float32. The grids:

- int8: whole numbers from -127 to 127. Inputs one scale a tensor, weights one scale an output
  channel; scale = amax / 127.
- fp8 (E4M3): one scale a tensor for both; scale = amax / 448, the format's largest number.

An input's amax comes from the calibration, a weight's from the weight itself; `layers` has the
rules. Attention stays in full precision; fp8 can also round the operands of its two products.

Layers are switched on and off by a flag in each quantizer, which costs nothing, and sensitivity
depends on that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.export.quantization.modelopt_loader import load_modelopt
from anyflow_deploy.models import Architecture
from anyflow_deploy.quantization.calibration import Calibration
from anyflow_deploy.quantization.layers import (
    input_amax,
    input_channels,
    operand_amax,
    quantizable_layers,
    unquantized_layers,
    validate_layers,
)


@dataclass(frozen=True)
class QuantizationGrid:
    """A precision in ModelOpt's terms.

    Bits are exponent and mantissa for floats; the axis is that of a weight's scales.
    """

    bits: int | tuple[int, int]
    weight_axis: int | None


GRIDS = {"int8": QuantizationGrid(8, 0), "fp8": QuantizationGrid((4, 3), None)}


class FakeQuant:
    """A network whose layers round as an 8-bit engine's do; converts the network in place.

    Args:
        network: `FlowMapTransformer`, or `ChunkTransition` for a causal model.
        a: its architecture.
        calibration: of its weights.
        precision: "int8" or "fp8".
        full_precision_layers: layers that are not quantized.
        smooth: SmoothQuant's factors s (K) by layer, one for each input channel. The input is
            divided by s before it is rounded, and the weight's columns multiplied. Layers of one
            group need the same.
        attention: attentions whose products round their operands, fp8 only: by name
            (`blocks.0.attn1`, see `quantized_attentions`), or "attn1" and "attn2" for those of all
            blocks.

    Attributes:
        layers: those that can be quantized, in the network's order.
        excluded: by layer that cannot be quantized, the reason.

    Raises:
        AnyFlowError: another precision, an unknown layer in `full_precision_layers`, or a
            calibration that lacks a tensor.
        BackendError: ModelOpt is not installed.
    """

    def __init__(
        self,
        network: nn.Module,
        a: Architecture,
        calibration: Calibration,
        precision: str,
        full_precision_layers: Collection[str] = (),
        smooth: Mapping[str, Tensor] | None = None,
        attention: Collection[str] = (),
    ) -> None:
        grid = get_grid(precision, attention)
        self.excluded = unquantized_layers(a, calibration)
        self.layers = tuple(name for name in quantizable_layers(a) if name not in self.excluded)
        self._architecture = a
        scales = {
            name: _input_range(calibration, name, (smooth or {}).get(name)) for name in self.layers
        }
        operands = {
            name: amax
            for p in _select_attentions(a, attention)
            for name, amax in operand_amax(calibration, p).items()
            if amax
        }
        self._pairs = load_modelopt().insert_fake_quant(
            network, scales, operands, grid.bits, grid.weight_axis
        )
        self.keep_layers(full_precision_layers)

    def keep_layers(self, full_precision_layers: Collection[str]) -> None:
        """Quantize every layer but these."""
        full_precision = set(validate_layers(self._architecture, full_precision_layers))
        self.quantize_only([name for name in self.layers if name not in full_precision])

    def quantize_only(self, layers: Collection[str]) -> None:
        """Quantize exactly these layers; every other one computes in float32."""
        for name in validate_layers(self._architecture, layers):
            if name in self.excluded:
                raise AnyFlowError(
                    f"{name} cannot be quantized ({self.excluded[name]}). Leave it out."
                )
        enabled_names = set(layers)
        for name, pair in self._pairs.items():
            for quantizer in pair:
                if name in enabled_names:
                    quantizer.enable()
                else:
                    quantizer.disable()


def _select_attentions(a: Architecture, attention: Collection[str]) -> list[str]:
    names = (f"blocks.{n}.{kind}" for n in range(a.num_layers) for kind in ("attn1", "attn2"))
    return [name for name in names if name in attention or name.rpartition(".")[2] in attention]


def get_grid(precision: str, attention: Collection[str] = ()) -> QuantizationGrid:
    """Return the grid of a precision.

    Raises:
        AnyFlowError: the precision has no grid, or quantized attention is not allowed in it.
    """
    if precision not in GRIDS:
        raise AnyFlowError(
            f"precision is {precision!r}; those that round layers to 8 bits are"
            f" {' and '.join(GRIDS)}."
        )
    if attention and precision != "fp8":
        raise AnyFlowError(
            f"{precision} attention does not exist beyond 512 tokens; quantized attention is"
            " allowed in fp8 only."
        )
    return GRIDS[precision]


def _input_range(
    calibration: Calibration, layer: str, smooth: Tensor | None
) -> tuple[float, Tensor | None]:
    """Return the range of a layer's input after smoothing, and the factors."""
    if smooth is None:
        return input_amax(calibration, layer), None
    return float((torch.tensor(input_channels(calibration, layer)) / smooth.cpu()).max()), smooth
