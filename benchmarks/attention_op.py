"""Attention as one ONNX operator against MatMul, Softmax and MatMul, in ONNX Runtime.

    python benchmarks/attention_op.py [--rounds 9]

Opset 23 with either form (`--attention-op`), so that nothing but attention differs, float32, two
models: the golden one of the tests, and 1.3B's width with two layers at 5 x 15 x 26 = 1,950 video
tokens, random weights. Each file is run as it stands, by plain ONNX Runtime, and through the
engine, which replaces either form by ONNX Runtime's own kernel. The two forms take turns, and the
ratio is the median of the rounds' ratios, so that a busy machine hits both. Peak memory is of a
process of its own that makes one evaluation. Errors are relative L2 against PyTorch in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from common import print_result, run_python

from anyflow_deploy import MODELS, load_engine
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.checkpoints.weights import Weights
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.metrics import difference
from anyflow_deploy.export.exporter import ExportSettings, export_bundle
from anyflow_deploy.export.torch_engine import TorchEngine

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "bidirectional"
SHAPES = {"golden": ((1, 3, 4, 12, 20), (1, 40, 32)), "wide": ((1, 5, 16, 30, 52), (1, 512, 4096))}
"""Latents and text of each model."""

_PEAK = """
import json, resource, sys
import numpy as np
from attention_op import open_velocity
bundle, how, inputs = sys.argv[1:]
given = dict(np.load(inputs))
open_velocity(bundle, how, given["latents"], given["text"])()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
FORMS, WAYS = ("primitive", "attention"), ("file", "engine")


def open_velocity(bundle: str, how: str, latents: Array, text: Array) -> Callable[[], Array]:
    """One evaluation of a bundle: of its file, by plain ONNX Runtime, or through the engine."""
    if how == "engine":
        run = load_engine(bundle).start(latents, text)
        return lambda: run.velocity(900, 500)
    session = onnxruntime.InferenceSession(
        f"{bundle}/transition.onnx", providers=["CPUExecutionProvider"]
    )
    times = np.ones(latents.shape[:2], np.float32)
    feed = {"latents": latents, "text": text, "t": 900 * times, "r": 500 * times}
    return lambda: np.asarray(session.run(["velocity"], feed)[0])


def models() -> dict[str, Weights]:
    """The two checkpoints."""
    wide = dataclasses.replace(MODELS["1.3b"].architecture, num_layers=2)
    return {"golden": open_checkpoint(GOLDEN), "wide": RandomWeights(wide, "wide")}


def measure_model(name: str, weights: Weights, folder: Path, rounds: int) -> dict[str, object]:
    """Both forms of one model, both ways."""
    generator = np.random.default_rng(0)
    latents, text = (generator.standard_normal(s).astype(np.float32) for s in SHAPES[name])
    inputs = folder / "inputs.npz"
    np.savez(inputs, latents=latents, text=text)
    with TorchEngine(weights).start(latents, text) as run:
        expected = run.velocity(900, 500)
    for form in FORMS:
        export_bundle(
            weights, folder / f"{name}-{form}", ExportSettings(opset=23, attention_op=form)
        )
    rows: dict[str, object] = {}
    for how in WAYS:
        bundles = {form: str(folder / f"{name}-{form}") for form in FORMS}
        velocities = {f: open_velocity(bundles[f], how, latents, text) for f in FORMS}
        errors = {f: difference(v(), expected).relative_l2 for f, v in velocities.items()}
        seconds = time_in_turns(velocities, rounds)
        ratio = statistics.median(
            a / p for a, p in zip(seconds["attention"], seconds["primitive"], strict=True)
        )
        for form in FORMS:
            peak = float(run_python(_PEAK, bundles[form], how, str(inputs))["output"])
            best = min(seconds[form])
            rows[f"{form}, {how}"] = {
                "seconds": best,
                "peak_mib": peak,
                "relative_l2": errors[form],
            }
            print(
                f"{name:7s} {how:7s} {form:10s} {best * 1e3:9.1f} ms {peak:7.0f} MiB"
                f"  {errors[form]:.1e}"
            )
        print(f"{name:7s} {how:7s} attention takes {ratio:.2f} of primitive's time", flush=True)
        rows[f"ratio, {how}"] = ratio
    return rows


def time_in_turns(calls: dict[str, Callable[[], Array]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round; they take turns, so that a busy machine hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Measure both models and print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        results = {
            name: measure_model(name, weights, Path(folder), rounds)
            for name, weights in models().items()
        }
    print_result("attention_op", {"rounds": rounds, **results})


if __name__ == "__main__":
    main()
