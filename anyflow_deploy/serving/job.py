"""One video on its way from request to file.

`Video` is what clients see of it, in OpenAI's shape with fields of ours behind; `Job` adds what the
server needs: the request, two flags that other threads raise, and those who wait for news.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict

from anyflow_deploy.pipelines.request import GenerationRequest

Status = Literal["queued", "in_progress", "completed", "failed"]


class JobError(BaseModel):
    """Why a video was not made. `code` is `cancelled`, `server_shutdown`, `invalid_request` or
    `server_error`."""

    code: str
    message: str


class Fragment(BaseModel):
    """Frames that were put into the file together.

    Attributes:
        index: 0 for the first.
        first_frame, frames: which ones, in frames of the video.
        start, end: where they lie in the file, in bytes.
        seconds: since work on this video began.
    """

    model_config = ConfigDict(frozen=True)

    index: int
    first_frame: int
    frames: int
    start: int
    end: int
    seconds: float


class Video(BaseModel):
    """A video as clients see it: OpenAI's fields, then ours. A cancelled one has `failed`, as
    OpenAI's clients know no other end.

    Attributes:
        progress: 0 to 100.
        seconds: length, as text; `size` is WIDTHxHEIGHT.
        steps: transitions made, of each chunk (or of the whole).
        deadline_met: whether every chunk was in time; None without a deadline, or before the first.
        queue_position: videos before this one, counting the one being made; None once it is begun.
        timings: seconds by stage: `queued`, `text`, `first_frame`, `transformer`, `vae`, `mp4`,
            `total`.
    """

    model_config = ConfigDict(validate_assignment=False, protected_namespaces=())

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status = "queued"
    progress: int = 0
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    error: JobError | None = None
    prompt: str
    seconds: str
    size: str
    num_frames: int
    fps: int
    seed: int
    num_inference_steps: int
    deadline_ms: float | None = None
    steps: list[int] = []
    deadline_met: bool | None = None
    chunks: int = 0
    queue_position: int | None = None
    bytes: int | None = None
    timings: dict[str, float] = {}


class CancelledError(Exception):
    """Raised between two transitions of a video that nobody wants any more."""


@dataclass(eq=False)
class Job:
    """See the module.

    Attributes:
        video: what clients see.
        request: what was asked for, checked; None for one that an earlier server made.
        request_id: of the HTTP request it came with.
        pieces: what the file holds so far.
        created: seconds, `time.monotonic()`.
        unwanted: set to cancel; `reason` says why.
        enough: set to finish a deadline with one jump.
        lock: held by whoever changes or copies `video` and `pieces`.
    """

    video: Video
    request: GenerationRequest | None
    request_id: str = ""
    pieces: list[Fragment] = field(default_factory=list)
    created: float = field(default_factory=time.monotonic)
    cancel_event: threading.Event = field(default_factory=threading.Event)
    stop_event: threading.Event = field(default_factory=threading.Event)
    reason: JobError | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    _listeners: list[Callable[[], None]] = field(default_factory=list)

    @property
    def id(self) -> str:
        """Of the video."""
        return self.video.id

    @property
    def ended(self) -> bool:
        """Nothing more will happen to it."""
        return self.video.status in ("completed", "failed")

    def snapshot(self) -> Video:
        """A copy of what clients see, whole at one moment."""
        with self.lock:
            return self.video.model_copy(deep=True)

    @contextlib.contextmanager
    def subscribe(self, listener: Callable[[], None]) -> Iterator[None]:
        """Within it `listener` is called, from any thread, whenever something changed."""
        with self.lock:
            self._listeners.append(listener)
        try:
            yield
        finally:
            with self.lock:
                self._listeners.remove(listener)

    def notify(self) -> None:
        """Something changed."""
        with self.lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def check(self) -> None:
        """Called between transitions.

        Raises:
            Cancelled: nobody wants it any more.
        """
        if self.cancel_event.is_set():
            raise CancelledError
