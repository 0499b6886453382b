"""What Prometheus is told. One `Metrics` for each server, on a registry of its own.

Times are histograms in seconds, so that first frame and chunk have percentiles; labels are few and
closed, so nothing a client sends can make more of them.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

_SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_LONG = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)


class Metrics:
    """The server's metrics.

    Attributes:
        registry: what `/metrics` writes out.
    """

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter(
            "anyflow_requests", "HTTP requests", ["route", "method", "status"], registry=r
        )
        self.request_seconds = Histogram(
            "anyflow_request_seconds",
            "until the answer began",
            ["route"],
            registry=r,
            buckets=_SHORT,
        )
        self.videos = Counter("anyflow_videos", "videos by how they ended", ["outcome"], registry=r)
        self.refused = Counter(
            "anyflow_refused", "requests for videos that were refused", ["reason"], registry=r
        )
        self.queue_seconds = Histogram(
            "anyflow_queue_seconds", "a video's wait for its turn", registry=r, buckets=_LONG
        )
        self.video_seconds = Histogram(
            "anyflow_video_seconds", "from its turn to its end", registry=r, buckets=_LONG
        )
        self.stage_seconds = Histogram(
            "anyflow_stage_seconds", "of a video, by stage", ["stage"], registry=r, buckets=_LONG
        )
        self.first_frame_seconds = Histogram(
            "anyflow_first_frame_seconds",
            "from a video's turn to its first frames",
            registry=r,
            buckets=_LONG,
        )
        self.chunk_seconds = Histogram(
            "anyflow_chunk_seconds", "between pieces of a video", registry=r, buckets=_LONG
        )
        self.step_seconds = Histogram(
            "anyflow_step_seconds", "of a transition", registry=r, buckets=(0.001, *_SHORT, 60, 120)
        )
        self.frames = Counter("anyflow_frames", "frames made", registry=r)
        self.steps = Counter("anyflow_steps", "transitions made", registry=r)
        self.deadlines = Counter(
            "anyflow_deadlines", "deadlines of chunks or videos", ["outcome"], registry=r
        )
        self.drafts = Counter(
            "anyflow_drafts", "transitions made to learn the pace, and thrown away", registry=r
        )
        self.streams = Gauge("anyflow_streams", "open WebSockets", registry=r)
        for outcome in ("completed", "failed", "cancelled"):
            self.videos.labels(outcome)
        for outcome in ("met", "missed"):
            self.deadlines.labels(outcome)

    def watch(
        self, queued: Callable[[], float], running: Callable[[], float], stored: Callable[[], float]
    ) -> None:
        """Read these whenever somebody asks: videos waiting, videos being made, bytes of finished
        ones."""
        Gauge("anyflow_queued", "videos that wait", registry=self.registry).set_function(queued)
        Gauge("anyflow_running", "videos being made", registry=self.registry).set_function(running)
        Gauge("anyflow_stored_bytes", "of finished videos", registry=self.registry).set_function(
            stored
        )

    def describe(self, **labels: str) -> None:
        """Say once what this server runs."""
        Info("anyflow_build", "what this server runs", registry=self.registry).info(labels)
