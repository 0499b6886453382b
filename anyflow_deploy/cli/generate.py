"""`anyflow-generate`: a prompt becomes a video."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from rich.markup import escape

from anyflow_deploy.bundle import Bundle, load_bundle
from anyflow_deploy.cli.options import Numbers, Options, console, run
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.loading import load_engine
from anyflow_deploy.engines.sampler import Step, noise, sample
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.progress import Bars
from anyflow_deploy.ranges import latent_frames, latent_side
from anyflow_deploy.schedule import Schedule

LATENTS_SUFFIX = ".safetensors"


class GenerateOptions(Options):
    """Generate a video: text encoder, engine, VAE, mp4. The number of steps is free: more steps, better video.

    On a device without the text encoder, give --prompt-embeds FILE (made elsewhere with --save-prompt-embeds);
    without the VAE, an --output that ends in .safetensors takes the latents."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("bundle",)
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        'anyflow-generate bundle --prompt "a red fox in the snow" --steps 4 --output fox.mp4',
        'anyflow-generate bundle --prompt "a red fox" --save-prompt-embeds fox.safetensors --output fox.mp4',
        "anyflow-generate bundle --prompt-embeds fox.safetensors --steps 8 --output latents.safetensors",
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
    frames: int | None = Field(None, ge=1, description="4n+1 (default: the manifest's)")
    height: int | None = Field(None, ge=1, description="pixels, a multiple of 16")
    width: int | None = Field(None, ge=1, description="pixels, a multiple of 16")
    seed: int = Field(0, ge=0, description="of the noise; the same on every machine")
    backend: str = Field("onnxruntime", description="backend of the engine")
    provider: str = Field("cpu", description="what the engine runs on: cpu or cuda")
    threads: int | None = Field(None, ge=1, description="CPU threads of the engine")
    pipeline: str | None = Field(None, description="pipeline folder or Hub id with text encoder and VAE, if not the bundle's own")


class Stopwatch:
    """Seconds of each stage, for the closing line."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Time a stage."""
        started = time.perf_counter()
        yield
        self.stages[name] = time.perf_counter() - started

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.stages.items())


def generate(options: GenerateOptions) -> int:
    """Do it; returns the exit status."""
    from anyflow_deploy.pipeline import text, vae, video

    _check(options)
    watch = Stopwatch()
    with watch.time("bundle"):
        bundle = load_bundle(options.bundle)
    manifest = bundle.manifest
    schedule, shape = _schedule(options, bundle), _latent_shape(options, bundle)
    parts = ["tokenizer", "text_encoder"] if options.prompt is not None else []
    parts += ["vae"] if options.output.suffix != LATENTS_SUFFIX else []
    pipeline = _pipeline(options, bundle, parts) if parts else Path()
    with watch.time("text"):
        words, prompts = (
            text.load_embeddings(options.prompt_embeds)
            if options.prompt_embeds is not None
            else (text.encoded_prompts(pipeline, [str(options.prompt)], manifest.video.text_tokens), [str(options.prompt)])
        )
    if len(words) != 1 and options.output.suffix != LATENTS_SUFFIX:
        raise AnyFlowError(
            f"{options.prompt_embeds} holds {len(words)} prompts, and {options.output} takes one video. "
            "Give one prompt's embeddings, or an --output that ends in .safetensors."
        )
    if options.save_prompt_embeds is not None:
        text.save_embeddings(options.save_prompt_embeds, words, prompts)
    with watch.time("engine"):
        engine = load_engine(bundle, options.backend, options.provider, options.threads)
    latents = noise((len(words), *shape), options.seed)
    with watch.time(f"{schedule.steps} steps"), Bars(console) as bars, bars.stage("transitions", schedule.steps) as advance:
        latents = sample(engine, latents, words, schedule, on_step=lambda step: _advanced(advance, step))
    engine.close()
    if options.output.suffix == LATENTS_SUFFIX:
        _save_latents(options.output, latents)
    else:
        with watch.time("VAE"):
            frames = vae.decoded_video(pipeline, latents)
        with watch.time("mp4"):
            video.save_video(options.output, frames[0], manifest.video.fps)
    console.print(f"[green]wrote[/] [bold]{escape(str(options.output))}[/] ({watch})")
    return 0


def _pipeline(options: GenerateOptions, bundle: Bundle, parts: list[str]) -> Path:
    """The folder with text encoder and VAE; looking for it needs the export side, a device without them does not."""
    from anyflow_deploy.pipeline.folder import pipeline_of

    return pipeline_of(bundle.manifest, options.pipeline, parts)


def _advanced(advance: object, step: Step) -> None:
    advance(1)  # type: ignore[operator]


def _check(options: GenerateOptions) -> None:
    """What can be refused without opening the bundle."""
    from anyflow_deploy.pipeline.video import check_suffix

    if (options.prompt is None) == (options.prompt_embeds is None):
        raise AnyFlowError("give one of --prompt TEXT and --prompt-embeds FILE.")
    if options.sigmas is not None and (options.steps is not None or options.shift is not None):
        raise AnyFlowError("--sigmas is the whole schedule; leave out --steps and --shift.")
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


def _schedule(options: GenerateOptions, bundle: Bundle) -> Schedule:
    if options.sigmas is not None:
        return Schedule.from_sigmas(options.sigmas)
    defaults = bundle.manifest.schedule
    return Schedule.uniform(options.steps or defaults.steps, options.shift or defaults.shift)


def _latent_shape(options: GenerateOptions, bundle: Bundle) -> tuple[int, int, int, int]:
    """(F, C, H, W) of the video asked for, checked against rules and ranges before anything is loaded."""
    video, a = bundle.manifest.video, bundle.manifest.architecture
    frames = latent_frames(options.frames or video.frames, video.temporal_factor)
    height = latent_side(options.height or video.height, video.spatial_factor, a.patch_size[1], "height")
    width = latent_side(options.width or video.width, video.spatial_factor, a.patch_size[1], "width")
    shape = (frames, a.in_channels, height, width)
    bundle.manifest.shape_ranges.check((1, *shape), (1, video.text_tokens, a.text_dim))
    return shape


def _save_latents(path: Path, latents: Array) -> None:
    from safetensors.numpy import save_file

    partial = path.with_name(f".{path.name}.partial")
    save_file({"latents": latents}, partial, metadata={"layout": "batch, frames, channels, height, width"})
    partial.rename(path)


def main() -> None:
    """Entry point."""
    run("anyflow-generate", GenerateOptions, generate)
