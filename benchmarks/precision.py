"""Compares precisions: the distance from float32, the size, and the speed.

    python benchmarks/precision.py [--models tiny,golden,wide] [--rounds 7]

Three models: `tiny` (96 channels, 3 layers), `golden` (tests/golden, the authors' initialisation)
and `wide` (1.3B width, 2 layers, random weights). For each and for every precision, with one
calibration (1, 2, 4, 8 steps and sweeps, random embeddings): the relative L2 distance of one
transition (t = 900 to r = 500) and of rollouts at 1, 2, 4, 8, 16 steps to diffusers in float32, the
bundle's size, and the seconds of a transition in ONNX Runtime. `kept` keeps the most sensitive
sixth of the layers. `agreement` is the distance between ONNX Runtime and the same rounding in
PyTorch (ModelOpt), of the whole network; `products` that of the worst 8-bit product alone, both
given the same input.

Speed is measured on `wide` at 1,950 tokens, as in step.py: diffusers eager in float32 and each
precision take turns, and the speedup is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import print_result
from step import SHAPE, TEXT, seconds

from anyflow_deploy import MODELS, Bundle, Schedule, load_engine, noise, sample
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.checkpoints.weights import Weights
from anyflow_deploy.engines.engine import Array, Engine
from anyflow_deploy.engines.metrics import difference
from anyflow_deploy.export.diffusers_engine import DiffusersEngine
from anyflow_deploy.export.exporter import ExportSettings, export_bundle
from anyflow_deploy.export.quantization.calibrate import CalibrationSettings, run_calibration
from anyflow_deploy.export.quantization.fake_quant import FakeQuant
from anyflow_deploy.export.quantization.matmul_parity import compare_products
from anyflow_deploy.export.quantization.plan import plan_quantization
from anyflow_deploy.export.quantization.prompts import random_prompt_embeds
from anyflow_deploy.export.quantization.sensitivity import (
    SensitivityAnalyzer,
    SensitivitySettings,
    measure_sensitivity,
    select_full_precision_layers,
)
from anyflow_deploy.export.torch_engine import TorchEngine
from anyflow_deploy.precision import resolve_precision
from anyflow_deploy.progress import NullProgress
from anyflow_deploy.quantization.calibration import Calibration

STEPS = (1, 2, 4, 8, 16)
GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "bidirectional"
SIZES = {"tiny": (3, 8, 12), "golden": (3, 12, 20), "wide": (2, 16, 24)}
"""Latent frames, rows and columns of the videos whose distance is measured."""


def weights_of(name: str) -> Weights:
    """Return the weights of a model of the table."""
    if name == "golden":
        return open_checkpoint(GOLDEN)
    if name == "tiny":
        return RandomWeights(MODELS["tiny"].architecture, name)
    architecture = dataclasses.replace(MODELS["1.3b"].architecture, num_layers=2)
    return RandomWeights(architecture, name)


def simple_variants(calibration: Calibration) -> dict[str, ExportSettings]:
    """Return the rows of the table that need no choice of layers."""
    return {
        "fp32": ExportSettings(),
        "fp16": ExportSettings("fp16"),
        "int8, max": ExportSettings("int8", smooth=False, calibration=calibration),
        "int8, SmoothQuant": ExportSettings("int8", calibration=calibration),
        "fp8": ExportSettings("fp8", calibration=calibration),
    }


def variants(
    weights: Weights, calibration: Calibration, shape: tuple[int, int, int, int]
) -> dict[str, ExportSettings]:
    """Return all rows."""
    settings = SensitivitySettings(
        random_prompt_embeds(weights, ("probe",)).prompt_embeds, shape, (1, 4)
    )
    sensitivity = measure_sensitivity(SensitivityAnalyzer(weights, calibration, "fp8", settings))
    rows = simple_variants(calibration)
    full_precision_layers = select_full_precision_layers(
        sensitivity, keep_layers=len(sensitivity.layers) // 6
    )
    return {
        **rows,
        "fp8, kept": dataclasses.replace(
            rows["fp8"], full_precision_layers=tuple(full_precision_layers)
        ),
    }


def run_rollouts(
    engine: Engine, latents: Array, text: Array, steps: tuple[int, ...] = STEPS
) -> dict[str, Array]:
    """Compute one velocity, and whole samples."""
    with engine.start(latents, text) as run:
        velocity = run.velocity(900, 500)
    return {
        "transition": velocity,
        **{str(n): sample(engine, latents, text, Schedule.uniform(n)) for n in steps},
    }


def distances(
    weights: Weights, calibration: Calibration, shape: tuple[int, int, int, int], folder: Path
) -> dict[str, Any]:
    """Compare every precision of one model with diffusers."""
    latents = noise((1, *shape), 7)
    text = random_prompt_embeds(weights, ("measured",)).prompt_embeds
    expected = run_rollouts(DiffusersEngine(weights), latents, text)
    rows = {}
    for name, settings in variants(weights, calibration, shape).items():
        print(f"  {name}", flush=True)
        bundle = export_bundle(weights, folder / name.replace(", ", "-"), settings)
        results = run_rollouts(load_engine(bundle), latents, text)
        rows[name] = {
            key: float(f"{difference(results[key], expected[key]).relative_l2:.3g}")
            for key in expected
        }
        rows[name]["megabytes"] = round(
            sum(file.bytes for file in bundle.manifest.files.values()) / 1e6, 2
        )
        rows[name]["flops_8_bit"] = bundle.manifest.achieved.quantized_flops
        if settings.calibration is not None:
            rows[name]["agreement"] = measure_agreement(
                bundle, weights, settings, latents, text, results
            )
    return rows


def measure_agreement(
    bundle: Bundle,
    weights: Weights,
    s: ExportSettings,
    latents: Array,
    text: Array,
    results: dict[str, Array],
) -> dict[str, float]:
    """Measure the distance of ONNX Runtime to the same rounding in PyTorch.

    It is measured for the whole network, and for the worst product alone.
    """
    assert s.calibration is not None
    spec = resolve_precision(s.precision, "fp32", s.target, smooth=s.smooth)
    plan = plan_quantization(weights, s.calibration, spec, s.full_precision_layers, NullProgress())
    engine = TorchEngine(weights)
    FakeQuant(
        engine.network,
        weights.architecture,
        s.calibration,
        s.precision,
        s.full_precision_layers,
        plan.smooth,
    )
    reference = run_rollouts(engine, latents, text, steps=(4,))
    network_distances = {
        key: difference(results[key], values).relative_l2 for key, values in reference.items()
    }
    product_distances = compare_products(
        bundle, engine, plan.smooth, lambda e: e.start(latents, text).velocity(900, 500)
    )
    return {
        key: float(f"{value:.3g}")
        for key, value in {
            **network_distances,
            "products": max(product_distances.values()),
        }.items()
    }


def speed(
    weights: Weights, settings: ExportSettings, folder: Path, rounds: int
) -> dict[str, float]:
    """Time a transition in turn with diffusers, and return the seconds and the speedup.

    One precision at a time: the idle threads of several ONNX Runtime sessions wait actively and
    would slow each other.
    """
    latents, text = noise(SHAPE, 0), noise(TEXT, 1)
    engine = load_engine(export_bundle(weights, folder, settings))
    ours = engine.start(latents, text)
    reference = DiffusersEngine(weights).start(latents, text)
    times: list[tuple[float, float]] = []
    for _ in range(rounds + 2):  # ONNX Runtime's arena settles in two runs
        times.append(
            (
                seconds(lambda: ours.velocity(900, 500)),
                seconds(lambda: reference.velocity(900, 500)),
            )
        )
    engine_times, diffusers_times = np.array(times[2:]).T
    return {
        "seconds": round(float(np.median(engine_times)), 3),
        "diffusers_seconds": round(float(np.median(diffusers_times)), 3),
        "speedup": round(float(np.median(diffusers_times / engine_times)), 2),
        "speedup_min": round(float((diffusers_times / engine_times).min()), 2),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="tiny,golden,wide")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("distances", "speed"))
    options = parser.parse_args()
    result: dict[str, Any] = {}
    for name in options.models.split(","):
        weights = weights_of(name)
        (frames, height, width) = SIZES[name]
        shape = (frames, weights.architecture.in_channels, height, width)
        print(f"{name}: calibration", flush=True)
        calibration = run_calibration(
            weights, CalibrationSettings(random_prompt_embeds(weights, ("one", "two")), shape)
        )
        rows = result[name] = {}
        with tempfile.TemporaryDirectory() as folder:
            if options.only != "speed":
                rows.update(distances(weights, calibration, shape, Path(folder)))
            if options.only != "distances" and name == "wide":
                for row, settings in simple_variants(calibration).items():
                    print(f"  speed of {row}", flush=True)
                    rows.setdefault(row, {}).update(
                        speed(weights, settings, Path(folder) / f"speed-{row}", options.rounds)
                    )
    print_result("precision", {"rounds": options.rounds, "steps": STEPS, "models": result})


if __name__ == "__main__":
    main()
