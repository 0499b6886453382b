"""Samples and streams, for every backend and every `StepPolicy`.

    z_0 = sample(engine, noise((1, 21, 16, 60, 104), seed=0), text, Schedule.uniform(4))

A flow map needs no noise between steps and no guidance, so a sample is N transitions and depends on
nothing but its inputs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from anyflow_deploy.engines.engine import Array, Engine, prepare_array, prepare_text
from anyflow_deploy.engines.kv_cache import CachePlan, cache_plan
from anyflow_deploy.engines.step_policy import StepPolicy
from anyflow_deploy.errors import ShapeError
from anyflow_deploy.schedule import Step


def sample(
    engine: Engine,
    latents: ArrayLike,
    text: ArrayLike,
    policy: StepPolicy,
    on_step: Callable[[Step], None] | None = None,
) -> Array:
    """Take latents from noise to clean.

    Args:
        engine: from `load_engine`.
        latents: noise, (B, F, C, H, W).
        text: prompt embeddings, (B, L, D).
        policy: the times to pass through (`Schedule`), the time there is (`Deadline`), or the
            quality to reach (`AdaptiveSteps`).
        on_step: called after each transition; an exception it raises ends the sampling and reaches
            the caller.

    Returns:
        Clean latents, float32 (B, F, C, H, W); the same inputs give the same bits on the same
        engine.

    Raises:
        AnyFlowError: inputs outside what the engine declares.
    """
    return policy.run(lambda: engine.start(latents, text), np.shape(latents), on_step or _ignore)


def _ignore(step: Step) -> None:
    """Do nothing with a step."""


@dataclass(frozen=True)
class Chunk:
    """A finished part of a streamed video.

    Attributes:
        index: 0 for the first.
        first_frame: absolute index of its first latent frame.
        latents: float32 (1, frames, C, H, W).
        given: whether the caller gave it as context, so that it was not generated.
    """

    index: int
    first_frame: int
    latents: Array
    given: bool


def stream(
    engine: Engine,
    latents: ArrayLike,
    text: ArrayLike,
    policy: StepPolicy,
    chunk_plan: Sequence[int] | None = None,
    context: ArrayLike | None = None,
    window: int | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Generator[Chunk, None, None]:
    """Generate a video chunk by chunk with a causal model.

    A chunk is generated when the iterator is asked for it, not earlier. Closing the iterator at any
    moment releases the cache.

    Args:
        engine: from `load_engine`, of a causal model.
        latents: noise of the whole video, (1, F, C, H, W).
        text: prompt embeddings, (1, L, D).
        policy: decides the steps, see `sample`; each chunk gets `policy.for_chunk(index)`, where 0
            is the first generated chunk.
        chunk_plan: latent frames of each chunk; None for the model's own.
        context: clean latents of the first chunk or chunks, (1, Fc, C, H, W); they enter the cache
            and are not generated.
        window: keep only the first and this many of the newest compressed chunks; None for all. See
            `kv_cache`.
        on_step: called after each transition, see `sample`.

    Returns:
        An iterator over the chunks, those of the context included.

    Raises:
        AnyFlowError: a plan that does not sum to F, or a context that does not end where a chunk
            ends. Raised at once.
    """
    z = prepare_array("latents", latents)
    if z.ndim != 5 or z.shape[0] != 1:
        raise ShapeError(
            f"latents have shape {z.shape}; a stream takes (1, frames, channels, height, width):"
            " one video."
        )
    architecture = engine.architecture
    prompt_embeds = prepare_text(engine.ranges, architecture.text_dim, text)
    plan = cache_plan(
        architecture, chunk_plan, z.shape[3], z.shape[4], window, prompt_embeds.shape[1]
    )
    if plan.frames != z.shape[1]:
        raise ShapeError(
            f"the chunk plan {list(plan.chunks)} has {plan.frames} latent frames and latents have"
            f" {z.shape[1]}; give a chunk_plan that sums to the frames."
        )
    for frames in sorted(set(plan.chunks)):
        engine.ranges.check((1, frames, *z.shape[2:]), prompt_embeds.shape)
    clean_chunks = _split_context(plan, z, context)
    return _generate_chunks(
        engine, z, prompt_embeds, policy, plan, clean_chunks, on_step or _ignore
    )


def _split_context(plan: CachePlan, latents: Array, context: ArrayLike | None) -> list[Array]:
    """Cut the context into chunks of the plan."""
    if context is None:
        return []
    clean = prepare_array("context", context)
    if (
        clean.ndim != 5
        or clean.shape[0] != 1
        or clean.shape[2:] != latents.shape[2:]
        or clean.shape[1] > plan.frames
    ):
        raise ShapeError(
            f"context has shape {clean.shape} and latents {latents.shape}; only the frames may"
            " differ, and be fewer."
        )
    chunk_ends = [plan.first_frame(chunk) for chunk in range(1, len(plan.chunks) + 1)]
    if clean.shape[1] not in chunk_ends:
        raise ShapeError(
            f"context has {clean.shape[1]} latent frames, which is not where a chunk ends"
            f" ({chunk_ends}). Shorten it, or give a chunk_plan whose first chunks it fills."
        )
    count = chunk_ends.index(clean.shape[1]) + 1
    return [clean[:, plan.first_frame(c) : plan.first_frame(c + 1)] for c in range(count)]


def _generate_chunks(
    engine: Engine,
    latents: Array,
    text: Array,
    policy: StepPolicy,
    plan: CachePlan,
    context_chunks: list[Array],
    on_step: Callable[[Step], None],
) -> Generator[Chunk, None, None]:
    with contextlib.closing(engine.open_stream(text, plan)) as kv_stream:
        for index in range(len(plan.chunks)):
            first = plan.first_frame(index)
            if index < len(context_chunks):
                clean = np.ascontiguousarray(context_chunks[index])
            else:
                chunk_noise = np.ascontiguousarray(latents[:, first : plan.first_frame(index + 1)])
                start = functools.partial(kv_stream.start, chunk_noise)
                chunk_policy = policy.for_chunk(index - len(context_chunks))
                clean = chunk_policy.run(start, chunk_noise.shape, on_step)
            yield Chunk(index, first, clean.copy(), index < len(context_chunks))
            if index + 1 < len(plan.chunks):
                kv_stream.append(clean)


def noise(shape: Sequence[int], seed: int) -> Array:
    """Return standard normal latents, float32, the same on every machine for one seed.

    They come from numpy's PCG64 in double precision, rounded to float32. torch's generator gives
    other numbers for the same seed.
    """
    return np.random.default_rng(seed).standard_normal(tuple(shape)).astype(np.float32)
