"""`anyflow-export`: a checkpoint becomes a bundle."""

from __future__ import annotations

import dataclasses
import math
import shlex
import time
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator
from rich.markup import escape

from anyflow_deploy.bundle.bundle import Bundle, BundleWriter
from anyflow_deploy.cli.fit import show_fit
from anyflow_deploy.cli.json_output import print_json
from anyflow_deploy.cli.lint import warn_about_tensorrt
from anyflow_deploy.cli.options import DONE, WORK_ERROR, JsonFlag, run
from anyflow_deploy.cli.quantize import (
    QuantizationOptions,
    choose_full_precision_layers,
    export_calibration_path,
    load_or_run_calibration,
)
from anyflow_deploy.cli.weights import check_name
from anyflow_deploy.errors import AnyFlowError, UnavailableError
from anyflow_deploy.export.operator_choice import OperatorChoice, choose_operators
from anyflow_deploy.models import SPATIAL_FACTOR, TEMPORAL_FACTOR
from anyflow_deploy.precision import PrecisionSpec, get_precision, resolve_precision
from anyflow_deploy.progress import console
from anyflow_deploy.shape_ranges import Range, latent_frames, latent_side, parse_span
from anyflow_deploy.targets import CPU_HAS_NO_BF16, check_precision, get_target

CHECKS = ("auto", "full", "none")
_AUTO_CHECK_BYTES = 2 << 30
"""Bytes that `--check auto` may take: the reference and the engine both hold the model."""


class ExportOptions(QuantizationOptions):
    """Export an AnyFlow checkpoint to a bundle: an ONNX graph, its weights and a manifest.

    Weights come from --checkpoint, from the Hub (--model), or from a seed (--model with
    --random-weights). The numbers are compared as far as this machine can.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "anyflow-export --model 1.3b --precision fp16",
        "anyflow-export --model 1.3b --precision fp8 --target h100 --calibration calibration.json",
        "anyflow-export --checkpoint my-anyflow/ --output my-bundle",
        "anyflow-export --model 14b --random-weights --frames 1:81 --height 480 --width 832",
    )
    VERDICT: ClassVar[str] = "the bundle was written, and its numbers are wrong"

    output: Path | None = Field(
        None, description="bundle folder to create (default MODEL-PRECISION)"
    )
    target: str = Field(
        "cpu", description="device the bundle is for; decides which precisions are allowed"
    )
    opset: int | None = Field(
        None,
        description="20: primitive operators; 23: Attention, RMSNormalization (default: by target)",
    )
    attention_op: str = Field(
        "auto",
        description="attention in ONNX: attention (one operator), primitive, auto (by target)",
    )
    batch: str | None = Field(None, description="videos at once, as 1 or 1:4")
    frames: str | None = Field(None, description="frames of a video (4n+1), as 81 or 1:81")
    height: str | None = Field(None, description="pixels, multiples of 16, as 480 or 256:720")
    width: str | None = Field(None, description="pixels, multiples of 16")
    text: str | None = Field(None, description="tokens of the prompt embedding, as 512")
    check: str = Field(
        "auto", description="compare with PyTorch afterwards: auto (small models), full, none"
    )
    overwrite: bool = Field(False, description="replace a bundle at --output")
    json_output: JsonFlag = False

    @field_validator("check")
    @classmethod
    def _validate_check(cls, name: str) -> str:
        if name not in CHECKS:
            raise ValueError(f"--check is {name!r}; allowed are {', '.join(CHECKS)}.")
        return name

    @model_validator(mode="after")
    def _check_consistency(self) -> ExportOptions:
        check_name(get_precision, self.precision)
        try:
            target = get_target(self.target)
            for name in (self.spec.precision, self.spec.base):
                check_precision(target, name)
            choose_operators(self.attention_op, self.opset, self.target, self.spec)
            self.ranges()
        except AnyFlowError as error:
            raise ValueError(str(error)) from None
        return self

    @cached_property
    def spec(self) -> PrecisionSpec:
        """The precision, with base, attention and smoothing filled in."""
        return resolve_precision(
            self.precision, self.base, self.target, self.attention, not self.no_smoothquant
        )

    def ranges(self) -> dict[str, Range]:
        """Return the axes that flags narrow, in latent units."""
        ranges = {}
        for axis in ("batch", "text"):
            if (text := getattr(self, axis)) is not None:
                ranges[axis] = Range(*parse_span(text, f"--{axis}"))
        if self.frames is not None:
            low, high = (
                latent_frames(n, TEMPORAL_FACTOR) for n in parse_span(self.frames, "--frames")
            )
            ranges["frames"] = Range(low, high)
        for axis in ("height", "width"):
            if (text := getattr(self, axis)) is not None:
                low, high = (
                    latent_side(n, SPATIAL_FACTOR, 2, axis) for n in parse_span(text, f"--{axis}")
                )
                ranges[axis] = Range(low, high, 2)
        return ranges


def export(options: ExportOptions) -> int:
    """Export a bundle and compare its numbers; return the exit status."""
    from anyflow_deploy.export.exporter import ExportSettings, export_bundle, validate_export
    from anyflow_deploy.export.quantization.calibrate import calibration_checkpoint_path
    from anyflow_deploy.progress import RichProgress

    start = time.perf_counter()
    output = options.output or Path(f"{_model_label(options)}-{options.precision}")
    settings = ExportSettings(
        options.precision,
        options.target,
        options.opset,
        options.ranges(),
        options.overwrite,
        options.spec.base,
        smooth=options.spec.smooth,
        attention=options.spec.attention,
        attention_op=options.attention_op,
    )
    weights = options.weights()
    validate_export(weights, settings)
    show_fit(weights.architecture, options.precision, options.target, options.ranges())
    # Refuse an impossible destination before a calibration of hours.
    BundleWriter(output, options.overwrite)
    with RichProgress(console) as bars:
        calibration = load_or_run_calibration(options, weights, output, bars)
        if calibration is not None:
            full_precision_layers = choose_full_precision_layers(
                options, options.spec, weights, calibration, bars
            )
            settings = dataclasses.replace(
                settings,
                calibration=calibration,
                full_precision_layers=tuple(full_precision_layers),
            )
        bundle = export_bundle(weights, output, settings, bars)
    if calibration is not None and options.calibration is None:
        # It was kept until here because it may have taken hours.
        calibration_checkpoint_path(export_calibration_path(output)).unlink(missing_ok=True)
    size = sum(record.bytes for record in bundle.manifest.files.values())
    seconds = time.perf_counter() - start
    console.print(
        f"[green]exported[/] {bundle.manifest.model} in {options.precision} to"
        f" [bold]{escape(str(bundle.path))}[/]: {size / 1e6:,.1f} MB in {seconds:.1f} s"
    )
    _show_operators(settings.operators)
    warn_about_tensorrt(bundle)
    check = _check_numbers(bundle, weights, options)
    if options.json_output:
        print_json({**_describe_bundle(bundle), "bytes": size, "seconds": seconds, "check": check})
    return WORK_ERROR if check["passed"] is False else DONE


def _describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """Say for `--json` what was written; anyflow-inspect --json prints all of it."""
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.path),
        "digest": bundle.digest,
        "model": manifest.model,
        "kind": manifest.kind,
        "precision": manifest.precision,
        "target": manifest.target,
    }


def _show_operators(operators: OperatorChoice) -> None:
    """Say how attention was written, and why."""
    form = "Attention" if operators.attention_op == "attention" else "MatMul, Softmax, MatMul"
    console.print(f"attention as {form}, opset {operators.opset}: {escape(operators.reason)}")


def _model_label(options: ExportOptions) -> str:
    return options.model or Path(options.checkpoint or ".").resolve().name


def _check_numbers(  # type: ignore[no-untyped-def]
    bundle: Bundle, weights, options: ExportOptions
) -> dict[str, Any]:
    """Compare the new bundle with PyTorch if asked, or if cheap.

    A comparison that this machine cannot make says nothing of the bundle, so it is reported with
    the command that makes it elsewhere.

    Returns:
        `passed` (None where it was not compared), `report` or None, and where it was not compared
        `reason` and `command`, else None.
    """
    from anyflow_deploy.cli.validate import ValidateOptions, validate_bundle

    needed_bytes = 3 * 4 * sum(math.prod(shape) for shape in weights.shapes().values())
    on_cpu = bundle.manifest.base in get_target("cpu").precisions
    flags = "" if on_cpu else "--provider cuda"
    if options.check == "none":
        return _report_unchecked(bundle, "--check none", flags)
    if not on_cpu:
        why = f"{bundle.manifest.base} does not run on this machine's CPU: {CPU_HAS_NO_BF16}"
        return _report_unchecked(bundle, why, flags)
    if options.check == "auto" and needed_bytes > _AUTO_CHECK_BYTES:
        return _report_unchecked(bundle, f"it takes about {needed_bytes / 2**30:.1f} GiB", flags)
    try:
        content = validate_bundle(bundle, ValidateOptions(bundle=bundle.path), weights)
    except UnavailableError as error:
        return _report_unchecked(bundle, str(error), error.flags)
    return {
        "passed": content["passed"],
        "report": content["report"],
        "reason": None,
        "command": None,
    }


def _report_unchecked(bundle: Bundle, why: str, flags: str) -> dict[str, Any]:
    """Print why the numbers were not checked, and the command that checks them."""
    command = " ".join(["anyflow-validate", shlex.quote(str(bundle.path)), *flags.split()])
    console.print(
        f"numbers [yellow]not checked[/] ({escape(why)}); check them with: {escape(command)}"
    )
    return {"passed": None, "report": None, "reason": why, "command": command}


def main() -> None:
    """Run `anyflow-export` with the flags of the command line."""
    run("anyflow-export", ExportOptions, export)
