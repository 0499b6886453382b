"""Reads videos for training: a number of frames at Wan's rate, of one size.

Frames are chosen by their times, so that a video of any rate keeps its speed. The picture is scaled
until it covers the size, and the rest is cropped evenly.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.models import FPS

_MAX_UPSCALE = 2.0
"""The most that a video is scaled up: beyond it, training would learn blur."""


def read_clip(
    source: Path | bytes, name: str, frames: int, height: int, width: int, fps: int = FPS
) -> NDArray[np.uint8]:
    """Read the first frames of a video, uint8 (frames, height, width, 3).

    Args:
        source: a file, or its bytes.
        name: for messages.
        frames, height, width: of the result.
        fps: rate at which frames are taken.

    Raises:
        AnyFlowError: it cannot be decoded, is too short, or much too small.
    """
    import av

    images: list[NDArray[np.uint8]] = []
    start_time = end = 0.0
    try:
        with av.open(
            io.BytesIO(source) if isinstance(source, bytes) else str(source), "r"
        ) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or fps)
            for number, frame in enumerate(container.decode(stream)):
                start = frame.time if frame.time is not None else number / rate
                start_time = start if number == 0 else start_time
                end = start - start_time + 1 / rate
                # Half a frame's tolerance: times are rounded in the file.
                while len(images) < frames and (len(images) + 0.5) / fps < end:
                    images.append(_resize_and_crop(frame, name, height, width))
                if len(images) == frames:
                    return np.stack(images)
    except (OSError, IndexError, av.error.FFmpegError) as error:
        raise AnyFlowError(f"{name} cannot be read as a video: {error}.") from None
    raise AnyFlowError(
        f"{name} has {end:.2f} s; {frames} frames at {fps} a second take {frames / fps:.2f} s."
    )


def _resize_and_crop(frame: object, name: str, height: int, width: int) -> NDArray[np.uint8]:
    import av

    assert isinstance(frame, av.VideoFrame)
    scale = max(height / frame.height, width / frame.width)
    if scale > _MAX_UPSCALE:
        raise AnyFlowError(
            f"{name} is {frame.height} x {frame.width}, too small for {height} x {width}."
        )
    rows = max(height, round(frame.height * scale))
    columns = max(width, round(frame.width * scale))
    picture = frame.to_ndarray(format="rgb24", width=columns, height=rows, interpolation="BICUBIC")
    top, left = (rows - height) // 2, (columns - width) // 2
    return np.asarray(picture[top : top + height, left : left + width], dtype=np.uint8)
