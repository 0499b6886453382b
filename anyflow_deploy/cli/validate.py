"""`anyflow-validate`: an engine against PyTorch, with a verdict."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from rich.markup import escape

from anyflow_deploy.bundle import Bundle, load_bundle
from anyflow_deploy.cli.options import Options, Steps, console, run
from anyflow_deploy.engines.loading import load_engine
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.progress import Bars
from anyflow_deploy.ranges import latent_frames, latent_side

_TEXT_TOKENS = 32
"""Enough words to attend to; validation is about arithmetic, not about prompts."""


class ValidateOptions(Options):
    """Compare a bundle's engine with diffusers in PyTorch float32: transitions at many (t, r), and whole samples.

    Writes validation.json and validation.png. Exit status 0: within the thresholds of its precision; 1: over."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("bundle",)
    EXAMPLES: ClassVar[tuple[str, ...]] = ("anyflow-validate tiny-fp32", "anyflow-validate tiny-fp32 --steps 1,4 --height 64")

    bundle: Path = Field(description="the bundle's folder")
    checkpoint: str | None = Field(None, description="what it was exported from, if that has moved")
    backend: str = Field("onnxruntime", description="backend of the engine")
    provider: str = Field("cpu", description="what the engine runs on: cpu or cuda")
    threads: int | None = Field(None, ge=1, description="CPU threads of the engine")
    device: str = Field("cpu", description="torch device of the reference")
    steps: Steps = Field((1, 2, 4, 8), min_length=1, description="step counts of the whole samples")
    frames: int = Field(9, description="size of the test video: frames")
    height: int = Field(96, description="pixels")
    width: int = Field(160, description="pixels")
    seed: int = Field(0, ge=0, description="of the test inputs")
    output: Path | None = Field(None, description="folder for the report (default: the bundle)")


def validate(options: ValidateOptions) -> int:
    """Do it; returns the exit status."""
    from anyflow_deploy.export.reference import weights_from_manifest

    bundle = load_bundle(options.bundle)
    if bundle.manifest.kind != "bidirectional":
        raise AnyFlowError(f"{options.bundle} is {bundle.manifest.kind}; this version validates bidirectional bundles only.")
    return validated(bundle, options, weights_from_manifest(bundle.manifest, options.checkpoint))


def validated(bundle: Bundle, options: ValidateOptions, weights: Any) -> int:
    """Compare a bundle with the weights it came from; prints, writes the report, returns the exit status."""
    from anyflow_deploy.engines import validation
    from anyflow_deploy.export.reference import TorchEngine

    folder = options.output or bundle.path
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise AnyFlowError(f"{folder} is not a folder that can be written to. Choose another --output.")
    shape, text = _shapes(bundle, options)
    engine = load_engine(bundle, options.backend, options.provider, options.threads)
    with Bars(console) as bars:
        with bars.stage("loading the reference"):
            reference = TorchEngine(weights, options.device)
        shift = bundle.manifest.schedule.shift
        result = validation.validate(
            engine, reference, bundle.manifest.precision, shape, text, options.steps, shift, options.seed, bars
        )
    _write(folder, bundle, result)
    for failure in result.failures[:5]:
        console.print(f"[red]over:[/] {failure}")
    verdict = "[green]valid[/]" if not result.failures else f"[bold red]NOT VALID[/], {len(result.failures)} over"
    console.print(f"{verdict}: {result.candidate} against {result.reference}. Report: {escape(str(folder / 'validation.json'))}")
    return 1 if result.failures else 0


def _shapes(bundle: Bundle, options: ValidateOptions) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The size asked for, moved to the nearest one the bundle declares when it is only the default."""
    ranges, video, a = bundle.manifest.shape_ranges, bundle.manifest.video, bundle.manifest.architecture
    sizes = {"frames": latent_frames(options.frames, video.temporal_factor)}
    for axis in ("height", "width"):
        pixels, asked = getattr(options, axis), axis in options.model_fields_set
        unit = a.patch_size[1]
        sizes[axis] = latent_side(pixels, video.spatial_factor, unit, axis) if asked else pixels // video.spatial_factor
    for axis in sizes:
        if axis not in options.model_fields_set:
            sizes[axis] = getattr(ranges, axis).nearest(sizes[axis])
    batch = ranges.batch.nearest(1)
    latents = (batch, sizes["frames"], a.in_channels, sizes["height"], sizes["width"])
    text = (batch, ranges.text.nearest(_TEXT_TOKENS), a.text_dim)
    ranges.check(latents, text)
    return latents, text


def _write(folder: Path, bundle: Bundle, result: Any) -> None:
    """validation.json, validation.png and the tables."""
    from anyflow_deploy.engines import validation_report

    content = {"bundle_sha256": bundle.digest, **result.as_json()}
    partial = folder / ".validation.json.partial"
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.rename(folder / "validation.json")
    for table in validation_report.tables(result):
        console.print(table)
    if validation_report.can_draw():
        validation_report.draw(result, folder / "validation.png")
    else:
        console.print("no picture: matplotlib is not installed (it comes with anyflow-deploy[export]).")


def main() -> None:
    """Entry point."""
    run("anyflow-validate", ValidateOptions, validate)
