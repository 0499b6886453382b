"""A real server for the tests: uvicorn on a free port in a thread, before a maker that does what
the test says.

`PacedGenerator` stands in for text encoder, engine and VAE, which take seconds to export and are
tested elsewhere. It makes real mp4 pieces of flat colours and waits for a permit before every step,
so that a test holds a video wherever it wants to.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np

from anyflow_deploy import MODELS, AnyFlowError
from anyflow_deploy.bundle.manifest import (
    AchievedPrecision,
    GraphRecord,
    Manifest,
    ScheduleDefaults,
    VideoDefaults,
    WeightsSource,
    records_from_ranges,
)
from anyflow_deploy.pipelines.video_io import VideoWriter
from anyflow_deploy.schedule import Step
from anyflow_deploy.serving.access import AccessRules
from anyflow_deploy.serving.app import make_app
from anyflow_deploy.serving.generator import VideoGenerator
from anyflow_deploy.serving.job import Job
from anyflow_deploy.serving.job_progress import JobProgress
from anyflow_deploy.serving.limits import Limits
from anyflow_deploy.serving.metrics import Metrics
from anyflow_deploy.serving.server import Server, configure_uvicorn
from anyflow_deploy.serving.service import Service
from anyflow_deploy.serving.video_store import VideoStore
from anyflow_deploy.shape_ranges import widest_ranges


def fake_manifest(name: str) -> Manifest:
    """As the exporter writes it, without files."""
    a = MODELS[name].architecture
    graphs = ("text", "chunk", "compress") if a.causal else ("transition",)
    return Manifest(
        kind="causal" if a.causal else "bidirectional",
        model=name,
        config=a.as_config(),
        source=WeightsSource(kind="random", location="", seed=0),
        precision="fp32",
        achieved=AchievedPrecision(weight_bytes={}),
        target="cpu",
        graphs={
            graph: GraphRecord(file=f"{graph}.onnx", opset=20, inputs=[], outputs=[])
            for graph in graphs
        },
        ranges=records_from_ranges(widest_ranges(a)),
        schedule=ScheduleDefaults(shift=5.0, steps=4),
        video=VideoDefaults(
            spatial_factor=8,
            temporal_factor=4,
            fps=16,
            text_tokens=512,
            frames=17,
            height=32,
            width=48,
        ),
        tools={},
        files={},
    )


class PacedGenerator(VideoGenerator):
    """See the module.

    Attributes:
        permits: released once for every step that may be made; `free` releases all.
        fault: raised instead of making a video.
    """

    def __init__(self, free: bool = True) -> None:
        self.permits = threading.Semaphore(0)
        self.free = threading.Event()
        self.fault: Exception | None = None
        self.began: list[str] = []
        if free:
            self.free.set()

    def check(self, prompt: str) -> None:
        if "unspeakable" in prompt:
            raise AnyFlowError("the prompt has 600 tokens and the model takes 512; shorten it.")

    def make(self, job: Job, path: Path, progress: JobProgress) -> None:
        request = job.request
        assert request is not None
        self.began.append(request.prompt)
        chunks = (request.shape[0],) if request.plan is None else request.plan.chunks
        total = request.num_inference_steps * len(chunks)
        with VideoWriter(path, 16, (request.height, request.width)) as writer:
            for number, frames in enumerate(chunks):
                for index in range(request.num_inference_steps):
                    while not self.free.is_set() and not self.permits.acquire(timeout=0.02):
                        job.check()
                    progress.add_step(
                        Step(index, request.num_inference_steps, 0, 0, lambda: np.zeros(1)),
                        (number * request.num_inference_steps + index + 1) / total,
                    )
                if self.fault is not None:
                    raise self.fault
                progress.finish_sample()
                count = 1 + 4 * (frames - 1) if number == 0 else 4 * frames
                progress.add_fragment(
                    count,
                    writer.append(
                        np.full(
                            (count, request.height, request.width, 3), 40 * number + 40, np.uint8
                        )
                    ),
                )


@dataclass
class RunningServer:
    """A running server."""

    url: str
    service: Service
    client: httpx.Client
    server: Server

    @property
    def folder(self) -> Path:
        return self.service.store.folder

    def create(self, **fields: object) -> httpx.Response:
        return self.client.post("/v1/videos", json={"prompt": "a red fox", **fields})

    def create_and_wait(self, **fields: object) -> dict[str, object]:
        """A video, when it has ended."""
        answer = self.create(**fields)
        assert answer.status_code == 200, answer.text
        return self.wait_until_ended(answer.json()["id"])

    def wait_until_ended(self, name: str) -> dict[str, object]:
        found: list[dict[str, object]] = []

        def has_ended() -> bool:
            found.append(self.client.get(f"/v1/videos/{name}").json())
            return found[-1]["status"] in ("completed", "failed")

        eventually(has_ended)
        return found[-1]


def eventually(true: Callable[[], object], seconds: float = 300.0) -> None:
    """Wait until something is true; as long as a busy machine may need, since only a failure waits
    that long."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@contextlib.contextmanager
def serving(
    maker: VideoGenerator,
    folder: Path,
    manifest: Manifest | None = None,
    token: str | None = None,
    grace: float = 5.0,
    rules: AccessRules | None = None,
    is_loading: bool = False,
    **limits: object,
) -> Iterator[RunningServer]:
    """A server until the end of the block."""
    manifest = manifest or fake_manifest("far-tiny")
    allowed = replace(Limits(frames=81, pixels=64 * 96), **limits)  # type: ignore[arg-type]
    store = VideoStore(folder, allowed.disk_bytes, allowed.keep_seconds)
    service = Service(
        maker, manifest, store, allowed, manifest.model, Metrics(), is_loading=is_loading
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = Server(
            configure_uvicorn(
                make_app(service, rules or AccessRules(token)), "127.0.0.1", port, allowed
            ),
            service,
            grace,
        )
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        eventually(lambda: server.started)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                yield RunningServer(f"127.0.0.1:{port}", service, client, server)
        finally:
            service.drain(0)
            server.should_exit = True
            thread.join()
            store.close()
