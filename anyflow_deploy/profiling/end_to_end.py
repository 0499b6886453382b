"""From a prompt to frames: the medians of the stages, added up. Only where all three were measured;
nothing is guessed."""

from __future__ import annotations

from collections.abc import Sequence

from anyflow_deploy.profiling.record import EndToEnd, Point, StageTiming
from anyflow_deploy.profiling.stages import TEXT, VAE
from anyflow_deploy.profiling.workload import VideoWorkload

TRANSFORMER = "transformer"


def end_to_end(
    points: Sequence[Point],
    stages: Sequence[StageTiming],
    videos: Sequence[VideoWorkload],
    loading: float,
    fps: int,
) -> list[EndToEnd]:
    """For the first shape (the one the VAE was timed on), at every number of steps.

    Args:
        points, videos: in the same order.
        stages: text encoder and VAE; without both there is no end to end.
        loading: seconds the engine took to load.
        fps: playback rate.
    """
    found = {stage.name: stage for stage in stages}
    if TEXT not in found or VAE not in found:
        return []
    text, vae = found[TEXT], found[VAE]
    point, video = points[0], videos[0]
    cold = loading + text.load_seconds + vae.load_seconds
    result = []
    for index, clip in enumerate(point.clips):
        seconds = {
            TEXT: text.latency.median,
            TRANSFORMER: clip.latency.median,
            VAE: vae.latency.median,
        }
        total = sum(seconds.values())
        latents = (
            point.chunks[index].first.median if video.plan is not None else clip.latency.median
        )
        decoding = vae.parts["first chunk" if video.plan is not None else "first frame"].median
        first = text.latency.median + latents + decoding
        result.append(
            EndToEnd(
                shape=point.shape,
                steps=clip.steps,
                seconds=seconds,
                total=total,
                first_frame=first,
                cold_start=cold,
                frames_per_second=point.frames / total,
                real_time_factor=point.frames / total / fps,
            )
        )
    return result
