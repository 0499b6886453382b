"""Frames to a video file, by PyAV: the ffmpeg libraries in a wheel, so no program has to be installed."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anyflow_deploy.errors import AnyFlowError

SUFFIXES = (".mp4", ".mkv", ".mov")


def save_video(path: Path, frames: NDArray[np.uint8], fps: int) -> None:
    """Encode frames as H.264, whole or not at all.

    Args:
        path: destination; its ending chooses the container.
        frames: (frames, height, width, 3), even height and width.
        fps: playback rate.

    Raises:
        AnyFlowError: another ending, or no H.264 encoder in this PyAV.
    """
    import av

    check_suffix(path)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        with av.open(str(partial), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": "16"}
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())
        partial.rename(path)
    except av.error.FFmpegError as error:
        raise AnyFlowError(f"{path} could not be encoded: {error}.") from None
    finally:
        partial.unlink(missing_ok=True)


def check_suffix(path: Path) -> None:
    """Refuse an ending that is not a video container's."""
    if path.suffix.lower() not in SUFFIXES:
        raise AnyFlowError(f"{path} ends in {path.suffix or 'nothing'}; allowed are {', '.join(SUFFIXES)}.")
