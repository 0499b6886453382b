"""One video on its way from request to file.

`Video` is what clients see of it: OpenAI's fields, then ours. `Job` adds what the server needs: the
request, two events that other threads set, and listeners.
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
    """Why a video was not made.

    `code` is `cancelled`, `server_shutdown`, `invalid_request` or `server_error`.
    """

    code: str
    message: str


class Fragment(BaseModel):
    """Frames that were appended to the file together.

    Attributes:
        index: 0 for the first.
        first_frame: index of its first frame in the video.
        frames: number of frames.
        start, end: position in the file, in bytes.
        seconds: time since work on this video began.
    """

    model_config = ConfigDict(frozen=True)

    index: int
    first_frame: int
    frames: int
    start: int
    end: int
    seconds: float


class Video(BaseModel):
    """A video as clients see it: OpenAI's fields, then ours.

    A cancelled video has the status `failed`, the only other end that OpenAI's clients know.

    Attributes:
        progress: 0 to 100.
        seconds: length, as text.
        size: WIDTHxHEIGHT.
        steps: transitions of each finished chunk, or of the whole video.
        deadline_met: whether every chunk was in time; None without a deadline, or before the first.
        queue_position: number of videos before this one, with the running one; None once it runs.
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
    """Raised between two transitions of a video that was cancelled."""


@dataclass(eq=False)
class Job:
    """A video, its request, and what the server's threads share about it.

    Attributes:
        video: what clients see.
        request: the checked request; None for a video that an earlier server made.
        request_id: id of the HTTP request.
        fragments: what the file holds so far.
        created_time: seconds of `time.monotonic()`.
        cancel_event: set to cancel; `cancel_reason` says why.
        stop_event: set to finish a deadline with a single step.
        lock: held while `video` and `fragments` are changed or copied.
    """

    video: Video
    request: GenerationRequest | None
    request_id: str = ""
    fragments: list[Fragment] = field(default_factory=list)
    created_time: float = field(default_factory=time.monotonic)
    cancel_event: threading.Event = field(default_factory=threading.Event)
    stop_event: threading.Event = field(default_factory=threading.Event)
    cancel_reason: JobError | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    _listeners: list[Callable[[], None]] = field(default_factory=list)

    @property
    def id(self) -> str:
        """Id of the video."""
        return self.video.id

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen to the video."""
        return self.video.status in ("completed", "failed")

    def snapshot(self) -> Video:
        """Copy what clients see, at one moment."""
        with self.lock:
            return self.video.model_copy(deep=True)

    @contextlib.contextmanager
    def subscribe(self, listener: Callable[[], None]) -> Iterator[None]:
        """Call `listener`, from any thread, whenever something changes during the block."""
        with self.lock:
            self._listeners.append(listener)
        try:
            yield
        finally:
            with self.lock:
                self._listeners.remove(listener)

    def notify(self) -> None:
        """Call all listeners."""
        with self.lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def check(self) -> None:
        """Raise an error if the video was cancelled; called between transitions.

        Raises:
            CancelledError: it was cancelled.
        """
        if self.cancel_event.is_set():
            raise CancelledError
