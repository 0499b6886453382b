"""Which layers 8-bit precisions touch, and with what scale: the rules that PyTorch and the ONNX pass share.

Candidates are the large matrix products of the blocks: queries, keys, values and outputs of both attentions, and the two
layers of the feed-forward. Everything else is small and matters much (times, text embedding, patches, output). A
candidate stays high where 8-bit kernels do not fit it, or where calibration saw nothing but zeros.

This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable

from anyflow_deploy.calibration import Calibration
from anyflow_deploy.errors import AnyFlowError, suggestion
from anyflow_deploy.models import Architecture

ALIGNMENT = 16
"""Inputs and outputs of a layer have to be multiples of this for the 8-bit kernels of TensorRT and cuBLAS."""

_PROJECTIONS = ("to_q", "to_k", "to_v")
_ATTENTION = (*_PROJECTIONS, "to_out.0")


def candidates(a: Architecture) -> dict[str, tuple[int, int]]:
    """Layer name -> (inputs, outputs), in the order of the network."""
    d, found = a.inner_dim, {}
    for block in range(a.num_layers):
        for attention in ("attn1", "attn2"):
            found.update({f"blocks.{block}.{attention}.{name}": (d, d) for name in _ATTENTION})
        found[f"blocks.{block}.ffn.net.0.proj"] = (d, a.ffn_dim)
        found[f"blocks.{block}.ffn.net.2"] = (a.ffn_dim, d)
    return found


def input_amax(calibration: Calibration, layer: str) -> float:
    """The range that a layer's input is quantized with.

    The three projections of one attention share one, the largest of theirs, so that an engine can fuse them.

    Raises:
        AnyFlowError: the calibration does not know the layer.
    """
    parent, _, name = layer.rpartition(".")
    layers = [f"{parent}.{p}" for p in _PROJECTIONS] if name in _PROJECTIONS else [layer]
    missing = [n for n in layers if f"{n}.input" not in calibration.tensors]
    if missing:
        raise AnyFlowError(f"the calibration has no range of {missing[0]}.input. Calibrate this model: anyflow-calibrate.")
    return max(calibration.tensors[f"{n}.input"].amax for n in layers)


def staying_high(a: Architecture, calibration: Calibration) -> dict[str, str]:
    """Candidates that cannot be quantized -> the reason, in words."""
    found = {}
    for layer, (inputs, outputs) in candidates(a).items():
        if inputs % ALIGNMENT or outputs % ALIGNMENT:
            found[layer] = f"{inputs} to {outputs} channels: not multiples of {ALIGNMENT}"
        elif input_amax(calibration, layer) == 0:
            found[layer] = "its input was zero throughout calibration"
    return found


def checked_layers(a: Architecture, names: Iterable[str]) -> tuple[str, ...]:
    """Names of candidates, as given.

    Raises:
        AnyFlowError: one that is none, with the nearest that is.
    """
    allowed, given = candidates(a), tuple(names)
    for name in given:
        if name not in allowed:
            raise AnyFlowError(
                f"{name!r} is no layer that is quantized; those are blocks.N. attn1 and attn2 to_q, to_k, to_v, to_out.0, "
                f"ffn.net.0.proj, ffn.net.2.{suggestion(name, allowed)}"
            )
    return given
