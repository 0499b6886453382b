"""The queue, the thread that makes videos, and everything that is known of them.

Nothing here knows of HTTP. Clients' threads (or the event loop) submit, look, cancel and delete;
one thread takes the oldest request and has it made. All of the service's own state is under one
lock, held for moments only, never while a video is made.
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
from anyflow_deploy.serving.job_progress import Report
from anyflow_deploy.serving.limits import Limits
from anyflow_deploy.serving.metrics import Metrics
from anyflow_deploy.serving.request import VideoRequest, validate_request
from anyflow_deploy.serving.video_store import VideoStore

_log = logging.getLogger("anyflow.serve")

REMEMBERED_FAILURES = 1000
"""Videos that failed are only a few words; more than this many are forgotten, oldest first."""

_TIDY_EVERY = 30.0
_SHUTDOWN = JobError(
    code="server_shutdown",
    message="the server was stopped before this video was finished; ask again later.",
)
_CANCELLED = JobError(code="cancelled", message="cancelled on request; nothing of it was kept.")


class BusyError(AnyFlowError):
    """The queue is full.

    Attributes:
        seconds: after which it is worth asking again.
    """

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(
            f"{waiting} videos wait already, and this server takes no more. Ask again in"
            f" {seconds} s."
        )
        self.seconds = seconds


class ClosingError(AnyFlowError):
    """The server is being stopped."""


class Service:
    """See the module.

    Args:
        generator: makes the videos.
        manifest: of the bundle.
        shelf: keeps them.
        limits: of this server.
        name: what the model is called here.
        metrics: told of everything.
    """

    def __init__(
        self,
        generator: VideoGenerator,
        manifest: Manifest,
        store: VideoStore,
        limits: Limits,
        name: str,
        metrics: Metrics,
    ) -> None:
        self.generator = generator
        self.manifest = manifest
        self.limits = limits
        self.name = name
        self.metrics = metrics
        self.store = store
        self._jobs: dict[str, Job] = {job.id: job for job in store.restore()}  # oldest first
        self._queue: deque[Job] = deque()
        self._running: Job | None = None
        self._closing = False
        self._recent: deque[float] = deque(maxlen=5)
        self._news = threading.Condition()
        self._tidy()
        metrics.watch(
            lambda: len(self._queue),
            lambda: float(self._running is not None),
            self._count_stored_bytes,
        )
        self._thread = threading.Thread(target=self._work, name="anyflow-videos", daemon=True)
        self._thread.start()

    # Asked by clients

    def validate(self, request: VideoRequest) -> GenerationRequest:
        """Check a request; raises `InvalidRequestError`."""
        return validate_request(request, self.manifest, self.limits, self.name)

    def submit(self, request: GenerationRequest, request_id: str = "") -> Job:
        """Put a request into the queue.

        Raises:
            BusyError: the queue is full.
            ClosingError: the server is being stopped.
        """
        job = Job(self._video(request), request, request_id)
        with self._news:
            if self._closing:
                raise ClosingError(
                    "the server is being stopped and takes no more videos; ask again later."
                )
            if len(self._queue) >= self.limits.queue:
                self.metrics.refused.labels("queue").inc()
                raise BusyError(len(self._queue), self._wait())
            self._jobs[job.id] = job
            self._queue.append(job)
            self._news.notify()
        _log.info("queued", extra={"request": request_id, "video": job.id})
        return job

    def get(self, name: str) -> Job | None:
        """A video by its id."""
        with self._news:
            return self._jobs.get(name)

    def all(self) -> list[Job]:
        """All videos, oldest first."""
        with self._news:
            return list(self._jobs.values())

    def snapshot(self, job: Job) -> Video:
        """What clients see of a video now."""
        with self._news:
            position = (
                self._queue.index(job) + (self._running is not None) if job in self._queue else None
            )
            video = job.snapshot()
        return video.model_copy(update={"queue_position": position})

    def cancel(self, job: Job, reason: JobError = _CANCELLED) -> None:
        """Nobody wants this video: at once if it waits, else after the transition that runs. What
        has ended stays as it is."""
        with self._news:
            if job in self._queue:
                self._queue.remove(job)
                self._fail(job, reason)
            elif not job.ended:
                job.reason = job.reason or reason
                job.cancel_event.set()
        job.notify()

    def delete(self, job: Job) -> None:
        """Forget a video and remove its file; one that is not finished is cancelled."""
        self.cancel(job)
        with self._news:
            self._jobs.pop(job.id, None)
            running = self._running is job
        if not running:  # else its folder goes when the transition that runs is done
            self.store.remove(job.id)
        _log.info("deleted", extra={"video": job.id})

    @property
    def waiting(self) -> int:
        """Videos in the queue."""
        return len(self._queue)

    @property
    def healthy(self) -> bool:
        """Videos are being taken and made."""
        return self._thread.is_alive() and not self._closing

    # Stopping

    def drain(self, grace: float) -> None:
        """Take no more videos, give up those that wait, and let the one being made finish.

        Args:
            grace: seconds it has for that; it is then cancelled between two transitions.
        """
        with self._news:
            self._closing = True
            self._news.notify_all()
            waiting = list(self._queue)
        for job in waiting:
            self.cancel(job, _SHUTDOWN)
        self._thread.join(max(0.0, grace))
        self.abandon()
        self._thread.join()

    def abandon(self) -> None:
        """Cancel the video that is being made, because the server stops."""
        running = self._running
        if running is not None:
            self.cancel(running, _SHUTDOWN)

    # The thread

    def _work(self) -> None:
        while True:
            with self._news:
                if not self._queue and not self._closing:
                    self._news.wait(_TIDY_EVERY)
                if self._closing and not self._queue:
                    return
                job = self._queue.popleft() if self._queue else None
                self._running = job
            if job is not None:
                self._make(job)
                with self._news:
                    self._running = None
                    deleted = job.id not in self._jobs
                if deleted:
                    self.store.remove(job.id)
                job.notify()
            self._tidy()

    def _make(self, job: Job) -> None:
        """Make one video; whatever happens, the thread goes on."""
        about = {"request": job.request_id, "video": job.id}
        self._begin(job)
        report, problem = Report(job, self.metrics), None
        try:
            self.generator.make(job, self.store.begin(job.id), report)
            report.ended()
            self._finish(job)
            self._recent.append(job.video.timings["total"])
        except CancelledError:
            problem = job.reason or _CANCELLED
        except AnyFlowError as error:
            problem = JobError(code="invalid_request", message=str(error))
        except OSError as error:
            _log.exception("failed", extra=about)
            problem = JobError(
                code="server_error", message=f"the video could not be written: {error.strerror}."
            )
        except Exception:  # noqa: BLE001 - the next video may do better; this one is in the log
            _log.exception("failed", extra=about)
            where = job.request_id or job.id
            problem = JobError(
                code="server_error",
                message=f"an error of the server; its log has it under {where}.",
            )
        if problem is not None:
            report.ended()
            self.store.remove(job.id)
            self._fail(job, problem)
        how = "completed" if problem is None else problem.code
        _log.info("%s after %.3f s", how, job.video.timings["total"], extra=about)

    def _begin(self, job: Job) -> None:
        waited = time.monotonic() - job.created
        self.metrics.queue_seconds.observe(waited)
        with job.lock:
            job.video.status = "in_progress"
            job.video.timings["queued"] = round(waited, 4)
        _log.info(
            "begun after %.3f s in the queue",
            waited,
            extra={"request": job.request_id, "video": job.id},
        )
        job.notify()

    def _finish(self, job: Job) -> None:
        """The file is whole: say so, on disk first."""
        done = int(time.time())
        finished = {
            "bytes": self.store.path(job.id).stat().st_size,
            "completed_at": done,
            "expires_at": done + int(self.limits.keep_seconds),
            "progress": 100,
            "status": "completed",
        }
        self.store.finish(job, job.video.model_copy(update=finished))
        with job.lock:
            for name, value in finished.items():
                setattr(job.video, name, value)
        self.metrics.videos.labels("completed").inc()

    def _fail(self, job: Job, problem: JobError) -> None:
        with job.lock:
            job.pieces.clear()
            job.video.error, job.video.chunks = problem, 0
            job.video.completed_at = int(time.time())
            job.video.status = "failed"
        self.metrics.videos.labels(
            "cancelled" if problem.code in ("cancelled", "server_shutdown") else "failed"
        ).inc()

    def _tidy(self) -> None:
        """Remove what is too old or too much."""
        with self._news:
            ended = [job for job in self._jobs.values() if job.ended]
            finished = [job for job in ended if job.video.status == "completed"]
            failed = [job for job in ended if job.video.status == "failed"]
            gone = (
                self.store.surplus(finished) + failed[: max(0, len(failed) - REMEMBERED_FAILURES)]
            )
            for job in gone:
                del self._jobs[job.id]
        for job in gone:
            self.store.remove(job.id)
            _log.info("removed: too old, or no room", extra={"video": job.id})

    def _wait(self) -> int:
        """Seconds until the running video should be done, and a place in the queue free."""
        usual = sum(self._recent) / len(self._recent) if self._recent else 5.0
        return max(1, min(600, math.ceil(usual)))

    def _count_stored_bytes(self) -> float:
        return float(sum(job.video.bytes or 0 for job in self.all()))

    def _video(self, request: GenerationRequest) -> Video:
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
