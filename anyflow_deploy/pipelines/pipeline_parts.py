"""The parts of a pipeline: the engine, the text encoder and the VAE.

Each part is loaded once, when it is first needed; all are released together. Text encoder and VAE
come from the model's pipeline folder. Neither that folder nor torch has to be there as long as
nobody needs one of the two.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.engines.engine import Array, BundleEngine
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.pipelines.video import Frames

if TYPE_CHECKING:
    from anyflow_deploy.pipelines.text_encoder import PromptEncoder
    from anyflow_deploy.pipelines.vae import LoadedVae, StreamingDecoder
    from anyflow_deploy.progress import Progress

MAX_CACHED_PROMPTS = 16
"""Prompts whose embeddings are kept (8 MB each with a text encoder of 4096 channels)."""


class PipelineParts:
    """Loads and owns the engine, the text encoder and the VAE.

    Any thread may ask for a part; one part is loaded at a time.

    Args:
        manifest: of the bundle.
        load_engine: makes the engine; takes `progress`.
        folder: with text encoder and VAE, or a Hub id; None for the model's own.
        torch_device: where text encoder and VAE run, as torch names it.
        device_lock: held while one of them computes.
    """

    def __init__(
        self,
        manifest: Manifest,
        load_engine: Callable[..., BundleEngine],
        folder: str | None,
        torch_device: str,
        device_lock: AbstractContextManager[object],
    ) -> None:
        self._manifest = manifest
        self._load_engine = load_engine
        self._folder = folder
        self._torch_device = torch_device
        self._device_lock = device_lock
        self._loading = threading.RLock()
        self._engine: BundleEngine | None = None
        self._text_encoder: PromptEncoder | None = None
        self._vae: LoadedVae | None = None
        self._cached_embeds = functools.lru_cache(MAX_CACHED_PROMPTS)(self._encode)
        self._closed = False

    @property
    def engine(self) -> BundleEngine:
        """The engine.

        Raises:
            AnyFlowError: these parts were closed, or this machine cannot run it.
        """
        return self.load_engine()

    def load_engine(self, progress: Progress | None = None) -> BundleEngine:
        """Return the engine, and load it first if that was not done yet.

        Args:
            progress: where long loading is shown.

        Raises:
            AnyFlowError: these parts were closed, or this machine cannot run it.
        """
        with self._loading:
            self.check_open()
            if self._engine is None:
                self._engine = self._load_engine(progress=progress)
            return self._engine

    @property
    def text_encoder(self) -> PromptEncoder:
        """The text encoder, of which only the tokenizer is loaded until it encodes.

        Raises:
            AnyFlowError: these parts were closed, or the pipeline lacks it.
        """
        with self._loading:
            self.check_open()
            if self._text_encoder is None:
                from anyflow_deploy.pipelines.text_encoder import PromptEncoder

                folder = self._find_folder("tokenizer", "text_encoder")
                self._text_encoder = PromptEncoder(folder, self._torch_device)
            return self._text_encoder

    @property
    def vae(self) -> LoadedVae:
        """The VAE.

        Raises:
            AnyFlowError: these parts were closed, or the pipeline lacks it.
        """
        with self._loading:
            self.check_open()
            if self._vae is None:
                folder = self._find_folder("vae")
                from anyflow_deploy.pipelines.vae import load_vae

                self._vae = load_vae(folder, self._torch_device)
            return self._vae

    def check(self, *, text: bool, vae: bool) -> None:
        """Refuse a folder that lacks the text encoder or the VAE, without loading either.

        Raises:
            CheckpointError: naming what is missing, and how to do without.
        """
        parts = ["tokenizer", "text_encoder"] if text else []
        if vae:
            parts.append("vae")
        if parts:
            self._find_folder(*parts)

    def check_open(self) -> None:
        """Refuse to go on after `close`.

        Raises:
            AnyFlowError: it was closed.
        """
        if self._closed:
            raise AnyFlowError("this pipeline is closed; make another one.")

    def check_prompt(self, prompt: str) -> None:
        """Refuse a prompt that cannot be encoded; from any thread.

        Raises:
            AnyFlowError: an empty prompt, or one that is too long; it is not cut.
        """
        self.text_encoder.check(prompt, self._manifest.video.text_tokens)

    def encode_prompt(self, prompt: str) -> Array:
        """Return a prompt's embeddings, float32 (1, L, D). Those of recent prompts are kept.

        Raises:
            AnyFlowError: see `check_prompt`.
        """
        return self._cached_embeds(prompt)

    def encode_video(self, frames: Frames) -> Array:
        """Return the clean latents, float32 (1, n+1, C, H, W), of uint8 (4n+1, height, width,
        3)."""
        from anyflow_deploy.pipelines.vae import VideoEncoder

        vae = self.vae
        with self._device_lock:
            return VideoEncoder(vae, self._torch_device).encode(frames)

    def open_decoder(self) -> StreamingDecoder:
        """Make a decoder of one video. It does not take the device lock by itself."""
        from anyflow_deploy.pipelines.vae import StreamingDecoder

        return StreamingDecoder(self.vae)

    def release_text_encoder(self) -> None:
        """Release the text encoder; it is loaded again at need."""
        with self._loading:
            self._text_encoder = None

    def close(self) -> None:
        """Release everything."""
        with self._loading:
            engine = self._engine
            self._engine = None
            self._text_encoder = None
            self._vae = None
            self._closed = True
            self._cached_embeds.cache_clear()
        if engine is not None:
            engine.close()

    def _encode(self, prompt: str) -> Array:
        encoder = self.text_encoder
        with self._device_lock:
            embeds = encoder.encode([prompt], self._manifest.video.text_tokens)
        embeds.flags.writeable = False  # many videos share it
        return embeds

    def _find_folder(self, *parts: str) -> Path:
        """Find the model's pipeline; a device that needs neither part does not get here."""
        from anyflow_deploy.pipelines.pipeline_folder import find_pipeline

        return find_pipeline(self._manifest, self._folder, list(parts))
