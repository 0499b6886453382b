"""One shape, measured: warm-up, clips of every number of steps in turn, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import numpy as np

from anyflow_deploy.profiling.power import Source
from anyflow_deploy.profiling.record import Chunks, Clip, Point
from anyflow_deploy.profiling.sampler import Sampler
from anyflow_deploy.profiling.summary_statistics import latency_from_samples
from anyflow_deploy.profiling.timed_engine import Watched
from anyflow_deploy.profiling.timing import Rules, Taken, measured, warmed_up
from anyflow_deploy.profiling.workload import ChunkTimes, Video, clip
from anyflow_deploy.progress import Report

FPS_FACTOR = 4
"""Video frames of a latent frame; the video's first latent frame has one."""


def measured_point(
    engine: Watched, video: Video, steps: Sequence[int], rules: Rules, sampler: Sampler, powers: Sequence[Source], report: Report
) -> Point:
    """Measure one shape.

    Args:
        engine: what runs.
        video: the shape.
        steps: numbers of steps.
        rules: how long.
        sampler, powers: running meanwhile.
        report: for progress.
    """
    counts = sorted(set(steps))
    times = {count: ChunkTimes([], []) for count in counts}
    with report.stage(f"{video.shape}: warm-up"):
        warm_up = warmed_up(clip(engine, video, counts[0], None), engine.steps, rules)
        for count in counts[1:]:
            clip(engine, video, count, None)()
    engine.steps.clear()
    engine.remembered.clear()
    last: list[float] = []
    cases = {count: _noting_last(engine, video, count, times[count], last) for count in counts}
    taken = measured(cases, rules, report, f"{video.shape}: rounds")
    transitions = list(engine.steps)
    engine.steps.clear()
    return Point(
        shape=str(video.shape),
        latents=list(video.latents.shape),
        frames=video.frames,
        tokens=_tokens(video, engine),
        text_tokens=video.text.shape[1],
        warm_up=warm_up,
        transition=latency_from_samples(transitions),
        largest_transition=median(last),
        enqueue=None,
        clips=[_clip(video, count, taken, sampler, powers) for count in counts],
        fixed_seconds=_fixed(taken, counts),
        chunks=[_chunks(video, count, times[count]) for count in counts] if video.plan is not None else [],
        roofline=None,
    )


def _noting_last(engine: Watched, video: Video, count: int, into: ChunkTimes, last: list[float]) -> Callable[[], None]:
    """A clip, and the time of the transition that had the fullest cache."""
    run = clip(engine, video, count, into)

    def noted() -> None:
        run()
        last.append(engine.steps[_largest(video, count)])

    return noted


def _largest(video: Video, steps: int) -> int:
    """Index, from the end, of a transition of the chunk with the most tokens in and before it."""
    if video.plan is None:
        return -1
    plan = video.plan
    sizes = [frames * plan.full_tokens * (1 + sum(plan.cached_tokens(index))) for index, frames in enumerate(plan.chunks)]
    return -1 - steps * (len(sizes) - 1 - int(np.argmax(sizes)))


def _tokens(video: Video, engine: Watched) -> int:
    patch = engine.architecture.patch_size[1]
    frames, height, width = video.largest
    return frames * (height // patch) * (width // patch)


def _clip(video: Video, steps: int, taken: Taken, sampler: Sampler, powers: Sequence[Source]) -> Clip:
    latency = latency_from_samples(taken.seconds(steps))
    rate = video.frames / latency.median
    joules = {source.name: sampler.joules(source.name, taken.spans[steps]) / latency.count for source in powers}
    return Clip(
        steps=steps, latency=latency, frames_per_second=rate, real_time_factor=rate / video.fps,
        joules={name: value for name, value in joules.items() if value > 0},
    )  # fmt: skip


def _fixed(taken: Taken, counts: Sequence[int]) -> float | None:
    """The straight line's value at no steps; a flow map's clip is that and a transition for each step."""
    if len(counts) < 2:
        return None
    medians = [median(taken.seconds(count)) for count in counts]
    return float(np.polyfit(counts, medians, 1)[1])


def _chunks(video: Video, steps: int, times: ChunkTimes) -> Chunks:
    assert video.plan is not None
    plan, rows = video.plan, times.rows
    by_index = [median(row[index] for row in rows) for index in range(len(plan.chunks))]
    frames = [FPS_FACTOR * count for count in plan.chunks]
    frames[0] -= FPS_FACTOR - 1
    later = [seconds for row in rows for seconds in row[1:]]
    factors = [count / seconds / video.fps for count, seconds in zip(frames[1:], by_index[1:], strict=True)]
    return Chunks(
        steps=steps,
        first=latency_from_samples([row[0] for row in rows]),
        later=latency_from_samples(later) if later else None,
        by_index=by_index,
        remember=latency_from_samples(times.remembered) if times.remembered else None,
        frames=frames,
        cached_tokens=[sum(plan.cached_tokens(index)) for index in range(len(plan.chunks))],
        worst_real_time_factor=min(factors, default=frames[0] / by_index[0] / video.fps),
    )
