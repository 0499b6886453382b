"""Compares the default calibration with a thorough one: processor time, ranges, fidelity.

    python benchmarks/calibration.py [--models tiny,far-tiny] [--noises 3]

The models are the tiny pipelines, made here, at the sizes that `anyflow-calibrate` chooses. There
are three calibrations: `thorough` (every prompt alone, a causal model's whole video), `default`,
and `other noise`: the thorough video in batches, with another seed, which says how far the maxima
of samples differ anyway. For each: seconds of processor (user and system, one thread, without
imports and the text encoder); by tensor, its range over the thorough one's less 1; and the PSNR of
int8 videos, of latents, against the unquantized network, at 1 and 4 steps, for some noises that no
calibration saw. Rounding is PyTorch's, as in `anyflow-sensitivity`, with SmoothQuant.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import print_result

from anyflow_deploy import MODELS
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.checkpoints.tiny import save_tiny_pipeline
from anyflow_deploy.checkpoints.weights import Weights
from anyflow_deploy.cli.sensitivity import make_analyzer
from anyflow_deploy.export.quantization.calibrate import CalibrationSettings, run_calibration
from anyflow_deploy.export.quantization.modelopt_loader import load_modelopt
from anyflow_deploy.export.quantization.prompts import PROMPTS, embed_prompts
from anyflow_deploy.export.quantization.rollouts import calibration_shape, latent_shape
from anyflow_deploy.precision import resolve_precision
from anyflow_deploy.quantization.calibration import Calibration

FIRST_NOISE = 100
"""Calibrations take their noise from seeds 0 and 1."""


def calibrations(weights: Weights) -> dict[str, CalibrationSettings]:
    """Return the settings that are compared, by name."""
    a = weights.architecture
    text = embed_prompts(weights, PROMPTS)
    whole = CalibrationSettings(text, calibration_shape(a, None, None, None, thorough=True))
    return {
        "thorough": dataclasses.replace(whole, thorough=True),
        "default": CalibrationSettings(text, calibration_shape(a, None, None, None)),
        "other noise": dataclasses.replace(whole, seeds=(1,)),
    }


def range_changes(calibration: Calibration, reference: Calibration) -> dict[str, float]:
    """Return the lowest, mean and highest relative change of a tensor's range."""
    changes = [
        tensor.amax / reference.tensors[name].amax - 1
        for name, tensor in calibration.tensors.items()
    ]
    return {
        "lowest": min(changes),
        "mean": statistics.mean(changes),
        "highest": max(changes),
    }


def int8_psnr(weights: Weights, calibration: Calibration, noises: int) -> float:
    """Return the mean PSNR in decibels of int8 videos, each the worst of 1 and 4 steps."""
    a = weights.architecture
    shape = latent_shape(a, 29 if a.causal else None, None, None)
    spec = resolve_precision("int8", None, "cpu", "high", True)
    return statistics.mean(
        make_analyzer(weights, calibration, spec, shape, seed=seed).psnr_all_except(())
        for seed in range(FIRST_NOISE, FIRST_NOISE + noises)
    )


def compare(model: str, folder: Path, noises: int) -> dict[str, Any]:
    """Run the calibrations of one model, and compare them."""
    save_tiny_pipeline(MODELS[model], folder)
    weights = open_checkpoint(folder)
    rows: dict[str, Any] = {}
    reference: Calibration | None = None
    for name, settings in calibrations(weights).items():
        start = time.process_time()
        calibration = run_calibration(weights, settings)
        seconds = time.process_time() - start
        reference = reference or calibration
        rows[name] = {
            "cpu_seconds": round(seconds, 2),
            "prompts": len(calibration.prompts),
            "batch": calibration.batch,
            "latent_frames": settings.shape[0],
            "ranges": {k: round(v, 4) for k, v in range_changes(calibration, reference).items()},
            "int8_psnr_db": round(int8_psnr(weights, calibration, noises), 2),
        }
        print(f"{model:9} {name:12} {rows[name]}", flush=True)
    return rows


def main() -> None:
    """Run the comparison and print it, last as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="tiny,far-tiny")
    parser.add_argument("--noises", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load_modelopt()
    with tempfile.TemporaryDirectory() as folder:
        result = {
            model: compare(model, Path(folder) / model, options.noises)
            for model in options.models.split(",")
        }
    print_result("calibration", {"models": result})


if __name__ == "__main__":
    main()
