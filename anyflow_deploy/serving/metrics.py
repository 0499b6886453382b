"""The metrics for Prometheus: one `Metrics` for each server, on a registry of its own.

Times are histograms in seconds, so that first frame and chunk have percentiles; labels
have few and fixed values, so nothing a client sends can add more.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

_SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_LONG = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)


class Metrics:
    """The server's metrics.

    Attributes:
        registry: the registry that `/metrics` writes.
    """

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter(
            "anyflow_requests", "HTTP requests", ["route", "method", "status"], registry=r
        )
        self.request_seconds = Histogram(
            "anyflow_request_seconds",
            "seconds until the answer began",
            ["route"],
            registry=r,
            buckets=_SHORT,
        )
        self.videos = Counter("anyflow_videos", "videos by how they ended", ["outcome"], registry=r)
        self.refusals = Counter(
            "anyflow_refused", "requests for videos that were refused", ["reason"], registry=r
        )
        self.queue_seconds = Histogram(
            "anyflow_queue_seconds",
            "seconds that a video waited in the queue",
            registry=r,
            buckets=_LONG,
        )
        self.video_seconds = Histogram(
            "anyflow_video_seconds",
            "seconds from the start of a video to its end",
            registry=r,
            buckets=_LONG,
        )
        self.stage_seconds = Histogram(
            "anyflow_stage_seconds",
            "seconds of a video, by stage",
            ["stage"],
            registry=r,
            buckets=_LONG,
        )
        self.first_frame_seconds = Histogram(
            "anyflow_first_frame_seconds",
            "seconds from the start of a video to its first frames",
            registry=r,
            buckets=_LONG,
        )
        self.chunk_seconds = Histogram(
            "anyflow_chunk_seconds",
            "seconds between fragments of a video",
            registry=r,
            buckets=_LONG,
        )
        self.step_seconds = Histogram(
            "anyflow_step_seconds",
            "seconds of a transition",
            registry=r,
            buckets=(0.001, *_SHORT, 60, 120),
        )
        self.frames = Counter("anyflow_frames", "frames made", registry=r)
        self.steps = Counter("anyflow_steps", "transitions made", registry=r)
        self.deadlines = Counter(
            "anyflow_deadlines", "deadlines of chunks or videos", ["outcome"], registry=r
        )
        self.probe_steps = Counter(
            "anyflow_drafts", "single steps made only to measure the speed", registry=r
        )
        self.streams = Gauge("anyflow_streams", "open WebSockets", registry=r)
        for outcome in ("completed", "failed", "cancelled"):
            self.videos.labels(outcome)
        for outcome in ("met", "missed"):
            self.deadlines.labels(outcome)

    def watch(
        self,
        count_queued: Callable[[], float],
        count_running: Callable[[], float],
        count_stored_bytes: Callable[[], float],
    ) -> None:
        """Read these numbers at every scrape.

        Args:
            count_queued: returns the number of videos that wait.
            count_running: returns the number of videos being made.
            count_stored_bytes: returns the bytes of finished videos.
        """
        Gauge("anyflow_queued", "videos in the queue", registry=self.registry).set_function(
            count_queued
        )
        Gauge("anyflow_running", "videos being made", registry=self.registry).set_function(
            count_running
        )
        Gauge(
            "anyflow_stored_bytes", "bytes of finished videos", registry=self.registry
        ).set_function(count_stored_bytes)

    def describe(self, **labels: str) -> None:
        """Set the labels that say what this server runs."""
        Info("anyflow_build", "what this server runs", registry=self.registry).info(labels)
