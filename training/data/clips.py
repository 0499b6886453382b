"""Reads videos for training: a number of frames at Wan's rate, of one size.

`ClipReader` reads them, as it does for `--video`: turned, in their aspect, at even times. Here they
are held against what training needs: long enough, and not much too small.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.models import FPS
from anyflow_deploy.pipelines.clips import ClipReader
from anyflow_deploy.pipelines.frame_display import BLACK, Color
from anyflow_deploy.pipelines.frame_fit import Fit, FrameFit

_MAX_UPSCALE = 2.0
"""The most that a video is scaled up: beyond it, training would learn blur."""


def read_clip(
    source: Path | bytes,
    name: str,
    frames: int,
    height: int,
    width: int,
    fps: int = FPS,
    mode: Fit = "crop",
    background: Color = BLACK,
) -> NDArray[np.uint8]:
    """Read the first frames of a video, uint8 (frames, height, width, 3).

    Args:
        source: a file, or its bytes.
        name: for messages.
        frames, height, width: of the result.
        fps: rate at which frames are taken.
        mode: how they are brought to the size, see `frame_fit`.
        background: behind transparent pixels, and around padded frames.

    Raises:
        AnyFlowError: it cannot be decoded, is too short, or much too small.
    """
    fit = FrameFit(height, width, mode, background, _MAX_UPSCALE)
    with ClipReader(source, name) as clip:
        fit.check(name, clip.size)
        pixels = clip.read_first(fps, frames, fit)
        length = clip.end or 0.0
    if len(pixels) < frames:
        raise AnyFlowError(
            f"{name} has {length:.2f} s; {frames} frames at {fps} a second take"
            f" {frames / fps:.2f} s."
        )
    return pixels
