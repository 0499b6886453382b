"""Generate a job's video as a file that grows, through `VideoPipeline`.

A causal model's chunk is decoded and appended to the file before the next one begins. A
bidirectional model's latents are complete before the VAE begins, and are then decoded in fragments
of a few frames; so both kinds make a file that grows.
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
from anyflow_deploy.serving.job_progress import JobProgress


class VideoGenerator:
    """Generates the service's videos; only one thread at a time may call `make`.

    Args:
        pipeline: generates frames from prompts.
    """

    def __init__(self, pipeline: VideoPipeline) -> None:
        self._pipeline = pipeline

    @property
    def manifest(self) -> Manifest:
        """Manifest of the bundle that runs."""
        return self._pipeline.manifest

    def check(self, prompt: str) -> None:
        """Refuse a prompt that cannot be encoded; any thread may call this.

        Raises:
            AnyFlowError: an empty prompt, or one that is too long.
        """
        self._pipeline.check_prompt(prompt)

    def make(self, job: Job, path: Path, progress: JobProgress) -> None:
        """Generate a video and write it.

        Args:
            job: the video, with a request.
            path: the file to write.
            progress: records every step; it raises `CancelledError` once the video is cancelled.
        """
        request = job.request
        assert request is not None
        with progress.stage("text"):
            prompt_embeds = self._pipeline.encode_prompt(request.prompt)
        job.check()
        results: list[DeadlineResult | AdaptiveResult] = []
        timer = self._pipeline.step_timer
        policy = request.make_policy(timer, job.stop_event.is_set, results.append)
        tracker = ProgressTracker(request.num_samples)

        def on_step(step: Step) -> None:
            progress.add_step(step, tracker.update(step))

        @contextlib.contextmanager
        def stage(name: str) -> Iterator[None]:
            with progress.stage(name):
                yield
            if name == "transformer":
                _report_sample(results, progress)

        chunks = self._pipeline.generate(
            request, prompt_embeds, policy, on_step=on_step, stage=stage
        )
        size = (request.height, request.width)
        with VideoWriter(path, self.manifest.video.fps, size) as writer, closing(chunks):
            for chunk in chunks:
                assert chunk.frames is not None
                with progress.stage("mp4"):
                    size_in_bytes = writer.append(chunk.frames)
                progress.add_fragment(len(chunk.frames), size_in_bytes)


def _report_sample(results: list[DeadlineResult | AdaptiveResult], progress: JobProgress) -> None:
    """Record that the transitions of a chunk, or of the whole video, are done."""
    progress.finish_sample()
    deadlines = [result for result in results if isinstance(result, DeadlineResult)]
    if deadlines:
        progress.add_deadlines(deadlines)
