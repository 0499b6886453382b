"""Pictures and clips that tests make: of known colours, times, turns and formats."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[Any]


HEIGHT, WIDTH = 48, 80


MATRIX_START = 4 + 4 + 4 * 5 + 8 + 8
"""Of the display matrix, after the box's name `tkhd` (version 0)."""


def corners(height: int = HEIGHT, width: int = WIDTH) -> Pixels:
    """A picture that no turn or mirror image of it equals: four quarters of their own grey."""
    result = np.zeros((height, width, 3), np.uint8)
    result[: height // 2, : width // 2] = 220
    result[: height // 2, width // 2 :] = 150
    result[height // 2 :, : width // 2] = 80
    return result


def grey(number: int, height: int = 32, width: int = 48) -> Pixels:
    """A frame that says its number."""
    return np.full((height, width, 3), 4 * number + 8, np.uint8)


def numbers(frames: Pixels) -> list[int]:
    """What frames of `grey` say."""
    return [round((float(f.mean()) - 8) / 4) for f in frames]


def write_clip(
    path: Path,
    frames: Sequence[Pixels],
    times: Sequence[float] | None = None,
    fps: int = 16,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    source: str = "rgb24",
    aspect: Fraction | None = None,
    container: str | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    base = Fraction(1, fps) if times is None else Fraction(1, 1000)
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixel_format
        stream.options = options or ({"crf": "4"} if codec == "libx264" else {})
        stream.codec_context.time_base = base
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=source)
            frame.pts = number if times is None else round(times[number] / base)
            frame.time_base = base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def turn_clip(path: Path, matrix: Sequence[float]) -> Path:
    """Write a display matrix (a b, c d) into an mp4 or mov."""
    data = bytearray(path.read_bytes())
    a, b, c, d = (round(number * 65536) for number in matrix)
    struct.pack_into(
        ">9i", data, data.index(b"tkhd") + MATRIX_START, a, b, 0, c, d, 0, 0, 0, 1 << 30
    )
    path.write_bytes(data)
    return path


def near(found: Pixels, wanted: Pixels, levels: float = 3) -> bool:
    return found.shape == wanted.shape and bool(
        np.abs(found.astype(int) - wanted.astype(int)).mean() < levels
    )


def hidden_colours() -> Pixels:
    """Grey on the left; on the right transparent, with magenta that nobody has seen."""
    pixels = np.full((HEIGHT, WIDTH, 4), 255, np.uint8)
    pixels[..., :3] = 120
    pixels[:, WIDTH // 2 :] = (255, 0, 255, 0)
    return pixels
