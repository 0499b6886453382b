"""What a causal model is asked for: which chunks, what is given, how much it may remember. Checked before it runs.

A causal bundle makes a video chunk by chunk. The chunks come from `--chunks` or are the model's own; a picture or a clip
becomes the latents of the first of them; the cache's size follows from the chunks and is known before anything is
loaded. Each function here answers one of these questions, or refuses with the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.dtypes import DTYPES
from anyflow_deploy.engines.kv_cache import CachePlan, cache_plan, fit_chunks
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.pipelines.video_io import check_size, load_image, load_video
from anyflow_deploy.shape_ranges import latent_frames


def planned(manifest: Manifest, chunks: Sequence[int] | None, shape: Sequence[int], window: int | None = None) -> CachePlan:
    """The chunks of a video and the cache they need.

    Args:
        manifest: of a causal bundle.
        chunks: latent frames of each chunk; None for the model's own plan.
        shape: (F, C, H, W) of the video's latents.
        window: see `cache_plan`.

    Raises:
        AnyFlowError: chunks that do not sum to F, naming both and what to give instead.
        ShapeError: height or width that the patches do not divide.
    """
    plan = cache_plan(manifest.architecture, chunks, shape[2], shape[3], window, manifest.video.text_tokens)
    if plan.frames == shape[0]:
        return plan
    factor = manifest.video.temporal_factor
    asked = f"{(shape[0] - 1) * factor + 1} frames are {shape[0]} latent frames"
    own = "the model's own chunk plan" if chunks is None else "the chunk plan"
    fitting = ",".join(map(str, fit_chunks(plan.chunks, shape[0])))
    raise AnyFlowError(
        f"{own} {_shown(plan.chunks)} has {plan.frames} latent frames, and {asked}. "
        f"Give --frames {(plan.frames - 1) * factor + 1}, or --chunks that sum to {shape[0]}, such as {fitting}."
    )


def element_bytes(manifest: Manifest) -> int:
    """Bytes of one number in the cache, read from the graph that fills it."""
    return next(DTYPES[tensor.dtype].bytes for tensor in manifest.graphs["chunk"].outputs if tensor.name == "key.0")


def plan_line(plan: CachePlan, size: int) -> str:
    """The plan in words, such as `3 chunks (1, 3, 3), cache of 168 tokens, 0.4 MB`."""
    megabytes = plan.bytes(size) / 1e6
    chunks = "chunk" if len(plan.chunks) == 1 else "chunks"
    return f"{len(plan.chunks)} {chunks} {_shown(plan.chunks)}, cache of {plan.capacity:,} tokens, {megabytes:,.1f} MB"


def given_frames(
    image: Path | None, video: Path | None, plan: CachePlan, manifest: Manifest, height: int, width: int
) -> NDArray[np.uint8] | None:
    """The frames that the video begins with.

    Args:
        image: a picture, which becomes the first latent frame.
        video: a clip of 4n+1 frames, which becomes the first n+1 latent frames.
        plan: the video's chunks; what is given has to fill the first ones.
        manifest: of the bundle.
        height, width: of the video, in pixels.

    Returns:
        uint8 (frames, height, width, 3); None when neither is given.

    Raises:
        AnyFlowError: a file that cannot be read, another size, or frames that end inside a chunk or fill the video.
        ShapeError: a clip whose length is not 4n+1.
    """
    path = image or video
    if path is None:
        return None
    flag = "--image" if image is not None else "--video"
    frames = load_image(path) if image is not None else load_video(path)
    check_size(str(path), frames, height, width)
    count = latent_frames(len(frames), manifest.video.temporal_factor)
    borders = [plan.first_frame(chunk) for chunk in range(1, len(plan.chunks))]
    if count not in borders:
        raise AnyFlowError(_misfit(flag, len(frames), count, plan, manifest.video.temporal_factor))
    return frames


def _misfit(flag: str, frames: int, count: int, plan: CachePlan, factor: int) -> str:
    """Why so many given latent frames do not suit the plan."""
    given = f"{flag} has {frames} frames, which are {count} latent frames" if count > 1 else f"{flag} gives one latent frame"
    if count >= plan.frames:
        return f"{given}, and the video asked for has {plan.frames}: nothing would be left to make. Raise --frames."
    borders = [plan.first_frame(chunk) for chunk in range(1, len(plan.chunks))]
    advice = f"--chunks {count},{','.join(map(str, fit_chunks(plan.chunks, plan.frames - count)))}"
    where = f"the first chunks of the plan {_shown(plan.chunks)} end after {', '.join(map(str, borders)) or 'the last frame'}"
    cut = (
        f", or a clip of {' or '.join(str((b - 1) * factor + 1) for b in borders)} frames"
        if flag == "--video" and borders
        else ""
    )
    return f"{given}; {where}. What is given has to fill whole chunks: try {advice}{cut}."


def chunks_in(plan: CachePlan, frames: int) -> int:
    """How many of a plan's first chunks so many latent frames fill."""
    return next(chunk for chunk in range(len(plan.chunks) + 1) if plan.first_frame(chunk) >= frames)


def _shown(chunks: Sequence[int]) -> str:
    return f"({', '.join(map(str, chunks))})"
