"""Requests become chunks: text encoder, engine, VAE and mp4, all of them loaded once and shared by all streams.

Nothing here knows of Triton. Any number of threads may `make`; they take turns on the device.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.engines.adaptive_steps import AdaptiveResult
from anyflow_deploy.engines.deadline import DeadlineResult, StepTimer
from anyflow_deploy.engines.engine import Array, BundleEngine
from anyflow_deploy.engines.tritonserver.fair_lock import Turns
from anyflow_deploy.engines.tritonserver.io_spec import OUTPUT_TYPES
from anyflow_deploy.engines.tritonserver.request import Asked
from anyflow_deploy.engines.wrapper import EngineWrapper
from anyflow_deploy.pipelines.text_encoder import PromptEncoder
from anyflow_deploy.pipelines.vae import LoadedVae, StreamingDecoder
from anyflow_deploy.pipelines.video_io import Mp4Pieces
from anyflow_deploy.schedule import Step
from anyflow_deploy.serving.generate import clean_latents

REMEMBERED_PROMPTS = 16
"""Whose embeddings are kept (8 MB each with a text encoder of 4096 channels)."""

Pack = Callable[[Array], tuple[int, NDArray[Any]]]
"""Clean latents of the next piece -> how many frames it has, and the tensor that a client gets."""


@dataclass(frozen=True)
class Made:
    """A piece of a video.

    Attributes:
        index: 0 for the first.
        first_frame: of the video.
        steps: transitions made for it; a bidirectional video's are all made for its first piece.
        deadline_met: None without a deadline.
        output: name of the tensor, one of `OUTPUTS`.
        content: the tensor.
    """

    index: int
    first_frame: int
    steps: int
    deadline_met: bool | None
    output: str
    content: NDArray[Any]


class Studio:
    """See the module.

    Args:
        engine: from `load_engine`.
        text: the model's text encoder; None where prompts are not taken.
        vae: the model's VAE; None where latents are all that is given.
    """

    def __init__(self, engine: BundleEngine, text: PromptEncoder | None, vae: LoadedVae | None) -> None:
        self._turns, self._step_timer = Turns(), StepTimer()
        self._bundle, self._text, self._vae = engine.bundle, text, vae
        self._engine = EngineWrapper(engine, lambda _: self._turns)
        self._words = functools.lru_cache(REMEMBERED_PROMPTS)(self._encoded)

    @property
    def manifest(self) -> Manifest:
        """Of the bundle that runs."""
        return self._bundle.manifest

    def check(self, asked: Asked) -> None:
        """Refuse a prompt that is too long; from any thread.

        Raises:
            AnyFlowError: saying by how much.
        """
        if asked.embeds is None and self._text is not None:
            self._text.check(asked.order.prompt, self.manifest.video.text_tokens)

    def make(self, asked: Asked, check: Callable[[], None]) -> Generator[Made, None, None]:
        """Make a video, chunk by chunk.

        Args:
            asked: what.
            check: called before every piece of work; what it raises ends the video.
        """
        order = asked.order
        check()
        words = self._words(order.prompt) if asked.embeds is None else asked.embeds
        results: list[DeadlineResult | AdaptiveResult] = []
        policy = order.policy(self._step_timer, lambda: False, results.append)
        made = [0]

        def went(step: Step) -> None:
            made[0] = step.index + 1
            check()

        output, pack = OUTPUT_TYPES[asked.output_type], self._packing(asked)
        with closing(clean_latents(self._engine, order, words, policy, went)) as pieces:
            first = 0
            for index, latents in enumerate(pieces):
                check()
                frames, content = pack(latents)
                last = results[-1] if results else None
                met = last.slack >= 0 if isinstance(last, DeadlineResult) else None
                yield Made(index, first, made[0], met, output, content)
                first, made[0] = first + frames, 0
                check()

    def _encoded(self, prompt: str) -> Array:
        assert self._text is not None
        with self._turns:
            return self._text.encode([prompt], self.manifest.video.text_tokens)

    def _packing(self, asked: Asked) -> Pack:
        """For one video, whose pieces come in order."""
        if asked.output_type == "latents":
            return _Latents(self.manifest.video.temporal_factor)
        assert self._vae is not None
        decoder = StreamingDecoder(self._vae)

        def frames(latents: Array) -> tuple[int, NDArray[Any]]:
            with self._turns:
                decoded = decoder.decode(latents)
            return len(decoded), decoded

        if asked.output_type == "frames":
            return frames
        encoder, coded = Mp4Pieces(self.manifest.video.fps, (asked.order.height, asked.order.width)), asked.output_type

        def mp4(latents: Array) -> tuple[int, NDArray[Any]]:
            count, decoded = frames(latents)
            piece = encoder.encode(decoded)
            return count, np.array([base64.b64encode(piece) if coded == "mp4-base64" else piece], dtype=object)

        return mp4


class _Latents:
    """The latents themselves; the first of a video stands for one frame, every later one for `factor`."""

    def __init__(self, factor: int) -> None:
        self._factor, self._begun = factor, False

    def __call__(self, latents: Array) -> tuple[int, NDArray[Any]]:
        frames = self._factor * latents.shape[1] - (0 if self._begun else self._factor - 1)
        self._begun = True
        return frames, np.ascontiguousarray(latents[0])
