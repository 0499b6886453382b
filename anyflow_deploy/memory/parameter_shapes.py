"""List every parameter of a model by name and shape, without building the model.

`model.transformer` and `model.causal` define the parameters and need torch to say how many there
are. Here the same list follows from the numbers of an `Architecture` alone, so that a device
without torch can tell how much memory a model takes; a test compares the two lists for every
model.

A parameter is stored in one of three ways (`storage_kind`): the large layers of the blocks can be
FP8 or INT8; their biases and the text projection stay in the base type; everything else is float32
in every precision.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Literal

from anyflow_deploy.models import Architecture

StorageKind = Literal["blocks", "base", "float32"]
Shapes = Iterator[tuple[str, tuple[int, ...]]]

_LARGE = re.compile(r"^blocks\.\d+\.(attn[12]\.to_|ffn\.)")
_TEXT = "condition_embedder.text_embedder."


def parameter_shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every parameter, named as in the checkpoint."""
    d = a.inner_dim
    shapes = dict(_convolution("patch_embedding", a, a.patch_size))
    if a.compressed_patch_size is not None:
        shapes.update(_convolution("far_patch_embedding", a, a.compressed_patch_size))
    for name, inputs in (("time", a.freq_dim), ("delta", a.freq_dim), ("text", a.text_dim)):
        shapes.update(_linear(f"condition_embedder.{name}_embedder.linear_1", inputs, d))
        shapes.update(_linear(f"condition_embedder.{name}_embedder.linear_2", d, d))
    shapes.update(_linear("condition_embedder.time_proj", d, 6 * d))
    for index in range(a.num_layers):
        shapes.update(_block(f"blocks.{index}", a))
    shapes.update(_linear("proj_out", d, a.out_channels * math.prod(a.patch_size)))
    shapes["scale_shift_table"] = (1, 2, d)
    return shapes


def storage_kind(name: str) -> StorageKind:
    """Return how the parameter of this name is stored: one of the module's three ways."""
    if _LARGE.match(name):
        return "blocks" if name.endswith(".weight") else "base"
    return "base" if name.startswith(_TEXT) else "float32"


def count_parameters(a: Architecture) -> dict[StorageKind, int]:
    """Count the numbers in all parameters of each kind."""
    result: dict[StorageKind, int] = {"blocks": 0, "base": 0, "float32": 0}
    for name, shape in parameter_shapes(a).items():
        result[storage_kind(name)] += math.prod(shape)
    return result


def count_quantized_channels(a: Architecture) -> int:
    """Count the output channels of the layers that may be quantized.

    Each has a scale of its own.
    """
    return sum(
        shape[0] for name, shape in parameter_shapes(a).items() if storage_kind(name) == "blocks"
    )


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _convolution(name: str, a: Architecture, patch: tuple[int, int, int]) -> Shapes:
    yield f"{name}.weight", (a.inner_dim, a.in_channels, *patch)
    yield f"{name}.bias", (a.inner_dim,)


def _block(name: str, a: Architecture) -> Shapes:
    d = a.inner_dim
    for attention in ("attn1", "attn2"):
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            yield from _linear(f"{name}.{attention}.{layer}", d, d)
        yield f"{name}.{attention}.norm_q.weight", (d,)
        yield f"{name}.{attention}.norm_k.weight", (d,)
    if a.cross_attn_norm:
        yield f"{name}.norm2.weight", (d,)
        yield f"{name}.norm2.bias", (d,)
    yield from _linear(f"{name}.ffn.net.0.proj", d, a.ffn_dim)
    yield from _linear(f"{name}.ffn.net.2", a.ffn_dim, d)
    yield f"{name}.scale_shift_table", (1, 6, d)
