"""A job becomes a video file that grows: the service's use of `VideoPipeline`.

A causal model's chunks are decoded and put into the file before the next one is begun. A
bidirectional model's latents are whole before the VAE begins, and are then decoded in fragments of
a few frames; so both kinds make a file that grows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.engines.adaptive_steps import AdaptiveResult
from anyflow_deploy.engines.deadline import DeadlineResult
from anyflow_deploy.engines.step_policy import ProgressTracker
from anyflow_deploy.pipelines.video_io import VideoWriter
from anyflow_deploy.pipelines.video_pipeline import VideoPipeline
from anyflow_deploy.schedule import Step
from anyflow_deploy.serving.job import Job
from anyflow_deploy.serving.job_progress import Report


class VideoGenerator:
    """Makes the service's videos; one thread at a time may call `make`.

    Args:
        pipeline: makes frames of prompts.
    """

    def __init__(self, pipeline: VideoPipeline) -> None:
        self._pipeline = pipeline

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle that runs."""
        return self._pipeline.manifest

    def check(self, prompt: str) -> None:
        """Refuse a prompt that cannot be encoded; from any thread.

        Raises:
            AnyFlowError: saying why.
        """
        self._pipeline.check_prompt(prompt)

    def make(self, job: Job, path: Path, report: Report) -> None:
        """Make a video and write it.

        Args:
            job: with a request.
            path: of the file to write.
            report: told of everything; it raises `CancelledError` where nobody wants the video any
                more.
        """
        request = job.request
        assert request is not None
        with report.stage("text"):
            prompt_embeds = self._pipeline.encode_prompt(request.prompt)
        job.check()
        results: list[DeadlineResult | AdaptiveResult] = []
        timer = self._pipeline.step_timer
        policy = request.make_policy(timer, job.stop_event.is_set, results.append)
        tracker = ProgressTracker(request.num_samples)

        def on_step(step: Step) -> None:
            report.step(step, tracker.update(step))

        @contextlib.contextmanager
        def stage(name: str) -> Iterator[None]:
            with report.stage(name):
                yield
            if name == "transformer":
                _report_sample(results, report)

        chunks = self._pipeline.generate(
            request, prompt_embeds, policy, on_step=on_step, stage=stage
        )
        size = (request.height, request.width)
        with VideoWriter(path, self.manifest.video.fps, size) as writer, closing(chunks):
            for chunk in chunks:
                assert chunk.frames is not None
                with report.stage("mp4"):
                    written = writer.append(chunk.frames)
                report.piece(len(chunk.frames), written)


def _report_sample(results: list[DeadlineResult | AdaptiveResult], report: Report) -> None:
    """The transitions of a chunk, or of the whole video, are done."""
    report.finish_sample()
    deadlines = [result for result in results if isinstance(result, DeadlineResult)]
    if deadlines:
        report.deadlines(deadlines)
