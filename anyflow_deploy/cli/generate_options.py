"""The flags of `anyflow-generate`, and what is refused of them before anything is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from anyflow_deploy.cli.engine_flags import (
    BackendFlag,
    EngineFlag,
    KernelSpecializationFlag,
    PipelineFlag,
    ProviderFlag,
    ThreadsFlag,
)
from anyflow_deploy.cli.options import (
    JsonFlag,
    Numbers,
    Options,
    Seeds,
)
from anyflow_deploy.cli.step_options import Decibels, Seconds, step_settings
from anyflow_deploy.engines.registry import DEFAULT_BACKEND
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.pipelines.context import ContextOptions
from anyflow_deploy.pipelines.video import LATENTS_SUFFIX

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

    --prompts FILE and --seeds 1,2,3 make a video of each prompt with each seed, in one run that
    loads everything once. {index}, {seed} and {prompt} in --output tell the videos apart; all names
    are tried before the work begins.

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
        "anyflow-generate bundle --prompts prompts.txt --seeds 1,2 --output {index}-{prompt}.mp4",
        'anyflow-generate bundle --prompt "a red fox" --deadline 1500ms --output fox.mp4',
        'anyflow-generate bundle --prompt "a red fox" --target-quality 30dB --output fox.mp4',
        (
            'anyflow-generate far-bundle --prompt "a red fox" --stream --image first.png --output'
            " fox.mp4"
        ),
    )

    bundle: Path = Field(description="the bundle's folder")
    prompt: str | None = Field(None, description="what the video shows")
    prompts: Path | None = Field(
        None, description="text file, one prompt a line: a video of each, in place of --prompt"
    )
    prompt_embeds: Path | None = Field(
        None, description="saved embeddings, in place of --prompt and the text encoder"
    )
    save_prompt_embeds: Path | None = Field(
        None, description="save the embeddings of all prompts here"
    )
    output: Path = Field(
        Path("video.mp4"),
        description="video, or latents (.safetensors); {index} is the number of the video, from 1,"
        " {seed} its seed, {prompt} the beginning of its prompt",
    )
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
    seeds: Seeds | None = Field(
        None, min_length=1, description="several seeds, as 1,2,3: a video with each"
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
    backend: BackendFlag = DEFAULT_BACKEND
    provider: ProviderFlag = None
    threads: ThreadsFlag = None
    engine: EngineFlag = None
    kernel_specialization: KernelSpecializationFlag = None
    pipeline: PipelineFlag = None
    json_output: JsonFlag = False


def check_options(options: GenerateOptions) -> None:
    """Refuse wrong flags without opening anything.

    Raises:
        AnyFlowError: naming the flags, and what to do.
    """
    from anyflow_deploy.pipelines.video_io import GROWING_SUFFIXES, check_suffix

    sources = (options.prompt, options.prompts, options.prompt_embeds)
    if sum(source is not None for source in sources) != 1:
        raise AnyFlowError("give one of --prompt TEXT, --prompts FILE and --prompt-embeds FILE.")
    if options.seeds is not None and "seed" in options.model_fields_set:
        raise AnyFlowError("give one of --seed N and --seeds N,N.")
    step_settings(options)
    context_options(options)
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


def context_options(options: GenerateOptions) -> ContextOptions:
    """Read what may be done to the picture or clip.

    Raises:
        AnyFlowError: there is none.
    """
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
