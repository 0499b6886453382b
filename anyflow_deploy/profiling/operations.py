"""Count what a transition computes and reads, from the architecture alone.

These are the numerators of a roofline.

Matrix products are counted, two operations for each multiplication with addition, since nothing
else costs a processor with matrix units as much; a test compares the count with the exported
graphs. Bytes are those that no engine can avoid: every weight once, the cache once, the state in
and out. Activations may stay on the chip, so they do not count, and the bound stays a bound.

Legend: N tokens of a step, M cached tokens, L text tokens, D channels of the residual stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from anyflow_deploy.engines.kv_cache import CachePlan
from anyflow_deploy.memory.parameter_shapes import count_parameters, count_quantized_channels
from anyflow_deploy.models import Architecture
from anyflow_deploy.precision import EIGHT_BIT, PRECISIONS


@dataclass(frozen=True)
class ComputeTypes:
    """The types in which a precision computes its products.

    Attributes:
        linear: the blocks' linear layers.
        attention: both products of every attention.
        base: everything else that is not float32.
    """

    linear: str
    attention: str
    base: str


def compute_types(precision: str, base: str, attention: str = "high") -> ComputeTypes:
    """Return the types of a bundle; `attention` is the manifest's, "high" or "fp8"."""
    linear = precision if precision in EIGHT_BIT else base
    return ComputeTypes(linear, base if attention == "high" else attention, base)


@dataclass(frozen=True)
class ComputeCost:
    """Operations by type, and bytes that have to move."""

    operations: dict[str, float]
    bytes: float

    def __add__(self, other: ComputeCost) -> ComputeCost:
        kinds = sorted({*self.operations, *other.operations})
        operations = {
            kind: self.operations.get(kind, 0.0) + other.operations.get(kind, 0.0) for kind in kinds
        }
        return ComputeCost(operations, self.bytes + other.bytes)

    def scale(self, count: int) -> ComputeCost:
        """Return the cost of doing it `count` times."""
        return ComputeCost(
            {kind: count * value for kind, value in self.operations.items()}, count * self.bytes
        )


def transition_cost(
    a: Architecture,
    types: ComputeTypes,
    shape: tuple[int, int, int],
    text: int,
    past: int = 0,
    with_text: bool = True,
) -> ComputeCost:
    """Count one transition of one video.

    Args:
        a: the architecture.
        types: types of the products.
        shape: latent frames, rows, columns of the step.
        text: L, text tokens.
        past: M, cached tokens of a causal model.
        with_text: whether the text's keys and values are made, too. A causal model makes them once
            for each video (`text_cost`).
    """
    frames, height, width = shape
    tokens, d = _tokens(a, shape), a.inner_dim
    # q, k, v and out; the text's query and out; feed-forward.
    linear = 2 * tokens * a.num_layers * (6 * d * d + 2 * d * a.ffn_dim)
    attention = 4 * tokens * d * a.num_layers * (tokens + past + text)
    patch = math.prod(a.patch_size)
    pixels = math.prod(a.patch_size) * a.out_channels
    wide = 2 * tokens * d * (a.in_channels * patch + pixels) + _times_operations(a, frames)
    cost = ComputeCost(
        _sum_by_type((types.linear, linear), (types.attention, attention), ("fp32", wide)), 0.0
    )
    state = 4 * 3 * a.in_channels * frames * height * width  # z_t in, z_r and the velocity out
    cache = 2 * a.num_layers * past * d * PRECISIONS[types.base].bytes
    traffic = ComputeCost({}, weight_bytes(a, types, with_text) + state + cache)
    return cost + traffic + (text_cost(a, types, text) if with_text else ComputeCost({}, 0.0))


def text_cost(a: Architecture, types: ComputeTypes, text: int) -> ComputeCost:
    """Count the text's projection, and its keys and values in every layer."""
    d = a.inner_dim
    projection = 2 * text * (a.text_dim * d + d * d)
    return ComputeCost(
        _sum_by_type((types.linear, 2 * text * a.num_layers * 2 * d * d), (types.base, projection)),
        4.0 * text * a.text_dim,
    )


def append_cost(
    a: Architecture, types: ComputeTypes, tokens: int, past: int, text: int
) -> ComputeCost:
    """Count the keys and values of a clean chunk in all layers.

    That is everything up to the last layer's projections.
    """
    d, layers = a.inner_dim, a.num_layers - 1
    linear = 2 * tokens * (layers * (6 * d * d + 2 * d * a.ffn_dim) + 2 * d * d)
    attention = 4 * tokens * d * layers * (tokens + past + text)
    return ComputeCost(
        _sum_by_type((types.linear, linear), (types.attention, attention)),
        weight_bytes(a, types, False),
    )


def stream_costs(
    a: Architecture, types: ComputeTypes, plan: CachePlan, sides: tuple[int, int], steps: int
) -> list[ComputeCost]:
    """Count every chunk of a causal video.

    A chunk costs its transitions, and caching the chunk before it.
    """
    result = []
    for index, frames in enumerate(plan.chunks):
        past = sum(plan.cached_tokens(index))
        cost = transition_cost(
            a, types, (frames, *sides), plan.text_tokens, past, with_text=False
        ).scale(steps)
        cost = (
            cost + text_cost(a, types, plan.text_tokens)
            if index == 0
            else cost + _append_costs(a, types, plan, index - 1)
        )
        result.append(cost)
    return result


def _append_costs(a: Architecture, types: ComputeTypes, plan: CachePlan, chunk: int) -> ComputeCost:
    """Count the caching of a chunk.

    It enters the cache in full. Where an older chunk falls out of the recent ones, that chunk is
    compressed, and all recent ones enter again.
    """
    cost = ComputeCost({}, 0.0)
    compressed_tokens = plan.compressed_tokens * sum(
        plan.chunks[c] for c in plan.kept_chunks(chunk + 1)
    )
    if chunk < plan.recent:
        before = plan.full_tokens * sum(plan.chunks[:chunk])
        return append_cost(
            a, types, plan.full_tokens * plan.chunks[chunk], before, plan.text_tokens
        )
    old = chunk - plan.recent
    tokens = plan.compressed_tokens * plan.chunks[old]
    cost = cost + append_cost(a, types, tokens, compressed_tokens - tokens, plan.text_tokens)
    past = compressed_tokens
    for recent in range(old + 1, chunk + 1):
        tokens = plan.full_tokens * plan.chunks[recent]
        cost = cost + append_cost(a, types, tokens, past, plan.text_tokens)
        past += tokens
    return cost


def weight_bytes(a: Architecture, types: ComputeTypes, with_text: bool = True) -> float:
    """Return the bytes of all weights, in the types they are stored in.

    Without `with_text`, those of the text's keys and values do not count.
    """
    number = count_parameters(a)
    base = PRECISIONS[types.base].bytes
    large = PRECISIONS[types.linear].bytes
    scales = 4 * count_quantized_channels(a) if types.linear in EIGHT_BIT else 0
    total = large * number["blocks"] + base * number["base"] + 4 * number["float32"] + scales
    return float(
        total
        if with_text
        else total - large * a.num_layers * 2 * a.inner_dim**2 - base * a.text_dim * a.inner_dim
    )


def _tokens(a: Architecture, shape: tuple[int, int, int]) -> int:
    return shape[0] * (shape[1] // a.patch_size[1]) * (shape[2] // a.patch_size[2])


def _times_operations(a: Architecture, frames: int) -> int:
    """Count two time embeddings of two layers, and their projection to six modulations."""
    d = a.inner_dim
    return 2 * frames * (2 * (a.freq_dim * d + d * d) + d * 6 * d)


def _sum_by_type(*rows: tuple[str, float]) -> dict[str, float]:
    result: dict[str, float] = {}
    for kind, value in rows:
        result[kind] = result.get(kind, 0.0) + value
    return result
