"""Encode frames of a video file as JPEG, for pages that draw them one by one."""

from __future__ import annotations

import io
from pathlib import Path

from anyflow_deploy.pipelines.video_io import load_fragment
from anyflow_deploy.serving.job import Fragment

_QUALITY = 88


def encode_jpegs(path: Path, fragment: Fragment) -> list[bytes]:
    """Encode each frame of a fragment as JPEG."""
    from PIL import Image

    result = []
    for frame in load_fragment(path, fragment.start, fragment.end):
        memory = io.BytesIO()
        Image.fromarray(frame).save(memory, "JPEG", quality=_QUALITY)
        result.append(memory.getvalue())
    return result


def encode_thumbnail(path: Path, fragment: Fragment) -> bytes:
    """Encode the first frame of a fragment as JPEG."""
    return encode_jpegs(path, fragment)[0]


def read_fragment(path: Path, fragment: Fragment) -> bytes:
    """Read the bytes of a fragment from the file."""
    with path.open("rb") as file:
        file.seek(fragment.start)
        return file.read(fragment.end - fragment.start)
