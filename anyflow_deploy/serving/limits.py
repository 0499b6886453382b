"""What a server lets anybody ask of it. Every number is a flag of `anyflow-serve`; every refusal
names it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Upper ends.

    Attributes:
        queue: videos that may wait; one more is refused (429).
        steps: transitions of a chunk, or of a whole video.
        frames: of a video.
        pixels: height times width of a video.
        deadline_seconds: of a chunk, or of a whole video.
        prompt_characters: of the text.
        body_bytes: of a request.
        body_seconds: in which a request's body has to arrive.
        disk_bytes: of all videos on the shelf; the oldest go first.
        keep_seconds: how long a finished video is kept.
        streams: WebSockets at once.
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
