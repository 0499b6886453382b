"""Make one video before the first client's.

It lets runtimes choose kernels and allocate memory, and tells deadlines how long steps take.
"""

from __future__ import annotations

import tempfile
import threading
from contextlib import closing
from pathlib import Path

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.serving.generator import VideoGenerator
from anyflow_deploy.serving.limits import Limits
from anyflow_deploy.serving.metrics import Metrics
from anyflow_deploy.serving.request import VideoRequest
from anyflow_deploy.serving.service import Service
from anyflow_deploy.serving.video_store import VideoStore


def warm_up(generator: VideoGenerator, manifest: Manifest, limits: Limits, name: str) -> None:
    """Make a video of default size with one timed step for each chunk, and discard it.

    Neither the server's folder nor its metrics contain it.

    Raises:
        AnyFlowError: it could not be made.
    """
    end_event = threading.Event()
    with tempfile.TemporaryDirectory(prefix="anyflow-warm-up-") as folder:
        with closing(VideoStore(Path(folder), limits.disk_bytes, limits.keep_seconds)) as store:
            service = Service(generator, manifest, store, limits, name, Metrics())
            try:
                job = service.submit(service.validate(_request(limits)))
                with job.subscribe(lambda: end_event.set() if job.has_ended else None):
                    while not job.has_ended:
                        end_event.wait(1.0)
            finally:
                service.drain(0)
        if job.video.error is not None:
            raise AnyFlowError(f"the warm-up failed: {job.video.error.message}")


def _request(limits: Limits) -> VideoRequest:
    """A request that is within all limits."""
    return VideoRequest(
        prompt="a red fox"[: limits.prompt_characters],
        deadline_ms=min(0.001, limits.deadline_seconds * 1000),
        seed=0,
    )
