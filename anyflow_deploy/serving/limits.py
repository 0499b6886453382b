"""What a server lets clients ask of it.

Every number is a flag of `anyflow-serve`; every refusal names it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Upper limits of requests, and of what is kept.

    Attributes:
        queue: videos that may wait; one more is refused (429).
        steps: transitions of a chunk, or of a whole video.
        frames: frames of a video.
        pixels: height times width of a video.
        deadline_seconds: deadline of a chunk, or of a whole video.
        prompt_characters: length of a prompt.
        body_bytes: size of a request's body.
        body_seconds: time in which a request's body has to arrive.
        disk_bytes: size of all finished videos; the oldest are removed first.
        keep_seconds: how long a finished video is kept.
        streams: open WebSockets.
    """

    frames: int
    pixels: int
    queue: int = 8
    steps: int = 50
    deadline_seconds: float = 600.0
    prompt_characters: int = 4000
    body_bytes: int = 64 << 10
    body_seconds: float = 20.0
    disk_bytes: int = 10 << 30
    keep_seconds: float = 24 * 3600.0
    streams: int = 32
