"""Estimate whether a model fits a device, before it is downloaded, exported or built.

What a transition needs is the sum of four things:

- **weights**, by the type each parameter is stored in (`parameter_shapes.py`); a causal model has
  two graphs, and runtimes give each its own copy;
- **activations**: the most that is alive at once, in the attention or in the feed-forward of one
  block, and the keys and values of the text, which runtimes like to compute for all blocks first;
- **cache**: the keys and values that a causal model keeps (`engines/kv_cache.py`);
- **workspace**: the runtime itself, and a margin on the activations.

Activations are counted in *tables*, one number for every token and channel. How many tables are
alive was read off the graph and then set by measuring ONNX Runtime on the CPU; docs/how-to/fit.md
has the measurements and how far off this is. On GPUs the same count is used without having been
measured there.

Legend: N tokens of a step, M cached tokens, L text tokens, D channels of the residual stream.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from anyflow_deploy.engines.kv_cache import CachePlan, cache_plan, fit_chunks
from anyflow_deploy.errors import AnyFlowError, suggestion
from anyflow_deploy.memory.parameter_shapes import count_parameters, count_quantized_channels
from anyflow_deploy.models import SPATIAL_FACTOR, TEMPORAL_FACTOR, TEXT_TOKENS, Architecture
from anyflow_deploy.precision import EIGHT_BIT, PRECISIONS
from anyflow_deploy.shape_ranges import latent_frames, latent_side
from anyflow_deploy.targets import Target

FIT_PRECISIONS = tuple(PRECISIONS)

FLOAT32_TABLES = 9
"""Tables in float32 at the peak, in either half of a block: the residual stream, norms, modulation,
rotation."""

ATTENTION_TABLES = 8
"""Tables in the compute type during attention: queries, keys, values and result, and the copies
that the kernel reorders."""

HIDDEN_TABLES = {"fp32": 3, "fp16": 7, "int8": 4, "fp8": 4}
"""Tables of the feed-forward's width on the CPU, float32. GELU works in a copy; fp16 is converted
there and back around each product; in int8 and fp8 there is one more, for the rounded values."""

GPU_HIDDEN_TABLES = 2
"""On a GPU, in the compute type: GELU's input and output."""

CPU_HALF_BYTES = 5
"""Bytes that a 16-bit weight takes in ONNX Runtime on a CPU: it is kept in float32, and the
unpacking leaves gaps."""

CPU_FP8_BYTES = 4
"""Bytes of an FP8 weight there: it is float32 once the session is made. INT8 stays in one byte."""

MARGIN = 0.15
"""Share of the activations that a runtime's memory pool loses between its pieces, as measured
(docs/how-to/fit.md)."""

RUNTIME = 100_000_000
"""Bytes of the runtime itself: its code, Python, numpy."""

UMT5_XXL_PARAMETERS = 5_680_910_336
"""Parameters of Wan's text encoder: 24 layers of 4096 channels, a vocabulary of 256,384 words."""

WAN_VAE_PARAMETERS = 126_892_531
"""Parameters of Wan's VAE, encoder and decoder."""


@dataclass(frozen=True)
class LatentShape:
    """Size of a video in latent frames, rows and columns."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        frames = (self.frames - 1) * TEMPORAL_FACTOR + 1
        return f"{self.height * SPATIAL_FACTOR}x{self.width * SPATIAL_FACTOR}x{frames}"

    def tokens(self, a: Architecture) -> int:
        """Count the tokens of the whole video."""
        return self.frames * (self.height // a.patch_size[1]) * (self.width // a.patch_size[2])


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of weights, activations, cache and workspace, as the module's text explains.

    Attributes:
        score_table: further bytes of attention in a runtime that writes its scores to memory; not
            in `total`.
    """

    weights: int
    activations: int
    cache: int
    workspace: int
    score_table: int

    @property
    def total(self) -> int:
        """Sum of all parts, with attention that keeps its scores on the chip."""
        return self.weights + self.activations + self.cache + self.workspace


def shape_from_pixels(text: str, a: Architecture) -> LatentShape:
    """Parse `"480x832x81"` (height, width, frames) into latent units.

    Raises:
        AnyFlowError: not three numbers, or sizes the model cannot make.
    """
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise AnyFlowError(
            f"--shape is {text!r}; allowed is HEIGHTxWIDTHxFRAMES, such as 480x832x81."
        )
    height, width, frames = map(int, parts)
    patch = (a.compressed_patch_size or a.patch_size)[1]
    sides = (
        latent_side(n, SPATIAL_FACTOR, patch, axis)
        for n, axis in ((height, "height"), (width, "width"))
    )
    return LatentShape(latent_frames(frames, TEMPORAL_FACTOR), *sides)


def base_type(precision: str, target: Target) -> str:
    """Return the type of the large tensors that are not 8 bits wide.

    With an 8-bit precision it is the target's natural type: fp32 on a CPU, fp16 on a GPU.
    """
    if precision not in EIGHT_BIT:
        return precision
    return "fp32" if target.compute_capability is None else "fp16"


def estimate_memory(
    a: Architecture, precision: str, target: Target, shape: LatentShape, window: int | None = None
) -> MemoryEstimate:
    """Estimate the bytes that one transition takes, batch 1.

    Args:
        a: the architecture.
        precision: one of `FIT_PRECISIONS`. `check_precision` says whether the target runs it.
        target: decides the base type and what is alive at once.
        shape: of the whole video; a causal model makes it chunk by chunk.
        window: of a causal model's cache, see `engines/kv_cache.py`.

    Raises:
        AnyFlowError: an unknown precision, or a window for a model without a cache.
    """
    _check_arguments(a, precision, window)
    plan = _plan_cache(a, shape, window)
    activations, scores = _activation_bytes(a, precision, target, shape, plan)
    element = 4 if base_type(precision, target) == "fp32" else 2
    return MemoryEstimate(
        weights=weight_bytes(a, precision, target),
        activations=activations,
        cache=plan.bytes(element) if plan else 0,
        workspace=RUNTIME + round(MARGIN * activations),
        score_table=scores,
    )


def weight_bytes(a: Architecture, precision: str, target: Target) -> int:
    """Return the bytes of the weights in the target's memory."""
    base = 4 if base_type(precision, target) == "fp32" else 2
    if target.compute_capability is None and base == 2:
        base = CPU_HALF_BYTES
    large, scales = (1, 4 * count_quantized_channels(a)) if precision in EIGHT_BIT else (base, 0)
    if target.compute_capability is None and precision == "fp8":
        large = CPU_FP8_BYTES
    number = count_parameters(a)
    one = large * number["blocks"] + base * number["base"] + 4 * number["float32"] + scales
    return one * (2 if a.causal else 1)


def available_memory(target: Target) -> int:
    """Return the bytes that a model may take on a target.

    That is the built-in memory less what the system keeps; for the CPU, this machine's memory.
    """
    if target.memory is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return target.memory - target.system_memory


def companion_weights(target: Target) -> dict[str, int]:
    """Return the bytes, by name, of the models that run before and after, not meanwhile."""
    element = 4 if target.compute_capability is None else 2
    return {
        "text encoder (UMT5-XXL)": element * UMT5_XXL_PARAMETERS,
        "VAE (Wan)": 4 * WAN_VAE_PARAMETERS,
    }


def _check_arguments(a: Architecture, precision: str, window: int | None) -> None:
    if precision not in FIT_PRECISIONS:
        names = ", ".join(FIT_PRECISIONS)
        raise AnyFlowError(
            f"unknown precision {precision!r}: known are"
            f" {names}.{suggestion(precision, FIT_PRECISIONS)}"
        )
    if window is not None and not a.causal:
        raise AnyFlowError(
            "a window is kept in the cache of a causal model (far-…); leave --window out."
        )


def _plan_cache(a: Architecture, shape: LatentShape, window: int | None) -> CachePlan | None:
    """Plan the cache for as many of the model's own chunks as the video has."""
    if a.chunk_partition is None:
        return None
    return cache_plan(
        a, fit_chunks(a.chunk_partition, shape.frames), shape.height, shape.width, window
    )


def _activation_bytes(
    a: Architecture, precision: str, target: Target, shape: LatentShape, plan: CachePlan | None
) -> tuple[int, int]:
    """Return the bytes at the peak, and those of the scores if attention writes them out."""
    tokens, cache_tokens = _count_tokens(a, shape, plan)
    on_cpu, d = target.compute_capability is None, a.inner_dim
    size = 4 if on_cpu or precision == "fp32" else 2
    # Keys and values joined to the cache, twice.
    copies = 0 if plan is None else 2 * tokens + 4 * cache_tokens
    attention = FLOAT32_TABLES * 4 * tokens + ATTENTION_TABLES * size * tokens + copies * size
    hidden = HIDDEN_TABLES.get(precision, 7) if on_cpu else GPU_HIDDEN_TABLES
    # The 8-bit copy of a product's input.
    rounded_bytes = 1 if precision in EIGHT_BIT and not on_cpu else 0
    feed_forward = (
        FLOAT32_TABLES * 4 * tokens * d + (hidden * size + rounded_bytes) * tokens * a.ffn_dim
    )
    text = TEXT_TOKENS * (4 * a.text_dim + 2 * size * d * a.num_layers)
    state = 3 * 4 * a.in_channels * math.prod((shape.frames, shape.height, shape.width))
    scores = 2 * size * a.num_attention_heads * tokens * (tokens + cache_tokens)
    return max(attention * d, feed_forward) + text + state, scores


def _count_tokens(a: Architecture, shape: LatentShape, plan: CachePlan | None) -> tuple[int, int]:
    """Count the tokens of the largest step, and those it finds in the cache."""
    if plan is None:
        return shape.tokens(a), 0
    return plan.full_tokens * max(plan.chunks), plan.capacity
