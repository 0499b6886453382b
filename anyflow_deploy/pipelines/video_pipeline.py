"""From a prompt to a video: text encoder, engine and VAE, each loaded once, when it is first
needed.

    with VideoPipeline.from_bundle("my-bundle") as pipe:
        pipe("a red fox in the snow", num_inference_steps=4, seed=0).save("fox.mp4")
        for chunk in pipe.stream("a red fox in the snow", num_inference_steps=4):
            show(chunk.frames)

The command line, the HTTP service and Triton make their videos with this class. Whatever can be
refused is refused before anything is loaded. With saved `prompt_embeds` and `output_type="latent"`
neither torch nor diffusers is needed.

A causal model's chunks are decoded before the next one is begun. A bidirectional model's latents
are made at once and decoded in fragments of a few frames, which gives the same frames as all at
once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from anyflow_deploy.bundle.bundle import Bundle, load_bundle
from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.engines.deadline import StepTimer
from anyflow_deploy.engines.engine import Array, BundleEngine, Engine
from anyflow_deploy.engines.registry import (
    DEFAULT_BACKEND,
    check_backend,
    check_kernel_specialization,
    load_engine,
)
from anyflow_deploy.engines.sampler import noise, sample, stream
from anyflow_deploy.engines.step_policy import StepPolicy
from anyflow_deploy.engines.wrapper import EngineWrapper
from anyflow_deploy.pipelines.pipeline_parts import PipelineParts
from anyflow_deploy.pipelines.request import GenerationRequest
from anyflow_deploy.pipelines.video import Frames, Video, VideoChunk
from anyflow_deploy.pipelines.video_job import OutputType, StepCallback, VideoJob
from anyflow_deploy.progress import Progress
from anyflow_deploy.schedule import Step

FRAGMENT_FRAMES = 3
"""Latent frames of a bidirectional video that are decoded together."""

Stage = Callable[[str], AbstractContextManager[object]]
"""Entered around each piece of work: "text", "transformer" (one sample), "vae" (one fragment)."""


class VideoPipeline:
    """See the module.

    Any number of threads may call it where a `device_lock` is given; without one, one at a time.

    Args:
        bundle: from `load_bundle`.
        backend, provider, threads, engine, kernel_specialization, gpu: of the engine, see
            `load_engine` (`gpu` is its `device`).
        pipeline: folder or Hub id with text encoder and VAE; None for the bundle's own.
        torch_device: where text encoder and VAE run, as torch names it.
        device_lock: held for each piece of work on the device.

    Attributes:
        step_timer: the pace of the engine, which deadlines share.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: str = DEFAULT_BACKEND,
        provider: str | None = None,
        threads: int | None = None,
        engine: str | Path | None = None,
        kernel_specialization: str | None = None,
        pipeline: str | Path | None = None,
        gpu: int = 0,
        torch_device: str = "cpu",
        device_lock: AbstractContextManager[object] | None = None,
    ) -> None:
        self.bundle = bundle
        self.step_timer = StepTimer()
        check_backend(backend)
        check_kernel_specialization(backend, kernel_specialization)
        self._shared = device_lock is not None
        self._lock = device_lock if device_lock is not None else contextlib.nullcontext()
        self._parts = PipelineParts(
            bundle.manifest,
            functools.partial(
                load_engine,
                bundle,
                backend,
                provider,
                threads,
                device=gpu,
                engine=engine,
                kernel_specialization=kernel_specialization,
            ),
            None if pipeline is None else str(pipeline),
            torch_device,
            self._lock,
        )

    @classmethod
    def from_bundle(cls, bundle: Bundle | str | Path, **options: Any) -> VideoPipeline:
        """Make a pipeline of a bundle; nothing but the manifest is read yet.

        Args:
            bundle: the folder, or what `load_bundle` returned.
            options: as `VideoPipeline` takes them: backend, provider, threads, engine, pipeline, …

        Raises:
            BundleError: no bundle, or a damaged one.
        """
        return cls(bundle if isinstance(bundle, Bundle) else load_bundle(bundle), **options)

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle that runs."""
        return self.bundle.manifest

    @property
    def engine(self) -> BundleEngine:
        """The engine, loaded when it is first asked for.

        Raises:
            BackendError: this machine cannot run it.
        """
        return self.load_engine()

    def load_engine(self, progress: Progress | None = None) -> BundleEngine:
        """Return the engine, and load it first if that was not done yet.

        Args:
            progress: where long loading is shown.

        Raises:
            BackendError: this machine cannot run it.
        """
        return self._parts.load_engine(progress)

    def load(
        self, *, text: bool = True, vae: bool = True, progress: Progress | None = None
    ) -> None:
        """Load everything now, as a server does before it listens.

        Args:
            text, vae: load these too.
            progress: where long loading of the engine is shown.

        Raises:
            CheckpointError: the model's pipeline lacks a part.
        """
        self.check_parts(text=text, vae=vae)
        if text:
            self._parts.text_encoder.load()
        if vae:
            _ = self._parts.vae
        self.load_engine(progress)

    def close(self) -> None:
        """Release the engine, the text encoder and the VAE."""
        self._parts.close()

    def __enter__(self) -> VideoPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_parts(self, *, text: bool, vae: bool) -> None:
        """Refuse a pipeline that lacks the text encoder or the VAE, without loading either.

        Raises:
            CheckpointError: naming what is missing, and how to do without.
        """
        self._parts.check(text=text, vae=vae)

    def check_prompt(self, prompt: str) -> None:
        """Refuse a prompt that cannot be encoded; from any thread.

        Raises:
            AnyFlowError: an empty prompt, or one that is too long; it is not cut.
        """
        self._parts.check_prompt(prompt)

    def encode_prompt(self, prompt: str) -> Array:
        """Return a prompt's embeddings, float32 (1, L, D). Those of recent prompts are kept.

        Raises:
            AnyFlowError: see `check_prompt`.
        """
        return self._parts.encode_prompt(prompt)

    def encode_video(self, frames: Frames) -> Array:
        """Return the clean latents of a clip or a picture, as the VAE makes them.

        Args:
            frames: uint8 (4n+1, height, width, 3).

        Returns:
            float32 (1, n+1, C, H, W).
        """
        return self._parts.encode_video(frames)

    def unload_text_encoder(self) -> None:
        """Release the text encoder, which may be larger than the rest; it is loaded again at
        need."""
        self._parts.release_text_encoder()

    def __call__(
        self,
        prompt: str | None = None,
        *,
        prompt_embeds: ArrayLike | None = None,
        num_inference_steps: int | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        image: Any = None,
        video: Any = None,
        policy: StepPolicy | None = None,
        callback_on_step_end: StepCallback | None = None,
        output_type: OutputType = "np",
        **more: Any,
    ) -> Video:
        """Make a video.

        Args:
            prompt: what to show.
            prompt_embeds: its embeddings, float32 (L, D) or (B, L, D), in place of `prompt`. A
                bidirectional bundle makes the latents of B > 1 videos at once.
            num_inference_steps: transitions of the video (of each chunk); None for the bundle's.
                With `deadline_s` or `target_psnr`, the most there may be.
            num_frames: 4n+1; None for the bundle's default.
            height, width: pixels, multiples of 16; None for the bundle's default.
            seed: of the noise; the same on every machine.
            image: causal: a picture that the video begins with: a path, bytes, an open file, a PIL
                picture, or uint8 (height, width, 3).
            video: causal: a clip that it continues: a path, bytes or an open file, of which
                frames are taken at the model's rate; or uint8 (4n+1, height, width, 3).
            policy: decides the steps, in place of every other setting of them.
            callback_on_step_end: called after each transition with (pipeline, step, timestep,
                {"step": `Step`}), where `Step.read()` fetches the latents.
            output_type: "np" for frames, "latent" for latents alone.
            more: further settings by name: `deadline_s` (seconds for the steps of the video, or of
                each chunk), `target_psnr` (decibels, see `AdaptiveSteps`), `sigmas`, `shift`, and
                of a causal model `chunks`, `window` and `first_steps`, see `GenerationRequest` and
                `StepSettings`, and `fit`, `background` and `take`, see `ContextOptions`.

        Returns:
            The video, with the report of how it was made.

        Raises:
            AnyFlowError: what cannot be made, before anything is loaded.
        """
        job = self._prepare(
            prompt,
            prompt_embeds=prompt_embeds,
            num_inference_steps=num_inference_steps,
            num_frames=num_frames,
            height=height,
            width=width,
            seed=seed,
            image=image,
            video=video,
            policy=policy,
            callback_on_step_end=callback_on_step_end,
            output_type=output_type,
            **more,
        )
        with closing(self._run(job)) as chunks:
            made = Video.from_chunks(chunks, self.manifest.video.fps)
        return dataclasses.replace(made, report=job.report())

    def stream(
        self, prompt: str | None = None, **options: Any
    ) -> Generator[VideoChunk, None, None]:
        """Make a video chunk by chunk; each chunk is decoded before the next one is begun.

        Closing the iterator at any moment ends the work and releases the cache.

        Args:
            prompt: what to show.
            options: as a call of the pipeline takes them.

        Returns:
            An iterator over the chunks, those given by `image` or `video` included. A bidirectional
            model's latents are made at once and come in fragments.

        Raises:
            AnyFlowError: what cannot be made; raised at once, before anything is loaded.
        """
        return self._run(self._prepare(prompt, **options))

    def generate(
        self,
        request: GenerationRequest,
        prompt_embeds: Array,
        policy: StepPolicy,
        *,
        context: Array | None = None,
        decode: bool = True,
        on_step: Callable[[Step], None] | None = None,
        stage: Stage = contextlib.nullcontext,
    ) -> Generator[VideoChunk, None, None]:
        """Make the chunks of a request that was checked already, as servers and commands do.

        Args:
            request: from `GenerationRequest.from_manifest`, with this bundle's manifest.
            prompt_embeds: float32 (B, L, D).
            policy: decides the steps, such as `request.make_policy(self.step_timer)`.
            context: clean latents of the first chunk or chunks, float32 (1, f, C, H, W).
            decode: make frames of the latents, of one video.
            on_step: called after each transition; an exception it raises ends the video.
            stage: a context around each piece of work.

        Returns:
            An iterator over the chunks; closing it releases the cache.
        """
        decoder = None
        factor = request.temporal_factor
        first_latent = 0
        parts = self._sample(request, prompt_embeds, policy, context, on_step, stage)
        with closing(parts):
            for index, (latents, given) in enumerate(parts):
                frames = None
                if decode:
                    with stage("vae"):
                        decoder = decoder or self._parts.open_decoder()
                        with self._lock:
                            frames = decoder.decode(latents)
                first_frame = max(0, (first_latent - 1) * factor + 1)
                yield VideoChunk(index, first_frame, frames, latents, given)
                first_latent += latents.shape[1]

    def _sample(
        self,
        request: GenerationRequest,
        prompt_embeds: Array,
        policy: StepPolicy,
        context: Array | None,
        on_step: Callable[[Step], None] | None,
        stage: Stage,
    ) -> Generator[tuple[Array, bool], None, None]:
        """Make clean latents, part by part, and say of each whether it was given."""
        engine: Engine = self.engine
        if self._shared:
            engine = EngineWrapper(engine, lambda _: self._lock)
        start = noise((len(prompt_embeds), *request.shape), request.seed)
        plan = request.plan
        if plan is None:
            with stage("transformer"):
                whole = sample(engine, start, prompt_embeds, policy, on_step=on_step)
            for first in range(0, whole.shape[1], FRAGMENT_FRAMES):
                yield whole[:, first : first + FRAGMENT_FRAMES], False
            return
        chunks = stream(
            engine, start, prompt_embeds, policy, plan.chunks, context, plan.window, on_step
        )
        with closing(chunks):
            for _ in plan.chunks:
                with stage("transformer"):
                    chunk = next(chunks)
                yield chunk.latents, chunk.given

    def _prepare(self, prompt: str | None, **options: Any) -> VideoJob:
        """Check everything that can be checked before anything is loaded."""
        self._parts.check_open()
        job = VideoJob.from_manifest(self.manifest, prompt, **options)
        self.check_parts(text=prompt is not None, vae=job.decode or job.context is not None)
        if prompt is not None:
            self.check_prompt(prompt)
        return job

    def _run(self, job: VideoJob) -> Generator[VideoChunk, None, None]:
        """Carry a job out, from its prompt on."""
        embeds = job.prompt_embeds
        if job.prompt is not None:
            with job.timer.time("text"):
                embeds = self.encode_prompt(job.prompt)
        assert embeds is not None
        with job.timer.time("engine"):
            _ = self.engine
        context = None
        if job.context is not None:
            with job.timer.time("vae"):
                context = self.encode_video(job.context)
        policy = job.policy
        if policy is None:
            policy = job.request.make_policy(self.step_timer, on_end=job.results.append)
        last = [0]

        def on_step(step: Step) -> None:
            last[0] = step.index + 1
            job.tell_step(self, step)

        @contextlib.contextmanager
        def stage(name: str) -> Iterator[None]:
            last[0] = 0
            with job.timer.time(name):
                yield
            if name == "transformer" and last[0]:
                job.steps.append(last[0])

        yield from self.generate(
            job.request,
            embeds,
            policy,
            context=context,
            decode=job.decode,
            on_step=on_step,
            stage=stage,
        )
