"""The model's metrics, published among Triton's own (port 8002 unless told otherwise)."""

from __future__ import annotations

import threading
from typing import Any

TRITON_API_LOCK = threading.RLock()
"""Held around every call into Triton's Python backend: servers (seen with 2.51) crash when several
threads call at once."""

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper ends of the histograms' buckets."""


class Metrics:
    """Counters, gauges and histograms of one model instance.

    Args:
        server: Triton's `triton_python_backend_utils`.
        model, instance: labels.
    """

    def __init__(self, server: Any, model: str, instance: str) -> None:
        self._server = server
        self._labels = {"model": model, "instance": instance}
        self._families: list[Any] = []  # Triton drops a family that has no reference
        gauge = server.MetricFamily.GAUGE
        counter = server.MetricFamily.COUNTER
        self._active = self._metric(
            "anyflow_active_streams", "Videos that are being generated", gauge
        )
        self._waiting = self._metric("anyflow_waiting_requests", "Requests in the queue", gauge)
        self._cache = self._metric(
            "anyflow_cache_bytes", "Keys and values of all active streams", gauge
        )
        self._steps = self._metric("anyflow_steps_total", "Transitions of finished chunks", counter)
        self._missed_deadlines = self._metric(
            "anyflow_deadlines_missed_total", "Chunks that came after their deadline", counter
        )
        ends = ("completed", "cancelled", "refused", "failed")
        self._videos = self._family("anyflow_videos_total", "Requests, by how they ended", counter)
        self._end_counters = {
            end: self._videos.Metric(labels={**self._labels, "end": end}) for end in ends
        }
        self._first_chunk = self._histogram(
            "anyflow_first_chunk_seconds", "From the request to its first chunk"
        )
        self._chunk = self._histogram(
            "anyflow_chunk_seconds", "From one chunk of a video to the next"
        )

    def set_streams(self, active: int, waiting: int, cache_bytes: int) -> None:
        """Set the gauges of active streams, waiting requests and bytes of cache."""
        with TRITON_API_LOCK:
            self._active.set(active)
            self._waiting.set(waiting)
            self._cache.set(cache_bytes)

    def count_chunk(
        self, index: int, seconds: float, steps: int, deadline_met: bool | None
    ) -> None:
        """Count a chunk that was sent.

        Args:
            index: 0 for the first of its video.
            seconds: since the request came, or since the chunk before.
            steps: number of its transitions.
            deadline_met: None without a deadline.
        """
        histogram = self._chunk if index else self._first_chunk
        with TRITON_API_LOCK:
            if histogram is not None:
                histogram.observe(seconds)
            self._steps.increment(steps)
            # Later pieces of a bidirectional video repeat the first one's
            if steps and deadline_met is False:
                self._missed_deadlines.increment(1)

    def count_end(self, end: str) -> None:
        """Count a finished request, by its end: completed, cancelled, refused or failed."""
        with TRITON_API_LOCK:
            self._end_counters[end].increment(1)

    def _family(self, name: str, about: str, kind: Any) -> Any:
        family = self._server.MetricFamily(name=name, description=about, kind=kind)
        self._families.append(family)
        return family

    def _metric(self, name: str, about: str, kind: Any) -> Any:
        return self._family(name, about, kind).Metric(labels=self._labels)

    def _histogram(self, name: str, about: str) -> Any:
        kind = getattr(self._server.MetricFamily, "HISTOGRAM", None)
        if kind is None:  # servers before late 2024 have none
            self._server.Logger.log_warn(
                f"this server's Python backend has no histograms; {name} is left out"
            )
            return None
        return self._family(name, about, kind).Metric(labels=self._labels, buckets=list(SECONDS))
