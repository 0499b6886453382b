"""Which layers 8-bit precisions quantize, and with what scale.

PyTorch and the ONNX pass share these rules.

Candidates are the large matrix products of the blocks: queries, keys, values and outputs of both
attentions, and the two layers of the feed-forward. Everything else is small and matters much
(times, text embedding, patches, output). A candidate keeps the base precision where 8-bit kernels
do not fit it, or where calibration saw nothing but zeros.

This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable

from anyflow_deploy.errors import AnyFlowError, suggestion
from anyflow_deploy.models import Architecture
from anyflow_deploy.quantization.calibration import Calibration, TensorRange

ALIGNMENT = 16
"""Inputs and outputs of a layer have to be multiples of this for the 8-bit kernels of TensorRT and
cuBLAS."""

OPERANDS = ("query", "key", "value", "probabilities")
"""Operands of the two products of an attention; calibration names them `blocks.N.attn1.OPERAND`."""

GROUPS = (
    ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    ("attn1.to_out.0",),
    ("attn2.to_q",),
    ("attn2.to_k", "attn2.to_v"),
    ("attn2.to_out.0",),
    ("ffn.net.0.proj",),
    ("ffn.net.2",),
)
"""Candidates of a block in the network's order; a group reads one tensor, and shares its scale."""


TEXT = "text"
"""Name of the tensor that the text's keys and values read in all layers."""


def quantizable_layers(a: Architecture) -> dict[str, tuple[int, int]]:
    """Return layer name -> (inputs, outputs), in the order of the network."""
    shapes = {"ffn.net.0.proj": (a.inner_dim, a.ffn_dim), "ffn.net.2": (a.ffn_dim, a.inner_dim)}
    names = [name for group in GROUPS for name in group]
    return {
        f"blocks.{n}.{name}": shapes.get(name, (a.inner_dim, a.inner_dim))
        for n in range(a.num_layers)
        for name in names
    }


def split_layer(layer: str) -> tuple[str, str]:
    """Split `blocks.0.attn1.to_q` into `blocks.0` and `attn1.to_q`."""
    parts = layer.split(".")
    return ".".join(parts[:2]), ".".join(parts[2:])


def layer_group(layer: str) -> list[str]:
    """Return the layers that read the same tensor as this one, itself included."""
    block, name = split_layer(layer)
    return [f"{block}.{other}" for other in next(group for group in GROUPS if name in group)]


def shared_input(layer: str) -> str:
    """Return a bundle's name of a layer's input: that of the first layer that reads it.

    The text is one tensor for all layers.
    """
    first = layer_group(layer)[0]
    return TEXT if first.endswith(".attn2.to_k") else f"{first}.input"


def input_amax(calibration: Calibration, layer: str) -> float:
    """Return the range that quantizes a layer's input: the largest of its group.

    Raises:
        AnyFlowError: the calibration does not have the layer.
    """
    return max(_tensor_range(calibration, f"{name}.input").amax for name in layer_group(layer))


def input_channels(calibration: Calibration, layer: str) -> list[float]:
    """Return the range of each input channel of a layer: the largest of its group.

    Raises:
        AnyFlowError: the calibration does not have the layer.
    """
    channels = [
        _tensor_range(calibration, f"{name}.input").channels or [] for name in layer_group(layer)
    ]
    return [max(values) for values in zip(*channels, strict=True)]


def _tensor_range(calibration: Calibration, tensor: str) -> TensorRange:
    if tensor not in calibration.tensors:
        raise AnyFlowError(
            f"the calibration has no range of {tensor}. Calibrate this model: anyflow-calibrate."
        )
    return calibration.tensors[tensor]


def operand_amax(calibration: Calibration, attention: str) -> dict[str, float]:
    """Return the ranges, by name, of the operands of an attention (`blocks.0.attn1`)."""
    return {
        name: _tensor_range(calibration, name).amax
        for name in (f"{attention}.{operand}" for operand in OPERANDS)
    }


def unquantized_attentions(a: Architecture, calibration: Calibration) -> dict[str, str]:
    """Return the attentions whose products cannot be quantized -> the reason, in words.

    An attention is named `blocks.0.attn1`.
    """
    reasons = {}
    for name in (
        f"blocks.{index}.{kind}" for index in range(a.num_layers) for kind in ("attn1", "attn2")
    ):
        if a.attention_head_dim % ALIGNMENT:
            reasons[name] = (
                f"heads of {a.attention_head_dim} channels: not a multiple of {ALIGNMENT}"
            )
        elif zeros := [
            operand for operand, amax in operand_amax(calibration, name).items() if amax == 0
        ]:
            reasons[name] = f"{zeros[0].rpartition('.')[2]} was zero throughout calibration"
    return reasons


def quantized_attentions(a: Architecture, calibration: Calibration) -> list[str]:
    """Return the attentions whose products can be quantized."""
    unquantized = unquantized_attentions(a, calibration)
    names = (
        f"blocks.{index}.{kind}" for index in range(a.num_layers) for kind in ("attn1", "attn2")
    )
    return [name for name in names if name not in unquantized]


def unquantized_layers(a: Architecture, calibration: Calibration) -> dict[str, str]:
    """Return the candidates that cannot be quantized -> the reason, in words."""
    reasons = {}
    for layer, (inputs, outputs) in quantizable_layers(a).items():
        if inputs % ALIGNMENT or outputs % ALIGNMENT:
            reasons[layer] = f"{inputs} to {outputs} channels: not multiples of {ALIGNMENT}"
        elif input_amax(calibration, layer) == 0:
            reasons[layer] = "its input was zero throughout calibration"
    return reasons


def validate_layers(a: Architecture, names: Iterable[str]) -> tuple[str, ...]:
    """Check that all names are candidates, and return them.

    Raises:
        AnyFlowError: a name that is no candidate, with the nearest one.
    """
    candidates, layers = quantizable_layers(a), tuple(names)
    for name in layers:
        if name not in candidates:
            raise AnyFlowError(
                f"{name!r} is not a layer that can be quantized; those are blocks.N. attn1 and"
                " attn2 to_q, to_k, to_v, to_out.0, ffn.net.0.proj,"
                f" ffn.net.2.{suggestion(name, candidates)}"
            )
    return layers
