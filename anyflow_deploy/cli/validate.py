"""`anyflow-validate`: compare an engine with PyTorch, with a verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from rich.markup import escape

from anyflow_deploy.bundle.atomic_io import write_text_atomically
from anyflow_deploy.bundle.bundle import Bundle, load_bundle
from anyflow_deploy.bundle.outputs import OutputFile
from anyflow_deploy.cli.engine_flags import (
    BackendFlag,
    EngineFlag,
    KernelSpecializationFlag,
    ProviderFlag,
    ThreadsFlag,
)
from anyflow_deploy.cli.json_output import print_json
from anyflow_deploy.cli.options import (
    DONE,
    WORK_ERROR,
    JsonFlag,
    Options,
    Steps,
    run,
)
from anyflow_deploy.cli.sensitivity import embed_calibration_prompt
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.registry import DEFAULT_BACKEND, load_engine
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.progress import RichProgress, console
from anyflow_deploy.quantization.calibration import CALIBRATION, load_calibration
from anyflow_deploy.shape_ranges import latent_frames, latent_side

_TEXT_TOKENS = 32
"""Enough tokens to attend to; validation is about arithmetic, not about prompts."""


class ValidateOptions(Options):
    """Compare a bundle's engine with PyTorch in float32.

    It compares transitions at many (t, r), and whole samples or streams.

    The reference is diffusers' class, or for causal models this project's own module, because
    diffusers' class attends to padding. Writes validation.json and validation.png.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("bundle",)
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "anyflow-validate tiny-fp32",
        "anyflow-validate tiny-fp32 --steps 1,4 --height 64",
    )
    VERDICT: ClassVar[str] = "a difference is over the thresholds of the bundle's precision"

    bundle: Path = Field(description="the bundle's folder")
    checkpoint: str | None = Field(
        None, description="what the bundle was exported from, if that has moved"
    )
    backend: BackendFlag = DEFAULT_BACKEND
    provider: ProviderFlag = None
    threads: ThreadsFlag = None
    engine: EngineFlag = None
    kernel_specialization: KernelSpecializationFlag = None
    device: str = Field("cpu", description="torch device of the reference")
    steps: Steps = Field((1, 2, 4, 8), min_length=1, description="step counts of the whole samples")
    frames: int = Field(
        9, description="size of the test video: frames (a causal model makes its first chunks)"
    )
    height: int = Field(96, description="pixels")
    width: int = Field(160, description="pixels")
    seed: int = Field(0, ge=0, description="seed of the test inputs")
    output: Path | None = Field(None, description="folder for the report (default: the bundle)")
    json_output: JsonFlag = False


def validate(options: ValidateOptions) -> int:
    """Compare a bundle with the weights it came from; return the exit status."""
    from anyflow_deploy.export.diffusers_engine import weights_from_manifest

    bundle = load_bundle(options.bundle)
    weights = weights_from_manifest(bundle.manifest, options.checkpoint)
    content = validate_bundle(bundle, options, weights)
    if options.json_output:
        print_json(content)
    return DONE if content["passed"] else WORK_ERROR


def validate_bundle(bundle: Bundle, options: ValidateOptions, weights: Any) -> dict[str, Any]:
    """Compare a bundle with open weights, print and write the report.

    Returns:
        What `--json` prints: validation.json, and its path as `report`.
    """
    folder = options.output or bundle.path
    with (
        OutputFile(folder / "validation.json", overwrite=True, flag="--output") as report,
        OutputFile(folder / "validation.png", overwrite=True, flag="--output") as plot,
    ):
        return _validate_bundle(bundle, options, weights, report, plot)


def _validate_bundle(
    bundle: Bundle, options: ValidateOptions, weights: Any, report: OutputFile, plot: OutputFile
) -> dict[str, Any]:
    from anyflow_deploy.engines import validation
    from anyflow_deploy.export.diffusers_engine import DiffusersEngine
    from anyflow_deploy.export.torch_engine import TorchEngine

    chunks = _chunks(bundle, options)
    shape, text = video_shapes(bundle, options, sum(chunks) if chunks else None)
    prompt_embeds = calibrated_prompt_embeds(bundle, weights, text)
    text = text if prompt_embeds is None else prompt_embeds.shape
    with RichProgress(console) as bars:
        engine = load_engine(
            bundle,
            options.backend,
            options.provider,
            options.threads,
            engine=options.engine,
            kernel_specialization=options.kernel_specialization,
            progress=bars,
        )
        with bars.stage("loading the reference"):
            reference = (TorchEngine if chunks else DiffusersEngine)(weights, options.device)
        shift = bundle.manifest.schedule.shift
        result = validation.validate(
            engine,
            reference,
            bundle.manifest.precision,
            shape,
            text,
            options.steps,
            shift,
            options.seed,
            bars,
            chunks,
            prompt_embeds,
        )
    content = _write_report(report, plot, bundle, result)
    for failure in result.failures[:5]:
        console.print(f"[red]over:[/] {failure}")
    verdict = (
        "[green]valid[/]"
        if not result.failures
        else f"[bold red]NOT VALID[/], {len(result.failures)} over"
    )
    path = str((options.output or bundle.path) / "validation.json")
    console.print(
        f"{verdict}: {result.candidate} against {result.reference}. Report: {escape(path)}"
    )
    return {"report": path, **content}


def _chunks(bundle: Bundle, options: ValidateOptions) -> tuple[int, ...] | None:
    """Return a causal plan's first chunks, until the cache holds two compressed ones.

    None for a bidirectional model.
    """
    a = bundle.manifest.architecture
    if a.chunk_partition is None or a.full_chunk_limit is None:
        return None
    if "frames" in options.model_fields_set:
        raise AnyFlowError(
            f"{bundle.path} is causal: its first chunks are compared, whatever their length. Leave"
            " --frames out."
        )
    span = bundle.manifest.shape_ranges.frames
    return tuple(span.nearest(frames) for frames in a.chunk_partition[: a.full_chunk_limit + 2])


def video_shapes(
    bundle: Bundle, options: Options, frames: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the latents (B, F, C, H, W) and of the text (B, L, D) of a test video.

    Args:
        bundle: what is tested.
        options: with frames, height and width; a default is moved to the nearest size that the
            bundle declares.
        frames: of the latents, where they are settled already.

    Raises:
        ShapeError: a size outside of the bundle's ranges.
    """
    ranges = bundle.manifest.shape_ranges
    video = bundle.manifest.video
    a = bundle.manifest.architecture
    sizes = {"frames": latent_frames(vars(options)["frames"], video.temporal_factor)}
    for axis in ("height", "width"):
        pixels = getattr(options, axis)
        is_given = axis in options.model_fields_set
        unit = a.patch_size[1]
        sizes[axis] = (
            latent_side(pixels, video.spatial_factor, unit, axis)
            if is_given
            else pixels // video.spatial_factor
        )
    for axis in sizes:
        if axis not in options.model_fields_set:
            sizes[axis] = getattr(ranges, axis).nearest(sizes[axis])
    batch = ranges.batch.nearest(1)
    text = (batch, ranges.text.nearest(_TEXT_TOKENS), a.text_dim)
    ranges.check((batch, sizes["frames"], a.in_channels, sizes["height"], sizes["width"]), text)
    return (batch, frames or sizes["frames"], a.in_channels, sizes["height"], sizes["width"]), text


def calibrated_prompt_embeds(bundle: Bundle, weights: Any, shape: tuple[int, ...]) -> Array | None:
    """Return what an 8-bit bundle was calibrated with, its first prompt at full length; None for
    another bundle.

    Random embeddings would be cut off at ranges that were measured on a text encoder's, and padding
    belongs to the ranges, too.

    Args:
        bundle: what is tested.
        weights: what it was exported from.
        shape: (B, L, D), of which L is replaced.
    """
    if bundle.manifest.quantization is None:
        return None
    embeddings = embed_calibration_prompt(weights, load_calibration(bundle.path / CALIBRATION))
    tokens = bundle.manifest.shape_ranges.text.nearest(embeddings.shape[1])
    prompt_embeds = np.zeros((shape[0], tokens, shape[2]), np.float32)
    unpadded = embeddings[:, :tokens]
    prompt_embeds[:, : unpadded.shape[1]] = unpadded
    return prompt_embeds


def _write_report(
    report: OutputFile, plot: OutputFile, bundle: Bundle, result: Any
) -> dict[str, Any]:
    """Write validation.json and validation.png, and print the tables; return what is written."""
    from anyflow_deploy.engines import validation_report

    content = {"bundle_sha256": bundle.digest, **result.as_json()}
    write_text_atomically(report, json.dumps(content, indent=1) + "\n")
    for table in validation_report.validation_tables(result):
        console.print(table)
    if validation_report.can_plot():
        validation_report.plot_validation(result, plot)
    else:
        console.print(
            "no plot: matplotlib is not installed (it comes with anyflow-deploy[export])."
        )
    return content


def main() -> None:
    """Run `anyflow-validate` with the flags of the command line."""
    run("anyflow-validate", ValidateOptions, validate)
