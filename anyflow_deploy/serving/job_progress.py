"""Report a generator's progress to the video that clients see, and to the metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from anyflow_deploy.engines.deadline import DeadlineResult
from anyflow_deploy.schedule import Step
from anyflow_deploy.serving.job import Fragment, Job
from anyflow_deploy.serving.metrics import Metrics

_STEPS_SHARE, _FRAMES_SHARE = 90, 9
"""Per cent of the progress for steps and for frames; the last per cent is the finished file."""


class JobProgress:
    """Records the progress of one video; its clock starts when it is made.

    Args:
        job: the video.
        metrics: the server's metrics.
    """

    def __init__(self, job: Job, metrics: Metrics) -> None:
        self.job = job
        self._metrics = metrics
        self._start = self._last_fragment = self._last_step = time.perf_counter()
        self._share = 0.0
        self._step_count = 0

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage in a `with` block; a repeated stage adds up."""
        self._last_step = start = time.perf_counter()
        yield
        with self.job.lock:
            timings = self.job.video.timings
            timings[name] = round(timings.get(name, 0.0) + time.perf_counter() - start, 4)

    def add_step(self, step: Step, share: float) -> None:
        """Record a transition.

        Args:
            step: the transition.
            share: share of all transitions so far, 0 to 1.

        Raises:
            CancelledError: the video was cancelled.
        """
        now = time.perf_counter()
        self._metrics.step_seconds.observe(now - self._last_step)
        self._metrics.steps.inc()
        self._last_step = now
        self._step_count = step.index + 1
        self._share = min(1.0, share)
        self._update_progress()
        self.job.check()

    def finish_sample(self) -> None:
        """Record that the transitions of a chunk, or of the whole video, are done."""
        with self.job.lock:
            self.job.video.steps.append(self._step_count)

    def add_deadlines(self, results: list[DeadlineResult]) -> None:
        """Record the results of all deadlines so far; the last one is new."""
        self._metrics.deadlines.labels("met" if results[-1].slack >= 0 else "missed").inc()
        self._metrics.probe_steps.inc(results[-1].probe_step)
        with self.job.lock:
            self.job.video.deadline_met = all(result.slack >= 0 for result in results)

    def add_fragment(self, frames: int, size: int) -> None:
        """Record that frames are in the file.

        Args:
            frames: number of frames.
            size: bytes by which the file grew.

        Raises:
            CancelledError: the video was cancelled.
        """
        now = time.perf_counter()
        fragments = self.job.fragments
        first, start = (
            (fragments[-1].first_frame + fragments[-1].frames, fragments[-1].end)
            if fragments
            else (0, 0)
        )
        seconds = round(now - self._start, 4)
        with self.job.lock:
            fragments.append(
                Fragment(
                    index=len(fragments),
                    first_frame=first,
                    frames=frames,
                    start=start,
                    end=start + size,
                    seconds=seconds,
                )
            )
            self.job.video.chunks = len(fragments)
            self.job.video.timings.setdefault("first_frame", seconds)
        if first == 0:
            self._metrics.first_frame_seconds.observe(seconds)
        self._metrics.chunk_seconds.observe(now - self._last_fragment)
        self._metrics.frames.inc(frames)
        self._last_fragment = now
        self._update_progress()
        self.job.check()

    def finish(self) -> None:
        """Record that nothing more comes: the total and every stage's time.

        A second call does nothing.
        """
        if "total" in self.job.video.timings:
            return
        seconds = time.perf_counter() - self._start
        self._metrics.video_seconds.observe(seconds)
        with self.job.lock:
            self.job.video.timings["total"] = round(seconds, 4)
            for name in ("text", "transformer", "vae", "mp4"):
                if name in self.job.video.timings:
                    self._metrics.stage_seconds.labels(name).observe(self.job.video.timings[name])

    def _update_progress(self) -> None:
        with self.job.lock:
            video = self.job.video
            frames_share = (
                sum(fragment.frames for fragment in self.job.fragments) / video.num_frames
            )
            video.progress = max(
                video.progress, int(_STEPS_SHARE * self._share + _FRAMES_SHARE * frames_share)
            )
        self.job.notify()
