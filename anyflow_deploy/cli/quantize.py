"""The flags of an 8-bit export, and the work they ask for before it: calibrating, and choosing what
stays high.

`anyflow-export --precision int8` does all of it by itself; `--calibration FILE` brings ranges that
were measured elsewhere, on a GPU say.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator
from rich.markup import escape

from anyflow_deploy.cli.sensitivity import CAUSAL_FRAMES, FRAMES, HEIGHT, WIDTH, Decibels, probe_for
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
"""What a CPU calibrates at: whole videos of a released model would take it days."""


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
    no_smoothquant: bool = Field(False, description="int8: without SmoothQuant")
    attention: str = Field(
        "high", description="fp8: also the products in attention (fp8), or not (high)"
    )
    keep_layers: int | None = Field(
        None, ge=0, description="int8, fp8: keep the N most sensitive layers in the base type"
    )
    min_psnr: Decibels | None = Field(
        None, description="int8, fp8: keep as many as it takes to reach this PSNR, as 30dB"
    )

    @model_validator(mode="after")
    def _quantization_fits(self) -> QuantizationOptions:
        row = PRECISIONS.get(self.precision)
        given = [name for name in _ONLY if name in self.model_fields_set]
        if row is not None and not row.quantized and given:
            raise ValueError(
                f"--{given[0].replace('_', '-')} is for --precision int8 or fp8, and"
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


def calibration_of(
    options: QuantizationOptions, weights: Weights, output: Path, bars: Progress
) -> Calibration | None:
    """The calibration an export needs: read, or made here; None where nothing is quantized."""
    from anyflow_deploy.cli.calibrate import CalibrateOptions, measure_calibration

    if not PRECISIONS[options.precision].quantized:
        return None
    if options.calibration is not None:
        from anyflow_deploy.export.quantization.calibrate import check_calibration

        found = load_calibration(options.calibration)
        # Now: choosing layers may take hours
        with bars.stage("comparing the weights with the calibration's"):
            check_calibration(found, weights)
        return found
    import torch

    size, device = {}, "cuda"
    if not torch.cuda.is_available():
        size, device = _small(weights), "cpu"
        console.print(
            "calibrating on the CPU, with small videos. Better: anyflow-calibrate --device cuda,"
            " then --calibration FILE."
        )
    path = own_calibration(output)
    source = {
        name: getattr(options, name)
        for name in ("model", "checkpoint", "random_weights", "seed", "prompts")
    }
    return measure_calibration(
        CalibrateOptions(**source, **size, device=device, output=path, overwrite=True),
        weights,
        bars,
    )


def own_calibration(output: Path) -> Path:
    """What an export's own calibration would be called; its rollouts are kept beside it until the
    bundle is there."""
    return output.with_name(f"{output.name}-calibration.json")


def _small(weights: Weights) -> dict[str, int]:
    """Video size for a CPU: never more than the model's own."""
    own = MODELS.get(model_name(weights.architecture), MODELS["1.3b"]).video
    height = min(_CPU_HEIGHT, own[1])
    width = min(_CPU_WIDTH, own[2])
    frames = CAUSAL_FRAMES if weights.architecture.causal else min(FRAMES, own[0])
    return {"frames": frames, "height": height, "width": width}


def layers_kept(
    options: QuantizationOptions,
    spec: PrecisionSpec,
    weights: Weights,
    calibration: Calibration,
    bars: Progress,
) -> list[str]:
    """The layers that --keep-layers or --min-psnr choose, by measuring each one."""
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
    probe = probe_for(weights, calibration, spec, shape, bars=bars)
    chosen = select_full_precision_layers(
        measure_sensitivity(probe, bars),
        options.keep_layers,
        options.min_psnr,
        probe.psnr_all_except,
    )
    console.print(
        f"{len(chosen)} of {len(probe.layers)} layers stay in {spec.base}:"
        f" {escape(', '.join(chosen) or 'none has to')}"
    )
    return chosen
