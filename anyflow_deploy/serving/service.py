"""The queue, the thread that makes videos, and all of their states.

Nothing here knows of HTTP. Clients' threads (or the event loop) submit, read, cancel and delete;
one thread takes the oldest request and makes its video. All of the service's own state is under one
lock, which is held briefly, never while a video is made.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections import deque

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.pipelines.request import GenerationRequest
from anyflow_deploy.serving.generator import VideoGenerator
from anyflow_deploy.serving.job import CancelledError, Job, JobError, Video
from anyflow_deploy.serving.job_progress import JobProgress
from anyflow_deploy.serving.limits import Limits
from anyflow_deploy.serving.metrics import Metrics
from anyflow_deploy.serving.request import VideoRequest, validate_request
from anyflow_deploy.serving.video_store import VideoStore

_log = logging.getLogger("anyflow.serve")

MAX_FAILURES = 1000
"""Number of failed videos that are kept; older ones are removed."""

_CLEANUP_SECONDS = 30.0
_SHUTDOWN = JobError(
    code="server_shutdown",
    message="the server was stopped before this video was finished; ask again later.",
)
_CANCELLED = JobError(code="cancelled", message="cancelled on request; nothing of it was kept.")


class BusyError(AnyFlowError):
    """The queue is full.

    Attributes:
        seconds: time after which the client should ask again.
    """

    def __init__(self, queue_length: int, seconds: int) -> None:
        super().__init__(
            f"{queue_length} videos wait already, and this server takes no more. Ask again in"
            f" {seconds} s."
        )
        self.seconds = seconds


class ClosingError(AnyFlowError):
    """The server is being stopped."""


class LoadingError(AnyFlowError):
    """The model is not loaded yet."""

    seconds = 5
    """Time after which the client should ask again."""

    def __init__(self) -> None:
        super().__init__(f"the model is being loaded; ask again in {self.seconds} s.")


class Service:
    """Queues requests, makes their videos in a thread, and keeps the results.

    Args:
        generator: makes the videos.
        manifest: of the bundle.
        store: keeps the videos.
        limits: of this server.
        name: this server's name of the model.
        metrics: counts everything.
        is_loading: take no requests until `finish_loading`.
    """

    def __init__(
        self,
        generator: VideoGenerator,
        manifest: Manifest,
        store: VideoStore,
        limits: Limits,
        name: str,
        metrics: Metrics,
        is_loading: bool = False,
    ) -> None:
        self.generator = generator
        self.manifest = manifest
        self.limits = limits
        self.name = name
        self.metrics = metrics
        self.store = store
        self._jobs: dict[str, Job] = {job.id: job for job in store.restore()}  # oldest first
        self._queue: deque[Job] = deque()
        self._running_job: Job | None = None
        self._is_loading = is_loading
        self._is_closing = False
        self._recent_seconds: deque[float] = deque(maxlen=5)
        self._condition = threading.Condition()
        self._remove_expired()
        metrics.watch(
            lambda: len(self._queue),
            lambda: float(self._running_job is not None),
            self._count_stored_bytes,
        )
        self._thread = threading.Thread(target=self._run_queue, name="anyflow-videos", daemon=True)
        self._thread.start()

    # For clients

    def validate(self, request: VideoRequest) -> GenerationRequest:
        """Check a request against the bundle and the limits.

        Raises:
            InvalidRequestError: naming the field, what was given and what is allowed.
        """
        return validate_request(request, self.manifest, self.limits, self.name)

    def check_open(self) -> None:
        """Refuse requests for videos while they cannot be made.

        Raises:
            LoadingError: the model is not loaded yet.
            ClosingError: the server is being stopped.
        """
        if self._is_closing:
            raise ClosingError(
                "the server is being stopped and takes no more videos; ask again later."
            )
        if self._is_loading:
            raise LoadingError

    def finish_loading(self) -> None:
        """Take requests from now on."""
        self._is_loading = False

    def submit(self, request: GenerationRequest, request_id: str = "") -> Job:
        """Put a request into the queue.

        Raises:
            BusyError: the queue is full.
            LoadingError, ClosingError: see `check_open`.
        """
        job = Job(self._make_video(request), request, request_id)
        with self._condition:
            self.check_open()
            if len(self._queue) >= self.limits.queue:
                self.metrics.refusals.labels("queue").inc()
                raise BusyError(len(self._queue), self._estimate_wait())
            self._jobs[job.id] = job
            self._queue.append(job)
            self._condition.notify()
        _log.info("queued", extra={"request": request_id, "video": job.id})
        return job

    def get(self, name: str) -> Job | None:
        """Return a video by its id; None if there is none."""
        with self._condition:
            return self._jobs.get(name)

    def list_jobs(self) -> list[Job]:
        """Return all videos, oldest first."""
        with self._condition:
            return list(self._jobs.values())

    def snapshot(self, job: Job) -> Video:
        """Copy what clients see of a video now, with its place in the queue."""
        with self._condition:
            position = (
                self._queue.index(job) + (self._running_job is not None)
                if job in self._queue
                else None
            )
            video = job.snapshot()
        return video.model_copy(update={"queue_position": position})

    def cancel(self, job: Job, reason: JobError = _CANCELLED) -> None:
        """Cancel a video.

        One that waits is cancelled at once, the running one after its current transition. A video
        that has ended stays as it is.
        """
        with self._condition:
            if job in self._queue:
                self._queue.remove(job)
                self._fail(job, reason)
            elif not job.has_ended:
                job.cancel_reason = job.cancel_reason or reason
                job.cancel_event.set()
        job.notify()

    def delete(self, job: Job) -> None:
        """Remove a video and its file; one that is not finished is cancelled."""
        self.cancel(job)
        with self._condition:
            self._jobs.pop(job.id, None)
            is_running = self._running_job is job
        if not is_running:  # otherwise its folder is removed after the current transition
            self.store.remove(job.id)
        _log.info("deleted", extra={"video": job.id})

    @property
    def queue_length(self) -> int:
        """Number of videos in the queue."""
        return len(self._queue)

    @property
    def healthy(self) -> bool:
        """Whether videos are accepted and made."""
        return self.state == "ok"

    @property
    def state(self) -> str:
        """`ok`, `loading`, or `unavailable` where the server is being stopped."""
        if self._is_closing or not self._thread.is_alive():
            return "unavailable"
        return "loading" if self._is_loading else "ok"

    # Stopping

    def drain(self, grace: float) -> None:
        """Accept no more videos, end those that wait, and let the running one finish.

        Args:
            grace: seconds for that; then it is cancelled between two transitions.
        """
        with self._condition:
            self._is_closing = True
            self._condition.notify_all()
            queued_jobs = list(self._queue)
        for job in queued_jobs:
            self.cancel(job, _SHUTDOWN)
        self._thread.join(max(0.0, grace))
        self.abandon()
        self._thread.join()

    def abandon(self) -> None:
        """Cancel the running video, because the server stops."""
        job = self._running_job
        if job is not None:
            self.cancel(job, _SHUTDOWN)

    # The thread that makes videos

    def _run_queue(self) -> None:
        while True:
            with self._condition:
                if not self._queue and not self._is_closing:
                    self._condition.wait(_CLEANUP_SECONDS)
                if self._is_closing and not self._queue:
                    return
                job = self._queue.popleft() if self._queue else None
                self._running_job = job
            if job is not None:
                self._make(job)
                with self._condition:
                    self._running_job = None
                    is_deleted = job.id not in self._jobs
                if is_deleted:
                    self.store.remove(job.id)
                job.notify()
            self._remove_expired()

    def _make(self, job: Job) -> None:
        """Make one video; the thread continues whatever happens."""
        log_fields = {"request": job.request_id, "video": job.id}
        self._begin(job)
        progress = JobProgress(job, self.metrics)
        problem = None
        try:
            self.generator.make(job, self.store.begin(job.id), progress)
            progress.finish()
            self._finish(job)
            self._recent_seconds.append(job.video.timings["total"])
        except CancelledError:
            problem = job.cancel_reason or _CANCELLED
        except OSError as error:  # an OutputError, too, whose text names the server's folders
            _log.exception("failed", extra=log_fields)
            reason = error.strerror or "see the server's log"
            problem = JobError(
                code="server_error", message=f"the video could not be written: {reason}."
            )
        except AnyFlowError as error:
            problem = JobError(code="invalid_request", message=str(error))
        except Exception:  # noqa: BLE001 - the next video may do better; this one is in the log
            _log.exception("failed", extra=log_fields)
            where = job.request_id or job.id
            problem = JobError(
                code="server_error",
                message=f"an error of the server; its log has it under {where}.",
            )
        if problem is not None:
            progress.finish()
            self.store.remove(job.id)
            self._fail(job, problem)
        outcome = "completed" if problem is None else problem.code
        _log.info("%s after %.3f s", outcome, job.video.timings["total"], extra=log_fields)

    def _begin(self, job: Job) -> None:
        wait_seconds = time.monotonic() - job.created_time
        self.metrics.queue_seconds.observe(wait_seconds)
        with job.lock:
            job.video.status = "in_progress"
            job.video.timings["queued"] = round(wait_seconds, 4)
        _log.info(
            "begun after %.3f s in the queue",
            wait_seconds,
            extra={"request": job.request_id, "video": job.id},
        )
        job.notify()

    def _finish(self, job: Job) -> None:
        """Mark a video as completed, on disk first."""
        now = int(time.time())
        changes = {
            "bytes": self.store.path(job.id).stat().st_size,
            "completed_at": now,
            "expires_at": now + int(self.limits.keep_seconds),
            "progress": 100,
            "status": "completed",
        }
        self.store.finish(job, job.video.model_copy(update=changes))
        with job.lock:
            for name, value in changes.items():
                setattr(job.video, name, value)
        self.metrics.videos.labels("completed").inc()

    def _fail(self, job: Job, problem: JobError) -> None:
        with job.lock:
            job.fragments.clear()
            job.video.error, job.video.chunks = problem, 0
            job.video.completed_at = int(time.time())
            job.video.status = "failed"
        self.metrics.videos.labels(
            "cancelled" if problem.code in ("cancelled", "server_shutdown") else "failed"
        ).inc()

    def _remove_expired(self) -> None:
        """Remove videos that are too old, or too many."""
        with self._condition:
            ended_jobs = [job for job in self._jobs.values() if job.has_ended]
            completed_jobs = [job for job in ended_jobs if job.video.status == "completed"]
            failed_jobs = [job for job in ended_jobs if job.video.status == "failed"]
            expired_jobs = (
                self.store.find_surplus(completed_jobs)
                + failed_jobs[: max(0, len(failed_jobs) - MAX_FAILURES)]
            )
            for job in expired_jobs:
                del self._jobs[job.id]
        for job in expired_jobs:
            self.store.remove(job.id)
            _log.info("removed: too old, or no room", extra={"video": job.id})

    def _estimate_wait(self) -> int:
        """Estimate the seconds until a place in the queue is free."""
        usual = (
            sum(self._recent_seconds) / len(self._recent_seconds) if self._recent_seconds else 5.0
        )
        return max(1, min(600, math.ceil(usual)))

    def _count_stored_bytes(self) -> float:
        return float(sum(job.video.bytes or 0 for job in self.list_jobs()))

    def _make_video(self, request: GenerationRequest) -> Video:
        fps = self.manifest.video.fps
        return Video(
            id=f"video_{secrets.token_hex(16)}",
            model=self.name,
            created_at=int(time.time()),
            prompt=request.prompt,
            seconds=f"{request.num_frames / fps:g}",
            size=f"{request.width}x{request.height}",
            num_frames=request.num_frames,
            fps=fps,
            seed=request.seed,
            num_inference_steps=request.num_inference_steps,
            deadline_ms=(
                None if request.steps.deadline_s is None else request.steps.deadline_s * 1000
            ),
        )
