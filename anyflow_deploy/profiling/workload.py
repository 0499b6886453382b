"""What is run: the clips of a bundle in some shapes and numbers of steps, with noise and embeddings
of random numbers.

Values do not change how long a transition takes, so neither a prompt nor trained weights are needed
here.
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
        plan: of a causal model's chunks.
        frames: of the video.
        fps: playback rate.
        shift: of the schedules.
    """

    shape: LatentShape
    latents: Array
    text: Array
    plan: CachePlan | None
    frames: int
    fps: int
    shift: float

    def schedule(self, steps: int) -> Schedule:
        """As `anyflow-generate` makes it."""
        return Schedule.uniform(steps, shift=self.shift)

    @property
    def largest_step(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of the largest transition."""
        frames = self.shape.frames if self.plan is None else max(self.plan.chunks)
        return frames, self.shape.height, self.shape.width

    @property
    def max_cached_tokens(self) -> int:
        """Tokens that a chunk finds in the cache at most."""
        return 0 if self.plan is None else self.plan.capacity


def build_workloads(
    manifest: Manifest, shapes: tuple[str, ...], window: int | None
) -> list[VideoWorkload]:
    """The shapes asked for, or the bundle's own, checked against its ranges.

    Raises:
        AnyFlowError: what is no shape, or lies outside; a window for a bidirectional bundle.
    """
    a = manifest.architecture
    if window is not None and not a.causal:
        raise AnyFlowError(
            f"--window is kept in the cache of a causal model, and this is {manifest.model}. Leave"
            " it out."
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
    """Seconds from asking for each chunk to having it, a row a clip; and what remembering took."""

    rows: list[list[float]]
    append_seconds: list[float]


def clip_runner(
    engine: TimedEngine, video: VideoWorkload, steps: int, chunk_times: ChunkTimes | None
) -> Callable[[], None]:
    """One clip of some steps, as something to run."""
    schedule = video.schedule(steps)
    if video.plan is None:
        return lambda: _check_finite(sample(engine, video.latents, video.text, schedule))
    chunks, window = video.plan.chunks, video.plan.window

    def run() -> None:
        row: list[float] = []
        began = clock()
        with closing(
            stream(engine, video.latents, video.text, schedule, chunks, window=window)
        ) as chunks_made:
            for chunk in chunks_made:
                row.append(clock() - began)
                _check_finite(chunk.latents)
                began = clock()
        if chunk_times is not None:
            chunk_times.rows.append(row)
            chunk_times.append_seconds += engine.append_seconds
        engine.append_seconds.clear()

    return run


def run_last_chunk(
    engine: TimedEngine, video: VideoWorkload, warm: int, count: int, before: Callable[[], None]
) -> None:
    """Some transitions of the last chunk (bidirectional: of the clip), where the cache is fullest.

    Args:
        engine: what runs them.
        video: what is made.
        warm, count: transitions that are to be forgotten, and those that count.
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
            piece = np.ascontiguousarray(video.latents[:, first : first + frames])
            if index + 1 < len(plan.chunks):
                memory.append(piece)
                continue
            with memory.start(piece) as run:
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
    """An engine that makes NaN may be fast for that very reason."""
    if not np.isfinite(latents).all():
        raise AnyFlowError(
            "the engine made NaN or infinity, and its times mean nothing. anyflow-validate says"
            " where; random weights in fp16 may overflow: try --precision fp32."
        )
