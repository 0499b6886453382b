"""`anyflow-generate`: a prompt becomes a video.

A bidirectional bundle makes the whole video at once (`sample`), a causal one chunk by chunk (`stream`); they share
everything else. With `--stream` each chunk is decoded and put on disk before the next is begun. Whatever can be refused
is refused before text encoder and engine are loaded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, PositiveInt
from rich.markup import escape

from anyflow_deploy.bundle.bundle import Bundle, load_bundle
from anyflow_deploy.cli.options import Numbers, Options, run
from anyflow_deploy.cli.sensitivity import Decibels
from anyflow_deploy.cli.step_options import Seconds, step_settings
from anyflow_deploy.cli.step_report import StepReport
from anyflow_deploy.engines.engine import Array, BundleEngine
from anyflow_deploy.engines.kv_cache import CachePlan, check_budget
from anyflow_deploy.engines.registry import load_engine
from anyflow_deploy.engines.sampler import Chunk, noise, sample, stream
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.progress import RichProgress, console

LATENTS_SUFFIX = ".safetensors"

CAUSAL_FLAGS = ("stream", "image", "video", "chunks", "first_steps", "cache_budget", "window")
"""Flags that mean nothing to a bidirectional bundle."""

Chunks = Annotated[tuple[PositiveInt, ...], BeforeValidator(lambda v: v.split(",") if isinstance(v, str) else v)]


class GenerateOptions(Options):
    """Generate a video: text encoder, engine, VAE, mp4. The number of steps is free: more steps, better video.

    On a device without the text encoder, give --prompt-embeds FILE (made elsewhere with --save-prompt-embeds);
    without the VAE, an --output that ends in .safetensors takes the latents. A causal bundle (far-...) makes the video
    chunk by chunk: with --stream it can be watched meanwhile, and it may begin with a picture or a clip of yours.

    --deadline makes as many steps as fit, for the whole video or for each chunk anew. It covers the steps alone: text
    encoder, what a stream remembers, VAE and file come on top. It is missed by one step at most. The first Ctrl-C then
    finishes with one jump, the second interrupts. --target-quality doubles the steps until one jump and two half jumps
    agree; that costs nearly twice the steps it picks. --steps is then the most either may take."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("bundle",)
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        'anyflow-generate bundle --prompt "a red fox in the snow" --steps 4 --output fox.mp4',
        'anyflow-generate bundle --prompt "a red fox" --save-prompt-embeds fox.safetensors --output fox.mp4',
        "anyflow-generate bundle --prompt-embeds fox.safetensors --steps 8 --output latents.safetensors",
        'anyflow-generate bundle --prompt "a red fox" --deadline 1500ms --output fox.mp4',
        'anyflow-generate bundle --prompt "a red fox" --target-quality 30dB --output fox.mp4',
        'anyflow-generate far-bundle --prompt "a red fox" --stream --image first.png --output fox.mp4',
    )

    bundle: Path = Field(description="the bundle's folder")
    prompt: str | None = Field(None, description="what to show")
    prompt_embeds: Path | None = Field(None, description="saved embeddings, in place of --prompt and the text encoder")
    save_prompt_embeds: Path | None = Field(None, description="save the prompt's embeddings here")
    output: Path = Field(Path("video.mp4"), description="video, or latents (.safetensors)")
    overwrite: bool = Field(False, description="replace --output and --save-prompt-embeds")
    steps: int | None = Field(None, ge=1, le=1000, description="transitions (default: the manifest's)")
    shift: float | None = Field(None, gt=0, description="timestep shift (default: the manifest's)")
    sigmas: Numbers | None = Field(None, description="your own noise levels, as 1,0.9,0.6; in place of --steps and --shift")
    deadline: Seconds | None = Field(None, description="time for the steps, as 1500ms, 1.5s or 2m; causal: of each chunk")
    target_quality: Decibels | None = Field(None, description="PSNR to reach against half as many steps, as 30dB")
    frames: int | None = Field(None, ge=1, description="4n+1 (default: the manifest's)")
    height: int | None = Field(None, ge=1, description="pixels, a multiple of 16")
    width: int | None = Field(None, ge=1, description="pixels, a multiple of 16")
    seed: int = Field(0, ge=0, description="of the noise; the same on every machine")
    stream: bool = Field(False, description="causal: --output grows chunk by chunk and can be played meanwhile (.mp4)")
    image: Path | None = Field(None, description="causal: a picture that the video begins with")
    video: Path | None = Field(None, description="causal: a clip of 4n+1 frames that the video continues")
    chunks: Chunks | None = Field(None, description="causal: latent frames of each chunk, as 1,3,3 (default: the model's)")
    first_steps: int | None = Field(None, ge=1, le=1000, description="causal: transitions of the first chunk that is made")
    window: int | None = Field(None, ge=1, description="causal: remember the first and this many of the newest old chunks only")
    cache_budget: float | None = Field(None, gt=0, description="causal: refuse a cache of more than this many GB")
    backend: str = Field("onnxruntime", description="backend of the engine")
    provider: str | None = Field(None, description="what the engine runs on: cpu or cuda (default cpu; tensorrt: cuda)")
    threads: int | None = Field(None, ge=1, description="CPU threads of the engine")
    engine: str | None = Field(None, description="name or path of a built engine, where the backend has several")
    pipeline: str | None = Field(None, description="pipeline folder or Hub id with text encoder and VAE, if not the bundle's own")


class Stopwatch:
    """Seconds of each stage, for the closing line; a stage that comes again is added up."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Time a stage."""
        started = time.perf_counter()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - started

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.stages.items())


@dataclass(frozen=True)
class Job:
    """What is to be made, checked.

    Attributes:
        steps: decides the steps, and shows them.
        shape: (F, C, H, W) of the latents.
        plan: of a causal bundle's chunks and cache; None for a bidirectional one.
        given: uint8 (frames, height, width, 3) that the video begins with.
    """

    steps: StepReport
    shape: tuple[int, int, int, int]
    plan: CachePlan | None
    given: NDArray[np.uint8] | None


def generate(options: GenerateOptions) -> int:
    """Do it; returns the exit status."""

    _check(options)
    watch = Stopwatch()
    with watch.time("bundle"):
        bundle = load_bundle(options.bundle)
    job = _job(options, bundle)
    parts = ["tokenizer", "text_encoder"] if options.prompt is not None else []
    parts += ["vae"] if options.output.suffix != LATENTS_SUFFIX or job.given is not None else []
    pipeline = _pipeline(options, bundle, parts) if parts else Path()
    with watch.time("text"):
        words = _words(options, bundle, pipeline)
    with watch.time("engine"):
        engine = load_engine(bundle, options.backend, options.provider, options.threads, engine=options.engine)
    with closing(engine):
        first_frame = _Work(options, engine, words, job, pipeline, watch).done()
    for line in job.steps.summary_lines():
        console.print(line)
    if job.plan is not None and first_frame is not None:
        console.print(f"first frame made here on disk after {first_frame:.2f} s")
    console.print(f"[green]wrote[/] [bold]{escape(str(options.output))}[/] ({watch})")
    return 0


def _words(options: GenerateOptions, bundle: Bundle, pipeline: Path) -> Array:
    """Prompt embeddings (B, L, D), read or made, and saved if asked."""
    from anyflow_deploy.pipelines import text_encoder

    if options.prompt_embeds is not None:
        words, prompts = text_encoder.load_embeddings(options.prompt_embeds)
    else:
        prompts = [str(options.prompt)]
        words = text_encoder.encoded_prompts(pipeline, prompts, bundle.manifest.video.text_tokens)
    if len(words) != 1 and (options.output.suffix != LATENTS_SUFFIX or bundle.manifest.kind == "causal"):
        raise AnyFlowError(
            f"{options.prompt_embeds} holds {len(words)} prompts, and {options.output} takes one video. Give one prompt's "
            "embeddings; a bidirectional bundle makes several videos' latents at once (--output latents.safetensors)."
        )
    if options.save_prompt_embeds is not None:
        text_encoder.save_embeddings(options.save_prompt_embeds, words, prompts)
    return words


@dataclass(frozen=True)
class _Work:
    """Making and writing one video, once everything is loaded."""

    options: GenerateOptions
    engine: BundleEngine
    words: Array
    job: Job
    pipeline: Path
    watch: Stopwatch

    def done(self) -> float | None:
        """Do it; seconds from the first transition to the first frame on disk, None where only latents are written."""
        start, started = noise((len(self.words), *self.job.shape), self.options.seed), time.perf_counter()
        if self.job.plan is None:
            return self._written(self._whole(start), started)
        context = self._context()
        if self.options.stream:
            return self._grown(start, context)
        started = time.perf_counter()
        with closing(self._chunks(self.job.plan, start, context)) as chunks:
            latents = np.concatenate([chunk.latents for chunk in chunks], axis=1)
        return self._written(latents, started)

    def _whole(self, start: Array) -> Array:
        steps = self.job.steps
        with (
            self.watch.time(steps.stage),
            RichProgress(console) as bars,
            steps.show(bars, 1) as bar,
        ):
            return sample(self.engine, start, self.words, steps.policy, on_step=bar.update)

    def _context(self) -> Array | None:
        from anyflow_deploy.pipelines.vae import encoded_video

        if self.job.given is None:
            return None
        with self.watch.time("VAE"):
            return encoded_video(self.pipeline, self.job.given)

    def _chunks(self, plan: CachePlan, start: Array, context: Array | None) -> Generator[Chunk, None, None]:
        """The chunks of a causal video, timed and shown while they are made."""
        from anyflow_deploy.pipelines.causal_video import chunks_in

        steps, count = self.job.steps, len(plan.chunks)
        given = chunks_in(plan, 0 if context is None else context.shape[1])
        with (
            RichProgress(console) as bars,
            steps.show(bars, count - given) as bar,
        ):
            chunks = stream(
                self.engine,
                start,
                self.words,
                steps.policy,
                plan.chunks,
                context,
                plan.window,
                bar.update,
            )
            while True:
                with self.watch.time(f"{count} chunks"):
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                yield chunk

    def _grown(self, start: Array, context: Array | None) -> float | None:
        """Put each chunk on disk before the next is begun."""
        from anyflow_deploy.pipelines.vae import StreamingDecoder
        from anyflow_deploy.pipelines.video_io import VideoWriter

        assert self.job.plan is not None
        video, first_frame = self.engine.bundle.manifest.video, None
        height, width = (side * video.spatial_factor for side in self.job.shape[2:])
        with self.watch.time("VAE"):
            decoder = StreamingDecoder(self.pipeline)
        started = time.perf_counter()
        writer = VideoWriter(self.options.output, video.fps, (height, width))
        try:
            with writer, closing(self._chunks(self.job.plan, start, context)) as chunks:
                for chunk in chunks:
                    with self.watch.time("VAE"):
                        frames = decoder.decode(chunk.latents)
                    with self.watch.time("mp4"):
                        writer.append(frames)
                    if first_frame is None and not chunk.given:
                        first_frame = time.perf_counter() - started
        except BaseException as error:
            kept = f"{self.options.output} holds the first {writer.frames} frames, whole and playable"
            if isinstance(error, KeyboardInterrupt):
                raise (KeyboardInterrupt(kept) if writer.frames else error) from None
            if writer.frames:
                console.print(f"{escape(kept)}.")
            raise
        return first_frame

    def _written(self, latents: Array, started: float) -> float | None:
        """Decode and write a whole video, or write its latents."""
        if self.options.output.suffix == LATENTS_SUFFIX:
            _save_latents(self.options.output, latents)
            return None
        from anyflow_deploy.pipelines import vae, video_io

        with self.watch.time("VAE"):
            frames = vae.decoded_video(self.pipeline, latents)
        with self.watch.time("mp4"):
            video_io.save_video(self.options.output, frames[0], self.engine.bundle.manifest.video.fps)
        return time.perf_counter() - started


def _pipeline(options: GenerateOptions, bundle: Bundle, parts: list[str]) -> Path:
    """The folder with text encoder and VAE; looking for it needs the export side, a device without them does not."""
    from anyflow_deploy.pipelines.pipeline_folder import pipeline_of

    return pipeline_of(bundle.manifest, options.pipeline, parts)


def _check(options: GenerateOptions) -> None:
    """What can be refused without opening the bundle."""
    from anyflow_deploy.pipelines.video_io import GROWING_SUFFIXES, check_suffix

    if (options.prompt is None) == (options.prompt_embeds is None):
        raise AnyFlowError("give one of --prompt TEXT and --prompt-embeds FILE.")
    step_settings(options)
    if options.image is not None and options.video is not None:
        raise AnyFlowError("give one of --image and --video: a video begins with a picture or with a clip.")
    if options.stream and options.output.suffix.lower() not in GROWING_SUFFIXES:
        allowed = " or ".join(GROWING_SUFFIXES)
        raise AnyFlowError(
            f"--stream writes a video that grows, and --output is {options.output}. Give one that ends in {allowed}."
        )
    if options.output.suffix != LATENTS_SUFFIX:
        check_suffix(options.output)
    for path in (options.output, options.save_prompt_embeds):
        if path is None:
            continue
        if path.exists() and not options.overwrite:
            raise AnyFlowError(f"{path} exists. Choose another name, or replace it with --overwrite.")
        if not path.parent.is_dir():
            raise AnyFlowError(f"{path.parent} is not a folder. Make it first.")
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise AnyFlowError(f"{path} cannot be written. Choose another name or folder.")


def _job(options: GenerateOptions, bundle: Bundle) -> Job:
    """What is to be made, checked against rules, ranges and budget before anything is loaded."""
    manifest = bundle.manifest
    causal = manifest.kind == "causal"
    wrong = [name for name in CAUSAL_FLAGS if getattr(options, name) not in (None, False)]
    if wrong and not causal:
        raise AnyFlowError(
            f"--{wrong[0].replace('_', '-')} needs a causal bundle, and {bundle.path} is bidirectional ({manifest.model}). "
            "Leave it out, or export a far model."
        )
    defaults = manifest.schedule
    steps = StepReport(step_settings(options), defaults.steps, defaults.shift)
    shape = _latent_shape(options, bundle)
    plan = _plan(options, bundle, shape) if causal else None
    frames = shape[0] if plan is None else max(plan.chunks)
    manifest.shape_ranges.check((1, frames, *shape[1:]), (1, manifest.video.text_tokens, manifest.architecture.text_dim))
    if plan is None:
        return Job(steps, shape, None, None)
    return Job(steps, shape, plan, _given(options, bundle, plan, shape))


def _given(
    options: GenerateOptions, bundle: Bundle, plan: CachePlan, shape: tuple[int, int, int, int]
) -> NDArray[np.uint8] | None:
    from anyflow_deploy.pipelines.causal_video import given_frames

    factor = bundle.manifest.video.spatial_factor
    return given_frames(options.image, options.video, plan, bundle.manifest, shape[2] * factor, shape[3] * factor)


def _plan(options: GenerateOptions, bundle: Bundle, shape: tuple[int, int, int, int]) -> CachePlan:
    """The chunks and their cache, printed, and refused where it does not fit the budget."""
    from anyflow_deploy.pipelines.causal_video import element_bytes, plan_line, planned

    plan, size = planned(bundle.manifest, options.chunks, shape, options.window), element_bytes(bundle.manifest)
    if options.cache_budget is not None:
        check_budget(plan, size, options.cache_budget * 1e9)
    console.print(plan_line(plan, size))
    return plan


def _latent_shape(options: GenerateOptions, bundle: Bundle) -> tuple[int, int, int, int]:
    """(F, C, H, W) of the video asked for; chunks say how long it is where --frames does not."""
    factor = bundle.manifest.video.temporal_factor
    by_chunks = (sum(options.chunks) - 1) * factor + 1 if options.chunks else None
    return bundle.manifest.latent_shape(options.frames or by_chunks, options.height, options.width)


def _save_latents(path: Path, latents: Array) -> None:
    from safetensors.numpy import save_file

    partial = path.with_name(f".{path.name}.partial")
    save_file({"latents": latents}, partial, metadata={"layout": "batch, frames, channels, height, width"})
    partial.rename(path)


def main() -> None:
    """Entry point."""
    run("anyflow-generate", GenerateOptions, generate)
