"""`anyflow-generate`: a prompt becomes a video.

A bidirectional bundle makes the whole video at once (`sample`), a causal one chunk by chunk
(`stream`); they share everything else. With `--stream` each chunk is decoded and put on disk before
the next one begins. Wrong requests are refused before text encoder and engine are loaded.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, PositiveInt
from rich.markup import escape

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.bundle.outputs import OutputFile
from anyflow_deploy.cli.options import KernelSpecialization, Numbers, Options, run
from anyflow_deploy.cli.step_options import Decibels, Seconds, flag_name, step_settings
from anyflow_deploy.cli.step_report import StepReport
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.kv_cache import check_budget
from anyflow_deploy.engines.registry import DEFAULT_BACKEND
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.pipelines.context import ContextOptions, load_context
from anyflow_deploy.pipelines.request import (
    GenerationRequest,
    cache_element_bytes,
    describe_plan,
)
from anyflow_deploy.pipelines.video import LATENTS_SUFFIX, StageTimer, Video, VideoChunk
from anyflow_deploy.pipelines.video_pipeline import VideoPipeline
from anyflow_deploy.progress import RichProgress, console

CAUSAL_FLAGS = (
    "stream",
    "image",
    "video",
    "take",
    "chunks",
    "first_steps",
    "cache_budget",
    "window",
)
"""Flags that mean nothing to a bidirectional bundle."""

Chunks = Annotated[
    tuple[PositiveInt, ...], BeforeValidator(lambda v: v.split(",") if isinstance(v, str) else v)
]


class GenerateOptions(Options):
    """Generate a video from a prompt, with any number of steps.

    More steps give a better video. The result is an mp4, or latents.

    If the device has no text encoder, give --prompt-embeds FILE (made elsewhere with
    --save-prompt-embeds). If it has no VAE, give an --output that ends in .safetensors, and the
    latents are saved. A causal bundle (far-...) generates the video chunk by chunk: with --stream
    you can watch it while it grows, and it can begin with your picture or clip.

    --deadline runs as many steps as fit into the time, for the whole video or for each chunk. The
    time covers the steps alone, not the text encoder, the cache, the VAE or the file. The deadline
    is missed by one step at most. The first Ctrl-C then finishes with a single step; the second
    interrupts. --target-quality doubles the number of steps until two results in a row agree; that
    costs nearly twice the steps that it picks. With either, --steps is the maximum.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("bundle",)
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        'anyflow-generate bundle --prompt "a red fox in the snow" --steps 4 --output fox.mp4',
        (
            'anyflow-generate bundle --prompt "a red fox" --save-prompt-embeds fox.safetensors'
            " --output fox.mp4"
        ),
        (
            "anyflow-generate bundle --prompt-embeds fox.safetensors --steps 8 --output"
            " latents.safetensors"
        ),
        'anyflow-generate bundle --prompt "a red fox" --deadline 1500ms --output fox.mp4',
        'anyflow-generate bundle --prompt "a red fox" --target-quality 30dB --output fox.mp4',
        (
            'anyflow-generate far-bundle --prompt "a red fox" --stream --image first.png --output'
            " fox.mp4"
        ),
    )

    bundle: Path = Field(description="the bundle's folder")
    prompt: str | None = Field(None, description="what the video shows")
    prompt_embeds: Path | None = Field(
        None, description="saved embeddings, in place of --prompt and the text encoder"
    )
    save_prompt_embeds: Path | None = Field(None, description="save the prompt's embeddings here")
    output: Path = Field(Path("video.mp4"), description="video, or latents (.safetensors)")
    overwrite: bool = Field(False, description="replace --output and --save-prompt-embeds")
    steps: int | None = Field(
        None, ge=1, le=1000, description="number of steps (default: the manifest's)"
    )
    shift: float | None = Field(None, gt=0, description="timestep shift (default: the manifest's)")
    sigmas: Numbers | None = Field(
        None, description="your own noise levels, as 1,0.9,0.6, instead of --steps and --shift"
    )
    deadline: Seconds | None = Field(
        None, description="time for the steps, as 1500ms, 1.5s or 2m; causal: for each chunk"
    )
    target_quality: Decibels | None = Field(
        None, description="PSNR to reach against half as many steps, as 30dB"
    )
    frames: int | None = Field(None, ge=1, description="frames, 4n+1 (default: the manifest's)")
    height: int | None = Field(None, ge=1, description="pixels, a multiple of 16")
    width: int | None = Field(None, ge=1, description="pixels, a multiple of 16")
    seed: int = Field(
        0,
        ge=-1,
        description="seed of the noise, the same on every machine; -1 draws one and prints it",
    )
    stream: bool = Field(
        False, description="causal: write --output chunk by chunk, playable while it grows (.mp4)"
    )
    image: Path | None = Field(None, description="causal: a picture that the video begins with")
    video: Path | None = Field(
        None,
        description="causal: a clip that the video continues; its frames are taken at the model's"
        " rate and have to fill whole chunks",
    )
    take: Literal["first", "last"] | None = Field(
        None, description="take the first or the last frames of --video that fill whole chunks"
    )
    fit: Literal["crop", "pad", "stretch"] | None = Field(
        None,
        description="how --image or --video is brought to the size (default: it must have it)",
    )
    background: str = Field(
        "black",
        description="colour behind transparent pixels and around --fit pad, as white or #ff8000",
    )
    chunks: Chunks | None = Field(
        None, description="causal: latent frames of each chunk, as 1,3,3 (default: the model's)"
    )
    first_steps: int | None = Field(
        None, ge=1, le=1000, description="causal: number of steps of the first generated chunk"
    )
    window: int | None = Field(
        None,
        ge=1,
        description="causal: keep the first and this many of the newest compressed chunks",
    )
    cache_budget: float | None = Field(
        None, gt=0, description="causal: refuse a cache of more than this many GB"
    )
    backend: str = Field(DEFAULT_BACKEND, description="backend of the engine")
    provider: str | None = Field(
        None,
        description="what the engine runs on: cpu or cuda (default: cpu where the backend has it)",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of the engine")
    engine: str | None = Field(
        None, description="name or path of a built engine, where the backend has several"
    )
    kernel_specialization: KernelSpecialization | None = Field(
        None,
        description=(
            "tensorrt-rtx: when kernels for one shape are compiled: lazy (in the background), eager"
            " or none (default lazy)"
        ),
    )
    pipeline: str | None = Field(
        None,
        description="pipeline folder or Hub id with text encoder and VAE, if not the bundle's own",
    )


@dataclass(frozen=True)
class _Job:
    """A request that was checked, and what belongs to it.

    Attributes:
        request: the video.
        steps: decides the steps, and reports them.
        context_frames: uint8 (frames, height, width, 3) that the video begins with.
        decode: whether the VAE makes frames of the latents.
    """

    request: GenerationRequest
    steps: StepReport
    context_frames: NDArray[np.uint8] | None
    decode: bool


def generate(options: GenerateOptions) -> int:
    """Generate the video; returns the exit status."""
    _check_options(options)
    if options.seed == -1:
        options = options.model_copy(update={"seed": secrets.randbelow(2**32)})
        console.print(f"seed {options.seed}")
    paths = (options.output, options.save_prompt_embeds)
    with ExitStack() as stack:
        output, embeds_output = (
            None if path is None else stack.enter_context(OutputFile(path, options.overwrite))
            for path in paths
        )
        assert output is not None
        return _generate(options, output, embeds_output)


def _generate(
    options: GenerateOptions, output: OutputFile, embeds_output: OutputFile | None
) -> int:
    """Generate the video into outputs that are open."""
    timer = StageTimer()
    with timer.time("bundle"):
        pipe = VideoPipeline.from_bundle(
            options.bundle,
            backend=options.backend,
            provider=options.provider,
            threads=options.threads,
            engine=options.engine,
            kernel_specialization=options.kernel_specialization,
            pipeline=options.pipeline,
        )
    with pipe:
        job = _prepare(options, pipe.bundle)
        pipe.check_parts(
            text=options.prompt is not None, vae=job.decode or job.context_frames is not None
        )
        with timer.time("text"):
            prompt_embeds = _get_prompt_embeds(options, pipe, embeds_output)
        with timer.time("engine"), RichProgress(console) as bars:
            pipe.load_engine(bars)
        first_frame = _write_video(options, output, pipe, job, prompt_embeds, timer)
    for line in job.steps.summary_lines():
        console.print(line)
    if job.request.plan is not None and first_frame is not None:
        console.print(f"first generated frame on disk after {first_frame:.2f} s")
    console.print(f"[green]wrote[/] [bold]{escape(str(options.output))}[/] ({timer})")
    return 0


def _get_prompt_embeds(
    options: GenerateOptions, pipe: VideoPipeline, output: OutputFile | None
) -> Array:
    """Load or compute the prompt embeddings (B, L, D), and save them if asked."""
    from anyflow_deploy.pipelines import text_encoder

    if options.prompt_embeds is not None:
        embeds, prompts = text_encoder.load_embeddings(options.prompt_embeds)
    else:
        prompts = [str(options.prompt)]
        embeds = pipe.encode_prompt(prompts[0])
        pipe.unload_text_encoder()
    one_video = options.output.suffix != LATENTS_SUFFIX or pipe.manifest.kind == "causal"
    if len(embeds) != 1 and one_video:
        raise AnyFlowError(
            f"{options.prompt_embeds} holds {len(embeds)} prompts, and {options.output} takes one "
            "video. Give one prompt's embeddings; a bidirectional bundle makes several videos' "
            "latents at once (--output latents.safetensors)."
        )
    if output is not None:
        text_encoder.save_embeddings(output, embeds, prompts)
    return embeds


def _write_video(
    options: GenerateOptions,
    output: OutputFile,
    pipe: VideoPipeline,
    job: _Job,
    prompt_embeds: Array,
    timer: StageTimer,
) -> float | None:
    """Generate the video and write it.

    Returns:
        Seconds from the first transition to the first generated frame on disk; None where only
        latents are written.
    """
    context = None
    if job.context_frames is not None:
        with timer.time("VAE"):
            context = pipe.encode_video(job.context_frames)
    plan = job.request.plan
    context_samples = 0
    if job.context_frames is not None:
        context_samples = job.request.check_context(len(job.context_frames))
    label = job.steps.stage if plan is None else f"{len(plan.chunks)} chunks"
    names = {"transformer": label, "vae": "VAE"}
    start = time.perf_counter()
    with (
        RichProgress(console) as bars,
        job.steps.show(bars, job.request.num_samples - context_samples) as bar,
        closing(
            pipe.generate(
                job.request,
                prompt_embeds,
                job.steps.policy,
                context=context,
                decode=job.decode,
                on_step=bar.update,
                stage=lambda name: timer.time(names[name]),
            )
        ) as chunks,
    ):
        if options.stream:
            return _stream_to_file(output, pipe, job, chunks, timer)
        video = Video.from_chunks(chunks, pipe.manifest.video.fps)
    if not job.decode:
        video.save(output)
        return None
    with timer.time("mp4"):
        video.save(output)
    return time.perf_counter() - start


def _stream_to_file(
    output: OutputFile,
    pipe: VideoPipeline,
    job: _Job,
    chunks: Iterable[VideoChunk],
    timer: StageTimer,
) -> float | None:
    """Write each chunk to disk before the next one begins."""
    from anyflow_deploy.pipelines.video_io import VideoWriter

    start = time.perf_counter()
    first_frame = None
    size = (job.request.height, job.request.width)
    writer = VideoWriter(output, pipe.manifest.video.fps, size)
    try:
        with writer:
            for chunk in chunks:
                assert chunk.frames is not None
                with timer.time("mp4"):
                    writer.append(chunk.frames)
                if first_frame is None and not chunk.given:
                    first_frame = time.perf_counter() - start
    except BaseException as error:
        message = f"{writer.path} holds the first {writer.frames} frames, whole and playable"
        if isinstance(error, KeyboardInterrupt):
            raise (KeyboardInterrupt(message) if writer.frames else error) from None
        if writer.frames:
            console.print(f"{escape(message)}.")
        raise
    return first_frame


def _check_options(options: GenerateOptions) -> None:
    """Refuse wrong flags without opening the bundle."""
    from anyflow_deploy.pipelines.video_io import GROWING_SUFFIXES, check_suffix

    if (options.prompt is None) == (options.prompt_embeds is None):
        raise AnyFlowError("give one of --prompt TEXT and --prompt-embeds FILE.")
    step_settings(options)
    _context_options(options)
    if options.image is not None and options.video is not None:
        raise AnyFlowError(
            "give one of --image and --video: a video begins with a picture or with a clip."
        )
    if options.stream and options.output.suffix.lower() not in GROWING_SUFFIXES:
        suffixes = " or ".join(GROWING_SUFFIXES)
        raise AnyFlowError(
            f"--stream writes a video that grows, and --output is {options.output}. Give one that"
            f" ends in {suffixes}."
        )
    if options.output.suffix != LATENTS_SUFFIX:
        check_suffix(options.output)
    if options.output == options.save_prompt_embeds:
        raise AnyFlowError(
            f"--output and --save-prompt-embeds are both {options.output}. Give two names."
        )


def _context_options(options: GenerateOptions) -> ContextOptions:
    """Read what may be done to the picture or clip, and refuse it where there is none."""
    has_file = options.image is not None or options.video is not None
    if options.take is not None and options.video is None:
        raise AnyFlowError(
            "--take is for a clip, and there is none. Give --video, or leave it out."
        )
    if not has_file and (options.fit is not None or options.background != "black"):
        flag = "--fit" if options.fit is not None else "--background"
        raise AnyFlowError(
            f"{flag} is for a picture or a clip, and there is none. Give --image or --video, or"
            " leave it out."
        )
    return ContextOptions.parse(options.fit, options.background, options.take)


def _prepare(options: GenerateOptions, bundle: Bundle) -> _Job:
    """Check the request against rules, ranges and budget before anything is loaded."""
    manifest = bundle.manifest
    causal = manifest.kind == "causal"
    causal_flags = [name for name in CAUSAL_FLAGS if getattr(options, name) not in (None, False)]
    if causal_flags and not causal:
        raise AnyFlowError(
            f"--{causal_flags[0].replace('_', '-')} needs a causal bundle, and {bundle.path} is "
            f"bidirectional ({manifest.model}). Leave it out, or export a far model."
        )
    default_frames = None if options.chunks else manifest.video.frames
    request = GenerationRequest.from_manifest(
        manifest,
        num_frames=options.frames or default_frames,
        height=options.height,
        width=options.width,
        chunks=options.chunks or manifest.architecture.chunk_partition,
        window=options.window,
        steps=step_settings(options),
        seed=options.seed,
        name=flag_name,
    )
    if request.plan is not None:
        element = cache_element_bytes(manifest)
        if options.cache_budget is not None:
            check_budget(request.plan, element, options.cache_budget * 1e9)
        console.print(describe_plan(request.plan, element))
    steps = StepReport(request.steps, request.default_steps, request.default_shift)
    context_frames = load_context(
        request,
        options.image,
        options.video,
        manifest.video.fps,
        _context_options(options),
        lambda text: console.print(escape(text)),
    )
    return _Job(request, steps, context_frames, options.output.suffix != LATENTS_SUFFIX)


def main() -> None:
    """Run `anyflow-generate` with the flags of the command line."""
    run("anyflow-generate", GenerateOptions, generate)
