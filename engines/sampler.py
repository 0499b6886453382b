"""The sampling loop, for every backend and every schedule.

    z_0 = sample(engine, noise((1, 21, 16, 60, 104), seed=0), text, Schedule.uniform(4))

There is nothing to it, and that is the point of a flow map: no noise is added between steps and no guidance is run, so
a sample is N transitions and depends on nothing but its inputs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from anyflow_deploy.engines.adaptive_steps import Quality, refined
from anyflow_deploy.engines.deadline import Deadline, Route
from anyflow_deploy.engines.engine import Array, Engine, Run, checked_array, checked_text
from anyflow_deploy.engines.kv_cache import CachePlan, cache_plan
from anyflow_deploy.errors import ShapeError
from anyflow_deploy.schedule import TRAIN_TIMESTEPS, Schedule

Course = Schedule | Deadline | Quality
"""What decides the times a sample passes through: they are given, or follow from the time there is, or from a quality."""


@dataclass(frozen=True)
class Step:
    """A transition that was just made.

    Attributes:
        index: 0 for the first.
        steps: how many there are; under a deadline, how many are planned by now; on the way to a quality, of this try.
        t, r: where it went from and to, in timesteps.
        read: fetches the state z_r; on a GPU this is a copy, so call it only when you look at it.
    """

    index: int
    steps: int
    t: float
    r: float
    read: Callable[[], Array]


def sample(
    engine: Engine,
    latents: ArrayLike,
    text: ArrayLike,
    schedule: Course,
    on_step: Callable[[Step], None] | None = None,
) -> Array:
    """Take latents from noise to clean.

    Args:
        engine: from `load_engine`.
        latents: noise, (B, F, C, H, W).
        text: prompt embeddings, (B, L, D).
        schedule: the times to pass through, the time there is, or the quality to reach.
        on_step: called after each transition; an exception it raises ends the sampling and reaches the caller.

    Returns:
        Clean latents, float32 (B, F, C, H, W); the same inputs give the same bits on the same engine.

    Raises:
        AnyFlowError: inputs outside what the engine declares.
    """
    return _made(lambda: engine.start(latents, text), schedule, on_step, np.shape(latents))


def _made(start: Callable[[], Run], schedule: Course, on_step: Callable[[Step], None] | None, shape: tuple[int, ...]) -> Array:
    """One sample; `start` opens a run at its noise."""
    if isinstance(schedule, Quality):
        return refined(lambda steps: _made(start, steps, on_step, shape), schedule)
    with start() as run:
        if isinstance(schedule, Deadline):
            return _in_time(run, Route(schedule, shape), on_step)
        for index, (t, r) in enumerate(schedule.transitions):
            run.step(t, r)
            if on_step is not None:
                on_step(Step(index, schedule.steps, t, r, run.read))
        return run.read()


def _in_time(run: Run, route: Route, on_step: Callable[[Step], None] | None) -> Array:
    """As many transitions as fit; see `deadline`."""
    draft = None
    if not route.known:
        velocity: list[Array] = []
        route.timed(lambda: velocity.append(run.velocity(TRAIN_TIMESTEPS, 0.0)))
        draft = velocity[0]
    while route.t > 0.0:
        t, r = route.t, route.next()
        if draft is not None and (route.made, r) == (0, 0.0):  # the draft made this very transition
            clean: Array = run.read() - draft
            route.ended(1, draft=False)
            if on_step is not None:
                on_step(Step(0, 1, t, r, clean.copy))
            return clean
        route.timed(lambda: run.step(t, r))  # noqa: B023 - called at once
        route.went(r)
        if on_step is not None:
            on_step(Step(route.made - 1, route.planned, t, r, run.read))
    clean = run.read()
    route.ended(route.made, draft is not None)
    return clean


@dataclass(frozen=True)
class Chunk:
    """A finished piece of a streamed video.

    Attributes:
        index: 0 for the first.
        first_frame: absolute index of its first latent frame.
        latents: float32 (1, frames, C, H, W).
        given: it is context of the caller's, not made here.
    """

    index: int
    first_frame: int
    latents: Array
    given: bool


def stream(
    engine: Engine,
    latents: ArrayLike,
    text: ArrayLike,
    schedule: Course | Callable[[int], Course],
    chunk_plan: Sequence[int] | None = None,
    context: ArrayLike | None = None,
    window: int | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Generator[Chunk, None, None]:
    """Make a video chunk by chunk with a causal model.

    The next chunk is not begun before the one before it was taken; closing the iterator at any moment releases the cache.

    Args:
        engine: from `load_engine`, of a causal model.
        latents: noise of the whole video, (1, F, C, H, W).
        text: prompt embeddings, (1, L, D).
        schedule: one for all chunks, or a function from a chunk's index to its schedule, asked when the chunk begins
            (`adaptive_steps.first_chunk_decides` makes one).
        chunk_plan: latent frames of each chunk; None for the model's own.
        context: clean latents of the first chunk or chunks, (1, Fc, C, H, W); they are remembered, not made.
        window: keep only the first and this many of the newest compressed chunks; None for all. See `kv_cache`.
        on_step: called after each transition, see `sample`.

    Returns:
        An iterator over the chunks, the given ones included.

    Raises:
        AnyFlowError: a plan that does not sum to F, or a context that does not end where a chunk ends. Raised at once.
    """
    z = checked_array("latents", latents)
    if z.ndim != 5 or z.shape[0] != 1:
        raise ShapeError(f"latents have shape {z.shape}; a stream takes (1, frames, channels, height, width): one video.")
    architecture = engine.architecture
    words = checked_text(engine.ranges, architecture.text_dim, text)
    plan = cache_plan(architecture, chunk_plan, z.shape[3], z.shape[4], window, words.shape[1])
    if plan.frames != z.shape[1]:
        raise ShapeError(
            f"the chunk plan {list(plan.chunks)} has {plan.frames} latent frames and latents have {z.shape[1]}; "
            "give a chunk_plan that sums to the frames."
        )
    for frames in sorted(set(plan.chunks)):
        engine.ranges.check((1, frames, *z.shape[2:]), words.shape)
    given = _given_chunks(plan, z, context)
    return _chunks(engine, z, words, schedule if callable(schedule) else lambda _: schedule, plan, given, on_step)


def _given_chunks(plan: CachePlan, latents: Array, context: ArrayLike | None) -> list[Array]:
    """The context, cut into chunks."""
    if context is None:
        return []
    clean = checked_array("context", context)
    if clean.ndim != 5 or clean.shape[0] != 1 or clean.shape[2:] != latents.shape[2:] or clean.shape[1] > plan.frames:
        raise ShapeError(
            f"context has shape {clean.shape} and latents {latents.shape}; only the frames may differ, and be fewer."
        )
    borders = [plan.first_frame(chunk) for chunk in range(1, len(plan.chunks) + 1)]
    if clean.shape[1] not in borders:
        raise ShapeError(
            f"context has {clean.shape[1]} latent frames, which is not where a chunk ends ({borders}). "
            "Shorten it, or give a chunk_plan whose first chunks it fills."
        )
    count = borders.index(clean.shape[1]) + 1
    return [clean[:, plan.first_frame(c) : plan.first_frame(c + 1)] for c in range(count)]


def _chunks(
    engine: Engine,
    latents: Array,
    text: Array,
    schedule: Callable[[int], Course],
    plan: CachePlan,
    given: list[Array],
    on_step: Callable[[Step], None] | None,
) -> Generator[Chunk, None, None]:
    with contextlib.closing(engine.open_stream(text, plan)) as memory:
        for index in range(len(plan.chunks)):
            first = plan.first_frame(index)
            if index < len(given):
                clean = np.ascontiguousarray(given[index])
            else:
                noise_of_chunk = np.ascontiguousarray(latents[:, first : plan.first_frame(index + 1)])
                start = functools.partial(memory.start, noise_of_chunk)
                clean = _made(start, schedule(index), on_step, noise_of_chunk.shape)
            yield Chunk(index, first, clean.copy(), index < len(given))
            if index + 1 < len(plan.chunks):
                memory.remember(clean)


def noise(shape: Sequence[int], seed: int) -> Array:
    """Standard normal latents that are the same on every machine, with or without torch.

    numpy's PCG64 in double precision, rounded to float32. (torch's generator gives other numbers for the same seed.)
    """
    return np.random.default_rng(seed).standard_normal(tuple(shape)).astype(np.float32)
