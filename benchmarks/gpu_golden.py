"""Compares every engine of this machine's GPU with golden vectors of the AnyFlow authors' code.

    python benchmarks/gpu_golden.py --engines aotinductor:fp32,aotinductor:bf16
    python benchmarks/gpu_golden.py --device cpu --engines onnxruntime:fp32  # a test of the script

For each BACKEND:PRECISION the small golden models of `tests/golden` are exported, built and run:
velocities, samples of 1, 2, 4, 8 and 13 steps, and streams of the causal model. The result is the
largest relative distance (L2) from the authors' vectors, beside the limit for that precision. For
an engine that cannot run it is the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from common import describe_failure, gpu_name, print_result
from safetensors.numpy import load_file

from anyflow_deploy import AnyFlowError, Bundle, Schedule, load_engine, sample, stream
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.engines.build import build_engine, settings_type
from anyflow_deploy.engines.metrics import difference
from anyflow_deploy.engines.registry import BACKENDS
from anyflow_deploy.export.exporter import ExportSettings, export_bundle
from anyflow_deploy.export.quantization.calibrate import CalibrationSettings, run_calibration
from anyflow_deploy.export.quantization.prompts import PROMPTS, random_prompt_embeds

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
LIMITS = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2, "int8": 0.15, "fp8": 0.15}
"""Limits of the relative distance, as in the tests. TF32 is off, so float32 results differ only by
the order of sums."""
STEPS = (1, 2, 4, 8, 13)
CAUSAL_STEPS = (1, 2, 8)
QUANTIZED = ("int8", "fp8")


def export_golden(kind: str, precision: str, folder: Path, device: str) -> Bundle:
    """Export the golden model of a kind.

    It is calibrated here where the precision has 8 bits.
    """
    weights = open_checkpoint(GOLDEN / kind)
    # ONNX Runtime's CPU provider has no bf16, so the target cpu refuses it; AOTInductor's has
    gpu = device.startswith("cuda") or precision == "bf16"
    settings = ExportSettings(precision, target="h100" if gpu else "cpu")
    if precision in QUANTIZED:
        frames, height, width = (8, 8, 8) if kind == "causal" else (2, 8, 12)
        shape = (frames, weights.architecture.in_channels, height, width)
        text = random_prompt_embeds(weights, PROMPTS[:1], 40)
        calibration = run_calibration(
            weights, CalibrationSettings(text, shape, steps=(1, 4), device=device)
        )
        settings = dataclasses.replace(settings, calibration=calibration)
    return export_bundle(weights, folder, settings)


def open_engine(
    bundle: Bundle, backend: str, provider: str, shapes: tuple[str, ...], target: str | None
) -> tuple[Any, dict[str, Any]]:
    """Build an engine where its backend compiles, and open it.

    Also returns what the build achieved.
    """
    achieved: dict[str, Any] = {}
    if BACKENDS[backend].build_settings is not None:
        settings_class = settings_type(backend)
        names = {field.name for field in dataclasses.fields(settings_class)}
        extra: dict[str, Any] = {"shapes": shapes} if "shapes" in names else {}
        extra |= {"allow_fallback": True} if "allow_fallback" in names else {}
        extra |= {"target": target} if "target" in names else {}
        achieved = build_engine(
            bundle, backend, settings_class(provider=provider, **extra)
        ).record.achieved
    engine = load_engine(bundle, backend, provider)
    # TensorRT for RTX finds out when it opens the engine
    return engine, getattr(engine, "achieved", achieved)


def bidirectional_distance(engine: Any, golden: dict[str, Any]) -> dict[str, float]:
    """Return distances of velocities and samples."""
    distances = {}
    with engine.start(golden["latents"], golden["text"]) as run:
        velocity = run.velocity(golden["timestep_per_frame"], golden["r_timestep_per_frame"])
    distances["velocity"] = difference(velocity, golden["velocity_per_frame"]).relative_l2
    for steps in STEPS:
        latents = sample(engine, golden["latents"], golden["text"], Schedule.uniform(steps))
        distances[f"sample_{steps}"] = difference(latents, golden[f"sample_{steps}"]).relative_l2
    return distances


def causal_distance(engine: Any, golden: dict[str, Any]) -> dict[str, float]:
    """Return distances of streams."""
    distances = {}
    for steps in CAUSAL_STEPS:
        chunks = stream(engine, golden["latents"], golden["text"], Schedule.uniform(steps))
        latents = np.concatenate([chunk.latents for chunk in chunks], axis=1)
        distances[f"stream_{steps}"] = difference(latents, golden[f"sample_{steps}"]).relative_l2
    return distances


def load_golden(kind: str) -> dict[str, Any]:
    """Read the vectors of a kind, all latents as (B, F, C, H, W)."""
    raw = load_file(GOLDEN / kind / "golden.safetensors")
    return {
        name.replace("_bcthw", ""): (
            np.ascontiguousarray(a.transpose(0, 2, 1, 3, 4)) if "_bcthw" in name else a
        )
        for name, a in raw.items()
    }


def measure(
    kind: str, choice: str, folder: Path, device: str, target: str | None
) -> dict[str, Any]:
    """Run one engine on one golden model."""
    backend, precision = choice.split(":")
    golden = load_golden(kind)
    batch, frames, _, height, width = golden["latents"].shape
    shape = f"{8 * height}x{8 * width}x{4 * frames - 3}:t{golden['text'].shape[1]}" + (
        f":b{batch}" if batch > 1 else ""
    )
    start = time.perf_counter()
    bundle = export_golden(kind, precision, folder / f"{kind}-{backend}-{precision}", device)
    engine, achieved = open_engine(
        bundle, backend, "cuda" if device.startswith("cuda") else "cpu", (shape,), target
    )
    with closing(engine):
        seconds_to_ready = time.perf_counter() - start
        distances = (causal_distance if kind == "causal" else bidirectional_distance)(
            engine, golden
        )
        worst = (
            max(distances.values()) if all(np.isfinite(list(distances.values()))) else float("inf")
        )
        return {
            "engine": engine.description,
            "seconds_to_ready": round(seconds_to_ready, 1),
            "achieved": achieved,
            "worst": worst,
            "limit": LIMITS[precision],
            "holds": bool(worst < LIMITS[precision]),
            "distances": {name: float(f"{value:.3g}") for name, value in distances.items()},
        }


def main() -> None:
    """Run every engine on both models; if one fails, its error is recorded and the others run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--engines",
        default=(
            "aotinductor:fp32,aotinductor:bf16,aotinductor:fp16,aotinductor:int8,aotinductor:fp8"
        ),
    )
    parser.add_argument("--kinds", default="bidirectional,causal")
    parser.add_argument(
        "--target", help="tensorrt-rtx: what is built for, as any (default: the GPU at hand)"
    )
    options = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for choice in options.engines.split(","):
            for kind in options.kinds.split(","):
                print(f"{choice} {kind}", flush=True)
                try:
                    row = measure(kind, choice, Path(temporary), options.device, options.target)
                except (AnyFlowError, ImportError, RuntimeError) as error:
                    row = describe_failure(error, 600)
                print(f"  {row.get('worst', row.get('not_run'))}", flush=True)
                result.setdefault(choice, {})[kind] = row
    print_result("gpu_golden", {"device": gpu_name(options.device), "engines": result})


if __name__ == "__main__":
    main()
