"""An order becomes a video file: text encoder, engine, VAE and mp4, all of them loaded once.

A causal model's chunks are decoded and put into the file before the next one is begun. A bidirectional model's latents are whole
before the VAE begins, and are then decoded in pieces of a few frames, which gives the same frames as all at once; so both kinds
make a file that grows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Protocol

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.engines.adaptive_steps import AdaptiveResult
from anyflow_deploy.engines.deadline import DeadlineResult, StepTimer
from anyflow_deploy.engines.engine import Array, BundleEngine
from anyflow_deploy.engines.step_policy import ProgressTracker
from anyflow_deploy.pipelines.text_encoder import PromptEncoder
from anyflow_deploy.pipelines.vae import LoadedVae, StreamingDecoder
from anyflow_deploy.pipelines.video_io import VideoWriter
from anyflow_deploy.schedule import Step
from anyflow_deploy.serving.generate import clean_latents
from anyflow_deploy.serving.job import Job
from anyflow_deploy.serving.job_progress import Report

REMEMBERED_PROMPTS = 16
"""Whose embeddings are kept (8 MB each with a text encoder of 4096 channels)."""


class Maker(Protocol):
    """What a service needs of whoever makes the videos."""

    def check(self, prompt: str) -> None:
        """Refuse a prompt that cannot be encoded; from any thread.

        Raises:
            AnyFlowError: saying why.
        """
        ...

    def make(self, job: Job, path: Path, report: Report) -> None:
        """Make a video.

        Args:
            job: with an order.
            path: of the file to write.
            report: told of everything; it raises `Cancelled` where nobody wants the video any more.
        """
        ...


class PipelineMaker:
    """See the module. One thread at a time may `make`.

    Args:
        engine: from `load_engine`.
        text: the model's text encoder.
        vae: the model's VAE.
    """

    def __init__(self, engine: BundleEngine, text: PromptEncoder, vae: LoadedVae) -> None:
        self._engine, self._text, self._vae = engine, text, vae
        self._step_timer, self._tokens = StepTimer(), engine.bundle.manifest.video.text_tokens
        self._words = functools.lru_cache(REMEMBERED_PROMPTS)(lambda prompt: text.encode([prompt], self._tokens))

    @property
    def manifest(self) -> Manifest:
        """Of the bundle that runs."""
        return self._engine.bundle.manifest

    def check(self, prompt: str) -> None:
        """See `Maker`."""
        self._text.check(prompt, self._tokens)

    def make(self, job: Job, path: Path, report: Report) -> None:
        """See `Maker`."""
        order = job.order
        assert order is not None
        with report.stage("text"):
            words = self._words(order.prompt)
        job.check()
        latents = self._latents(job, words, report)
        with VideoWriter(path, self.manifest.video.fps, (order.height, order.width)) as writer, closing(latents):
            decoder = StreamingDecoder(self._vae)
            for piece in latents:
                with report.stage("vae"):
                    frames = decoder.decode(piece)
                with report.stage("mp4"):
                    size = writer.append(frames)
                report.piece(len(frames), size)

    def _latents(self, job: Job, words: Array, report: Report) -> Generator[Array, None, None]:
        """The video's clean latents, piece by piece."""
        order = job.order
        assert order is not None
        results: list[DeadlineResult | AdaptiveResult] = []
        policy = order.policy(self._step_timer, job.stop_event.is_set, results.append)
        tracker = ProgressTracker(order.samples)

        def on_step(step: Step) -> None:
            report.step(step, tracker.update(step))

        with closing(clean_latents(self._engine, order, words, policy, on_step)) as pieces:
            for index in itertools.count():
                with report.stage("transformer"):
                    piece = next(pieces, None)
                if piece is None:
                    return
                if order.plan is not None or index == 0:  # a bidirectional video is whole with its first piece
                    _say(results, report)
                yield piece


def _say(results: list[DeadlineResult | AdaptiveResult], report: Report) -> None:
    """The transitions of a chunk, or of the whole, are done."""
    report.sampled()
    deadlines = [result for result in results if isinstance(result, DeadlineResult)]
    if deadlines:
        report.deadlines(deadlines)
