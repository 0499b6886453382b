"""Frames of a video file as JPEG, for pages that draw them one by one."""

from __future__ import annotations

import io
from pathlib import Path

from anyflow_deploy.pipelines.video_io import piece_frames
from anyflow_deploy.serving.job import Fragment

_QUALITY = 88


def jpegs(path: Path, piece: Fragment) -> list[bytes]:
    """The frames of a piece, each as JPEG."""
    from PIL import Image

    result = []
    for frame in piece_frames(path, piece.start, piece.end):
        memory = io.BytesIO()
        Image.fromarray(frame).save(memory, "JPEG", quality=_QUALITY)
        result.append(memory.getvalue())
    return result


def thumbnail(path: Path, piece: Fragment) -> bytes:
    """The first frame of a piece as JPEG."""
    return jpegs(path, piece)[0]


def part(path: Path, piece: Fragment) -> bytes:
    """The bytes of a piece as they lie in the file."""
    with path.open("rb") as file:
        file.seek(piece.start)
        return file.read(piece.end - piece.start)
