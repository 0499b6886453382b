"""Times from a prompt to frames: the medians of the stages, added up.

They exist only where all three stages were measured; nothing is guessed.
"""

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
    load_seconds: float,
    fps: int,
) -> list[EndToEnd]:
    """Add up the stages of the first shape, at every number of steps.

    The VAE was timed on the first shape.

    Args:
        points, videos: in the same order.
        stages: text encoder and VAE; without both there is no end to end.
        load_seconds: seconds that the engine took to load.
        fps: playback rate.
    """
    by_name = {stage.name: stage for stage in stages}
    if TEXT not in by_name or VAE not in by_name:
        return []
    text, vae = by_name[TEXT], by_name[VAE]
    point, video = points[0], videos[0]
    cold = load_seconds + text.load_seconds + vae.load_seconds
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
        decode_seconds = vae.parts[
            "first chunk" if video.plan is not None else "first frame"
        ].median
        first = text.latency.median + latents + decode_seconds
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
