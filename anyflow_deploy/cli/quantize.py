"""The flags of an 8-bit export, its calibration, and the choice of full-precision layers.

`anyflow-export --precision int8` does all of it; `--calibration FILE` gives it ranges that were
measured elsewhere, such as on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator
from rich.markup import escape

from anyflow_deploy.cli.sensitivity import (
    CAUSAL_FRAMES,
    FRAMES,
    HEIGHT,
    WIDTH,
    make_analyzer,
)
from anyflow_deploy.cli.step_options import Decibels
from anyflow_deploy.cli.weights import WeightOptions
from anyflow_deploy.models import MODELS, model_name
from anyflow_deploy.precision import BASES, PRECISIONS, PrecisionSpec
from anyflow_deploy.progress import Progress, console
from anyflow_deploy.quantization.calibration import Calibration, load_calibration
from anyflow_deploy.quantization.layers import quantizable_layers, unquantized_layers

if TYPE_CHECKING:  # torch, which --help does not need
    from anyflow_deploy.checkpoints.weights import Weights

_ONLY = ("calibration", "prompts", "base", "no_smoothquant", "attention", "keep_layers", "min_psnr")
_CPU_HEIGHT, _CPU_WIDTH = 256, 448
"""Size of the calibration videos on a CPU, where whole videos would take days."""


class QuantizationOptions(WeightOptions):
    """Flags for int8 and fp8."""

    precision: str = Field("fp32", description=", ".join(PRECISIONS))
    calibration: Path | None = Field(
        None, description="int8, fp8: from anyflow-calibrate (default: calibrate here, now)"
    )
    prompts: Path | None = Field(
        None,
        description="int8, fp8: prompts to calibrate with, one a line (default: built-in ones)",
    )
    base: str | None = Field(
        None,
        description=f"int8, fp8: type of all that is not 8-bit: {', '.join(BASES)} (by target)",
    )
    no_smoothquant: bool = Field(False, description="int8: leave SmoothQuant out")
    attention: str = Field(
        "high", description="fp8: also the products in attention (fp8), or not (high)"
    )
    keep_layers: int | None = Field(
        None, ge=0, description="int8, fp8: keep the N most sensitive layers in the base type"
    )
    min_psnr: Decibels | None = Field(
        None, description="int8, fp8: keep as many layers as this PSNR takes, as 30dB"
    )

    @model_validator(mode="after")
    def _check_quantization(self) -> QuantizationOptions:
        row = PRECISIONS.get(self.precision)
        flags = [name for name in _ONLY if name in self.model_fields_set]
        if row is not None and not row.quantized and flags:
            raise ValueError(
                f"--{flags[0].replace('_', '-')} is for --precision int8 or fp8, and"
                f" {self.precision} is not 8-bit."
            )
        if self.keep_layers is not None and self.min_psnr is not None:
            raise ValueError(
                "give one of --keep-layers N and --min-psnr DB: a number of layers, or a PSNR to"
                " reach."
            )
        if self.calibration is not None and self.prompts is not None:
            raise ValueError("--calibration has its own prompts; leave --prompts out.")
        if self.no_smoothquant and self.precision == "fp8":
            raise ValueError("--no-smoothquant is for int8; fp8 is never smoothed.")
        return self


def load_or_run_calibration(
    options: QuantizationOptions, weights: Weights, output: Path, bars: Progress
) -> Calibration | None:
    """Load the calibration of an export, or run one; None where nothing is quantized."""
    from anyflow_deploy.cli.calibrate import CalibrateOptions, measure_calibration

    if not PRECISIONS[options.precision].quantized:
        return None
    if options.calibration is not None:
        from anyflow_deploy.export.quantization.calibrate import check_calibration

        calibration = load_calibration(options.calibration)
        # Check it now: choosing layers may take hours.
        with bars.stage("comparing the weights with the calibration's"):
            check_calibration(calibration, weights)
        return calibration
    import torch

    size, device = {}, "cuda"
    if not torch.cuda.is_available():
        size, device = _cpu_video_size(weights), "cpu"
        console.print(
            "calibrating on the CPU, with small videos. Better: anyflow-calibrate --device cuda,"
            " then --calibration FILE."
        )
    path = export_calibration_path(output)
    source = {
        name: getattr(options, name)
        for name in ("model", "checkpoint", "random_weights", "seed", "prompts")
    }
    return measure_calibration(
        CalibrateOptions(**source, **size, device=device, output=path, overwrite=True),
        weights,
        bars,
    )


def export_calibration_path(output: Path) -> Path:
    """Return the path of the calibration that an export makes itself.

    Its rollouts are kept beside that path until the bundle is written.
    """
    return output.with_name(f"{output.name}-calibration.json")


def _cpu_video_size(weights: Weights) -> dict[str, int]:
    """Return a video size for a CPU: at most the model's own, or that of anyflow-calibrate where
    it is small already."""
    from anyflow_deploy.export.quantization.rollouts import is_small_and_unknown

    if is_small_and_unknown(weights.architecture):
        return {}
    own = MODELS.get(model_name(weights.architecture), MODELS["1.3b"]).video
    height = min(_CPU_HEIGHT, own[1])
    width = min(_CPU_WIDTH, own[2])
    frames = CAUSAL_FRAMES if weights.architecture.causal else min(FRAMES, own[0])
    return {"frames": frames, "height": height, "width": width}


def choose_full_precision_layers(
    options: QuantizationOptions,
    spec: PrecisionSpec,
    weights: Weights,
    calibration: Calibration,
    bars: Progress,
) -> list[str]:
    """Measure each layer and choose those for --keep-layers or --min-psnr."""
    from anyflow_deploy.export.quantization.rollouts import latent_shape
    from anyflow_deploy.export.quantization.sensitivity import (
        check_keep_layers,
        measure_sensitivity,
        select_full_precision_layers,
    )

    if not options.keep_layers and options.min_psnr is None:
        return []
    a = weights.architecture
    check_keep_layers(
        options.keep_layers, len(quantizable_layers(a)) - len(unquantized_layers(a, calibration))
    )
    shape = latent_shape(a, CAUSAL_FRAMES if a.causal else FRAMES, HEIGHT, WIDTH)
    analyzer = make_analyzer(weights, calibration, spec, shape, bars=bars)
    layers = select_full_precision_layers(
        measure_sensitivity(analyzer, bars),
        options.keep_layers,
        options.min_psnr,
        analyzer.psnr_all_except,
    )
    console.print(
        f"{len(layers)} of {len(analyzer.layers)} layers stay in {spec.base}:"
        f" {escape(', '.join(layers) or 'none')}"
    )
    return layers
