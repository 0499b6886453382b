"""Measure one shape: warm-up, then clips of every number of steps in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import numpy as np

from anyflow_deploy.models import TEMPORAL_FACTOR
from anyflow_deploy.profiling.power import PowerSource
from anyflow_deploy.profiling.record import ChunkLatencies, ClipLatency, Point
from anyflow_deploy.profiling.sampler import ResourceSampler
from anyflow_deploy.profiling.summary_statistics import latency_from_samples
from anyflow_deploy.profiling.timed_engine import TimedEngine
from anyflow_deploy.profiling.timing import TimedRuns, TimingRules, measure_cases, run_warm_up
from anyflow_deploy.profiling.workload import ChunkTimes, VideoWorkload, make_clip_run
from anyflow_deploy.progress import Progress


def measure_point(
    engine: TimedEngine,
    video: VideoWorkload,
    steps: Sequence[int],
    rules: TimingRules,
    sampler: ResourceSampler,
    powers: Sequence[PowerSource],
    progress: Progress,
) -> Point:
    """Measure one shape.

    Args:
        engine: the engine, timed.
        video: the shape.
        steps: numbers of steps.
        rules: how long to measure.
        sampler: reads power meanwhile.
        powers: the sampler's power sources.
        progress: shows warm-up and rounds.
    """
    counts = sorted(set(steps))
    times = {count: ChunkTimes([], []) for count in counts}
    with progress.stage(f"{video.shape}: warm-up"):
        warm_up = run_warm_up(make_clip_run(engine, video, counts[0], None), engine.steps, rules)
        for count in counts[1:]:
            make_clip_run(engine, video, count, None)()
    engine.steps.clear()
    engine.append_seconds.clear()
    last_step_seconds: list[float] = []
    cases = {
        count: _make_recorded_run(engine, video, count, times[count], last_step_seconds)
        for count in counts
    }
    timed_runs = measure_cases(cases, rules, progress, f"{video.shape}: rounds")
    transitions = list(engine.steps)
    engine.steps.clear()
    return Point(
        shape=str(video.shape),
        latents=list(video.latents.shape),
        frames=video.frames,
        tokens=_count_tokens(video, engine),
        text_tokens=video.text.shape[1],
        warm_up=warm_up,
        transition=latency_from_samples(transitions),
        largest_transition=median(last_step_seconds),
        enqueue=None,
        clips=[_clip_record(video, count, timed_runs, sampler, powers) for count in counts],
        fixed_seconds=_fixed_seconds(timed_runs, counts),
        chunks=(
            [_chunks_record(video, count, times[count]) for count in counts]
            if video.plan is not None
            else []
        ),
        roofline=None,
    )


def _make_recorded_run(
    engine: TimedEngine,
    video: VideoWorkload,
    count: int,
    chunk_times: ChunkTimes,
    last_step_seconds: list[float],
) -> Callable[[], None]:
    """Return a function that runs a clip and records its largest transition's time."""
    run = make_clip_run(engine, video, count, chunk_times)

    def run_and_record() -> None:
        run()
        last_step_seconds.append(engine.steps[_largest_step_index(video, count)])

    return run_and_record


def _largest_step_index(video: VideoWorkload, steps: int) -> int:
    """Return the index, from the end, of a transition of the chunk with the most tokens."""
    if video.plan is None:
        return -1
    plan = video.plan
    sizes = [
        frames * plan.full_tokens * (1 + sum(plan.cached_tokens(index)))
        for index, frames in enumerate(plan.chunks)
    ]
    return -1 - steps * (len(sizes) - 1 - int(np.argmax(sizes)))


def _count_tokens(video: VideoWorkload, engine: TimedEngine) -> int:
    patch = engine.architecture.patch_size[1]
    frames, height, width = video.largest_step
    return frames * (height // patch) * (width // patch)


def _clip_record(
    video: VideoWorkload,
    steps: int,
    timed_runs: TimedRuns,
    sampler: ResourceSampler,
    powers: Sequence[PowerSource],
) -> ClipLatency:
    latency = latency_from_samples(timed_runs.seconds(steps))
    rate = video.frames / latency.median
    joules = {
        source.name: sampler.joules(source.name, timed_runs.spans[steps]) / latency.count
        for source in powers
    }
    return ClipLatency(
        steps=steps,
        latency=latency,
        frames_per_second=rate,
        real_time_factor=rate / video.fps,
        joules={name: value for name, value in joules.items() if value > 0},
    )


def _fixed_seconds(timed_runs: TimedRuns, counts: Sequence[int]) -> float | None:
    """Fit a line through the medians, and return its value at no steps."""
    if len(counts) < 2:
        return None
    medians = [median(timed_runs.seconds(count)) for count in counts]
    return float(np.polyfit(counts, medians, 1)[1])


def _chunks_record(video: VideoWorkload, steps: int, times: ChunkTimes) -> ChunkLatencies:
    assert video.plan is not None
    plan, rows = video.plan, times.rows
    by_index = [median(row[index] for row in rows) for index in range(len(plan.chunks))]
    frames = [TEMPORAL_FACTOR * count for count in plan.chunks]
    frames[0] -= TEMPORAL_FACTOR - 1
    later = [seconds for row in rows for seconds in row[1:]]
    factors = [
        count / seconds / video.fps for count, seconds in zip(frames[1:], by_index[1:], strict=True)
    ]
    return ChunkLatencies(
        steps=steps,
        first=latency_from_samples([row[0] for row in rows]),
        later=latency_from_samples(later) if later else None,
        by_index=by_index,
        remember=latency_from_samples(times.append_seconds) if times.append_seconds else None,
        frames=frames,
        cached_tokens=[sum(plan.cached_tokens(index)) for index in range(len(plan.chunks))],
        worst_real_time_factor=min(factors, default=frames[0] / by_index[0] / video.fps),
    )
