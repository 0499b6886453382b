"""The clips that a profile runs: a bundle's shapes and steps, with random inputs.

Values do not change how long a transition takes, so it needs neither a prompt nor trained weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.kv_cache import CachePlan
from anyflow_deploy.engines.sampler import noise, sample, stream
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.memory.estimate import LatentShape, shape_from_pixels
from anyflow_deploy.pipelines.request import GenerationRequest
from anyflow_deploy.profiling.timed_engine import TimedEngine
from anyflow_deploy.profiling.timing import clock
from anyflow_deploy.schedule import Schedule


@dataclass(frozen=True)
class VideoWorkload:
    """One shape to profile.

    Attributes:
        shape: in latent units.
        latents: noise, (1, F, C, H, W).
        text: random embeddings, (1, L, D).
        plan: cache and chunks of a causal model; None otherwise.
        frames: number of video frames.
        fps: playback rate.
        shift: shift of the schedules.
    """

    shape: LatentShape
    latents: Array
    text: Array
    plan: CachePlan | None
    frames: int
    fps: int
    shift: float

    def schedule(self, steps: int) -> Schedule:
        """Make the schedule that `anyflow-generate` makes."""
        return Schedule.uniform(steps, shift=self.shift)

    @property
    def largest_step(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of the largest transition."""
        frames = self.shape.frames if self.plan is None else max(self.plan.chunks)
        return frames, self.shape.height, self.shape.width

    @property
    def max_cached_tokens(self) -> int:
        """Largest number of tokens that a chunk finds in the cache."""
        return 0 if self.plan is None else self.plan.capacity


def build_workloads(
    manifest: Manifest, shapes: tuple[str, ...], window: int | None
) -> list[VideoWorkload]:
    """Make the workloads of these shapes, or of the bundle's own, within its ranges.

    Raises:
        AnyFlowError: text that is no shape, a shape outside the ranges, or a window for a
            bidirectional bundle.
    """
    a = manifest.architecture
    if window is not None and not a.causal:
        raise AnyFlowError(
            f"--window is for the cache of a causal model, and this is {manifest.model}. Leave it"
            " out."
        )
    video = manifest.video
    shapes_or_default = shapes or (f"{video.height}x{video.width}x{video.frames}",)
    return [_build_workload(manifest, text, window) for text in dict.fromkeys(shapes_or_default)]


def _build_workload(manifest: Manifest, text: str, window: int | None) -> VideoWorkload:
    """Make noise and embeddings of one shape."""
    a, video = manifest.architecture, manifest.video
    shape = shape_from_pixels(text, a)
    request = GenerationRequest.from_manifest(
        manifest,
        num_frames=(shape.frames - 1) * video.temporal_factor + 1,
        height=shape.height * video.spatial_factor,
        width=shape.width * video.spatial_factor,
        window=window,
    )
    return VideoWorkload(
        shape,
        noise((1, *request.shape), 0),
        noise((1, video.text_tokens, a.text_dim), 1),
        request.plan,
        request.num_frames,
        video.fps,
        manifest.schedule.shift,
    )


@dataclass
class ChunkTimes:
    """Seconds of each chunk, a row for each clip, and seconds of each append to the cache."""

    rows: list[list[float]]
    append_seconds: list[float]


def make_clip_run(
    engine: TimedEngine, video: VideoWorkload, steps: int, chunk_times: ChunkTimes | None
) -> Callable[[], None]:
    """Return a function that runs one clip of some steps."""
    schedule = video.schedule(steps)
    if video.plan is None:
        return lambda: _check_finite(sample(engine, video.latents, video.text, schedule))
    chunks, window = video.plan.chunks, video.plan.window

    def run() -> None:
        row: list[float] = []
        start = clock()
        with closing(
            stream(engine, video.latents, video.text, schedule, chunks, window=window)
        ) as chunk_iterator:
            for chunk in chunk_iterator:
                row.append(clock() - start)
                _check_finite(chunk.latents)
                start = clock()
        if chunk_times is not None:
            chunk_times.rows.append(row)
            chunk_times.append_seconds += engine.append_seconds
        engine.append_seconds.clear()

    return run


def run_last_chunk(
    engine: TimedEngine, video: VideoWorkload, warm: int, count: int, before: Callable[[], None]
) -> None:
    """Run some transitions of the last chunk, where the cache is fullest.

    A bidirectional model's clip is its last chunk.

    Args:
        engine: runs them.
        video: the shape.
        warm: number of transitions before the measured ones.
        count: number of measured transitions.
        before: called between the two.
    """
    if video.plan is None:
        with engine.start(video.latents, video.text) as run:
            _run_steps(run.step, warm, count, before)
        return
    plan = video.plan
    with closing(engine.open_stream(video.text, plan)) as memory:
        for index, frames in enumerate(plan.chunks):
            first = plan.first_frame(index)
            latents = np.ascontiguousarray(video.latents[:, first : first + frames])
            if index + 1 < len(plan.chunks):
                memory.append(latents)
                continue
            with memory.start(latents) as run:
                _run_steps(run.step, warm, count, before)


def _run_steps(
    step: Callable[[float, float], None], warm: int, count: int, before: Callable[[], None]
) -> None:
    times = np.linspace(1000.0, 0.0, warm + count + 1)
    for index in range(warm + count):
        if index == warm:
            before()
        step(float(times[index]), float(times[index + 1]))


def _check_finite(latents: Array) -> None:
    """Refuse NaN and infinity, which may be the very reason why an engine is fast."""
    if not np.isfinite(latents).all():
        raise AnyFlowError(
            "the engine made NaN or infinity, so its times mean nothing. anyflow-validate says"
            " where; random weights in fp16 may overflow: try --precision fp32."
        )
