"""`anyflow-sensitivity`: which layers of a model suffer most from 8 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator
from rich.markup import escape

from anyflow_deploy.bundle.bundle import Bundle, load_bundle
from anyflow_deploy.bundle.outputs import OutputFile
from anyflow_deploy.cli.json_output import print_json
from anyflow_deploy.cli.options import DONE, JsonFlag, Options, Steps, run
from anyflow_deploy.cli.step_options import Decibels
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.precision import EIGHT_BIT, PrecisionSpec
from anyflow_deploy.progress import NullProgress, Progress, RichProgress, console
from anyflow_deploy.quantization.calibration import CALIBRATION, Calibration, load_calibration
from anyflow_deploy.quantization.layers import (
    quantizable_layers,
    quantized_attentions,
    unquantized_layers,
)

if TYPE_CHECKING:  # torch, which --help does not need
    from anyflow_deploy.checkpoints.weights import Weights
    from anyflow_deploy.export.quantization.sensitivity import SensitivityAnalyzer

FRAMES, CAUSAL_FRAMES, HEIGHT, WIDTH = 9, 29, 96, 160
"""Size of the videos. Causal ones are the model's first four chunks, which compress one chunk."""


class SensitivityOptions(Options):
    """Rank a model's layers by what quantizing each one alone does to a video.

    PyTorch computes both videos. The command needs the weights that the bundle was exported
    from, and their calibration. It writes sensitivity.json and sensitivity.png. With --keep-layers
    or --min-psnr it also says which layers those flags choose.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("bundle",)
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "anyflow-sensitivity my-bundle --calibration calibration.json",
        "anyflow-sensitivity my-bundle --precision fp8 --steps 1,4,8 --min-psnr 30dB --device cuda",
    )

    bundle: Path = Field(description="the bundle's folder")
    calibration: Path | None = Field(
        None, description=f"from anyflow-calibrate (default: {CALIBRATION} in the bundle)"
    )
    checkpoint: str | None = Field(
        None, description="what the bundle was exported from, if that has moved"
    )
    precision: str | None = Field(
        None, description="int8 or fp8 (default: the bundle's own, or int8)"
    )
    steps: Steps = Field((1, 4), min_length=1, description="step counts of the videos")
    frames: int | None = Field(
        None, ge=1, description=f"frames of the videos (default {FRAMES}; causal {CAUSAL_FRAMES})"
    )
    height: int = Field(HEIGHT, description="pixels")
    width: int = Field(WIDTH, description="pixels")
    seed: int = Field(0, ge=0, description="seed of the noise")
    keep_layers: int | None = Field(None, ge=0, description="name the N worst layers")
    min_psnr: Decibels | None = Field(
        None, description="name the layers to keep to reach this PSNR, as 30dB"
    )
    device: str = Field("cpu", description="torch device, as cpu or cuda")
    output: Path | None = Field(None, description="folder for the report (default: the bundle)")
    json_output: JsonFlag = False

    @model_validator(mode="after")
    def _check_consistency(self) -> SensitivityOptions:
        if self.precision is not None and self.precision not in EIGHT_BIT:
            raise ValueError(
                f"--precision is {self.precision!r}; allowed are {' and '.join(EIGHT_BIT)}."
            )
        if self.keep_layers is not None and self.min_psnr is not None:
            raise ValueError(
                "give one of --keep-layers N and --min-psnr DB: a number of layers, or a PSNR to"
                " reach."
            )
        return self


def sensitivity(options: SensitivityOptions) -> int:
    """Measure the layers and write the report; return the exit status."""
    from anyflow_deploy.export.quantization.sensitivity import SENSITIVITY

    bundle = load_bundle(options.bundle)
    path = (options.output or bundle.path) / SENSITIVITY
    with (
        OutputFile(path, overwrite=True, flag="--output") as report,
        OutputFile(path.with_suffix(".png"), overwrite=True, flag="--output") as plot,
    ):
        return _measure(options, bundle, report, plot)


def _measure(
    options: SensitivityOptions, bundle: Bundle, report: OutputFile, plot: OutputFile
) -> int:
    """Measure, write the report and print it; return the exit status."""
    from anyflow_deploy.export.diffusers_engine import weights_from_manifest
    from anyflow_deploy.export.quantization.calibrate import check_calibration
    from anyflow_deploy.export.quantization.modelopt_loader import load_modelopt
    from anyflow_deploy.export.quantization.rollouts import latent_shape
    from anyflow_deploy.export.quantization.sensitivity import (
        SENSITIVITY,
        check_keep_layers,
        measure_sensitivity,
        select_full_precision_layers,
    )

    calibration = load_calibration(options.calibration or bundle.path / CALIBRATION)
    a = bundle.manifest.architecture
    frames = options.frames or (CAUSAL_FRAMES if a.causal else FRAMES)
    shape = latent_shape(a, frames, options.height, options.width)
    weights = weights_from_manifest(bundle.manifest, options.checkpoint)
    own = bundle.manifest.precision
    precision = options.precision or (own if own in EIGHT_BIT else EIGHT_BIT[0])
    with RichProgress(console) as bars:
        with bars.stage("loading ModelOpt"):
            load_modelopt()
        with bars.stage("fingerprint of the weights"):
            check_calibration(calibration, weights)
        check_keep_layers(
            options.keep_layers,
            len(quantizable_layers(a)) - len(unquantized_layers(a, calibration)),
        )
        # Round as this bundle does, or as the defaults do.
        settings = bundle.manifest.quantization if precision == own else None
        smooth = precision == "int8" and (settings is None or settings.smooth)
        spec = PrecisionSpec(
            precision, "fp32", "high" if settings is None else settings.attention, smooth
        )
        analyzer = make_analyzer(
            weights, calibration, spec, shape, options.steps, options.seed, options.device, bars
        )
        result = measure_sensitivity(analyzer, bars)
        layers = None
        if options.keep_layers is not None or options.min_psnr is not None:
            with bars.stage("choosing layers"):
                layers = select_full_precision_layers(
                    result, options.keep_layers, options.min_psnr, analyzer.psnr_all_except
                )
    _write_report(report, plot, result, layers)
    if options.json_output:
        path = str((options.output or bundle.path) / SENSITIVITY)
        content = json.loads(result.to_text())
        print_json({"report": path, "full_precision_layers": layers, **content})
    return DONE


def make_analyzer(
    weights: Weights,
    calibration: Calibration,
    spec: PrecisionSpec,
    shape: tuple[int, int, int, int],
    steps: tuple[int, ...] = (1, 4),
    seed: int = 0,
    device: str = "cpu",
    bars: Progress | None = None,
) -> SensitivityAnalyzer:
    """Build the analyzer of a model's layers; it rounds as an export with `spec` does."""
    from anyflow_deploy.export.quantization.plan import plan_quantization
    from anyflow_deploy.export.quantization.sensitivity import (
        SensitivityAnalyzer,
        SensitivitySettings,
    )

    progress = bars or NullProgress()
    factors = {}
    if spec.smooth:
        factors = plan_quantization(weights, calibration, spec, (), progress).smooth
    attention: tuple[str, ...] = ()
    if spec.attention == "fp8":
        attention = tuple(quantized_attentions(weights.architecture, calibration))
    with progress.stage("running the unquantized network"):
        settings = SensitivitySettings(
            embed_calibration_prompt(weights, calibration), shape, steps, seed, device, attention
        )
        return SensitivityAnalyzer(weights, calibration, spec.precision, settings, factors)


def embed_calibration_prompt(weights: Weights, calibration: Calibration) -> Array:
    """Embed the first prompt of a calibration as the calibration embedded it."""
    from anyflow_deploy.export.quantization.prompts import embed_prompts, random_prompt_embeds

    prompts = tuple(calibration.prompts[:1])
    text = (
        embed_prompts(weights, prompts)
        if calibration.text == "encoder"
        else random_prompt_embeds(weights, prompts)
    )
    if text.source != calibration.text:
        console.print(
            "[yellow]no text encoder[/] with these weights here: random embeddings stand in for the"
            " prompt."
        )
    return text.prompt_embeds


def _write_report(  # type: ignore[no-untyped-def]
    report: OutputFile, plot: OutputFile, result, layers: list[str] | None
) -> None:
    """Write sensitivity.json and .png; print the tables and the chosen layers."""
    from anyflow_deploy.engines.validation_report import can_plot
    from anyflow_deploy.export.quantization import sensitivity_report
    from anyflow_deploy.export.quantization.sensitivity import write_sensitivity

    write_sensitivity(report, result)
    for table in sensitivity_report.sensitivity_tables(result):
        console.print(table)
    if can_plot():
        sensitivity_report.draw_sensitivity(result, plot, None if layers is None else len(layers))
    if layers is not None:
        console.print(
            f"{len(layers)} of {len(result.layers)} layers stay in full precision:"
            f" {', '.join(layers) or 'none'}"
        )
    console.print(
        f"[green]measured[/] {len(result.layers)} layers in {result.precision}:"
        f" [bold]{escape(str(report.path))}[/]"
    )


def main() -> None:
    """Run `anyflow-sensitivity` with the flags of the command line."""
    run("anyflow-sensitivity", SensitivityOptions, sensitivity)
