"""What a generator reports while it works: into the video that clients see, and into the
metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from anyflow_deploy.engines.deadline import DeadlineResult
from anyflow_deploy.schedule import Step
from anyflow_deploy.serving.job import Fragment, Job
from anyflow_deploy.serving.metrics import Metrics

_STEPS_SHARE, _FRAMES_SHARE = 90, 9  # of the progress; the last hundredth is the finished file


class Report:
    """Of one video; its clock runs from here.

    Args:
        job: to be made.
        metrics: of the server.
    """

    def __init__(self, job: Job, metrics: Metrics) -> None:
        self.job, self._metrics = job, metrics
        self._started = self._last_piece = self._last_step = time.perf_counter()
        self._way = 0.0
        self._made = 0

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; one that comes again is added up."""
        self._last_step = started = time.perf_counter()
        yield
        with self.job.lock:
            timings = self.job.video.timings
            timings[name] = round(timings.get(name, 0.0) + time.perf_counter() - started, 4)

    def step(self, step: Step, way: float) -> None:
        """A transition was made.

        Args:
            step: which.
            way: of all transitions, 0 to 1.

        Raises:
            Cancelled: nobody wants the video any more.
        """
        now = time.perf_counter()
        self._metrics.step_seconds.observe(now - self._last_step)
        self._metrics.steps.inc()
        self._last_step, self._made = now, step.index + 1
        self._way = min(1.0, way)
        self._update_progress()
        self.job.check()

    def finish_sample(self) -> None:
        """The transitions of a chunk, or of the whole video, are done."""
        with self.job.lock:
            self.job.video.steps.append(self._made)

    def deadlines(self, outcomes: list[DeadlineResult]) -> None:
        """What came of the deadlines so far; the last one is new."""
        self._metrics.deadlines.labels("met" if outcomes[-1].slack >= 0 else "missed").inc()
        self._metrics.drafts.inc(outcomes[-1].probe_step)
        with self.job.lock:
            self.job.video.deadline_met = all(outcome.slack >= 0 for outcome in outcomes)

    def piece(self, frames: int, size: int) -> None:
        """Frames are in the file.

        Args:
            frames: how many.
            size: bytes by which the file grew.

        Raises:
            Cancelled: nobody wants the video any more.
        """
        now, pieces = time.perf_counter(), self.job.pieces
        first, start = (
            (pieces[-1].first_frame + pieces[-1].frames, pieces[-1].end) if pieces else (0, 0)
        )
        seconds = round(now - self._started, 4)
        with self.job.lock:
            pieces.append(
                Fragment(
                    index=len(pieces),
                    first_frame=first,
                    frames=frames,
                    start=start,
                    end=start + size,
                    seconds=seconds,
                )
            )
            self.job.video.chunks = len(pieces)
            self.job.video.timings.setdefault("first_frame", seconds)
        if first == 0:
            self._metrics.first_frame_seconds.observe(seconds)
        self._metrics.chunk_seconds.observe(now - self._last_piece)
        self._metrics.frames.inc(frames)
        self._last_piece = now
        self._update_progress()
        self.job.check()

    def ended(self) -> None:
        """Nothing more comes: note the whole, and every stage's time. Said twice, it counts
        once."""
        if "total" in self.job.video.timings:
            return
        seconds = time.perf_counter() - self._started
        self._metrics.video_seconds.observe(seconds)
        with self.job.lock:
            self.job.video.timings["total"] = round(seconds, 4)
            for name in ("text", "transformer", "vae", "mp4"):
                if name in self.job.video.timings:
                    self._metrics.stage_seconds.labels(name).observe(self.job.video.timings[name])

    def _update_progress(self) -> None:
        with self.job.lock:
            video = self.job.video
            shown = sum(piece.frames for piece in self.job.pieces) / video.num_frames
            video.progress = max(
                video.progress, int(_STEPS_SHARE * self._way + _FRAMES_SHARE * shown)
            )
        self.job.notify()
