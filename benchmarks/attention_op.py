"""Attention as one ONNX operator against MatMul, Softmax and MatMul, in ONNX Runtime.

    python benchmarks/attention_op.py [--rounds 5]

Opset 23 with either form (`--attention-op`), so that nothing but attention differs, float32, two
models: the golden one of the tests, and 1.3B's width with two layers at 5 x 15 x 26 = 1,950 video
tokens, random weights. Each file is run as it stands, by plain ONNX Runtime, and through the
engine, which replaces either form by ONNX Runtime's own kernel. Each variant is a process of its
own, for its peak memory; errors are relative L2 against PyTorch in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
from common import print_result, run_python

from anyflow_deploy import MODELS
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.checkpoints.weights import Weights
from anyflow_deploy.export.exporter import ExportSettings, export_bundle
from anyflow_deploy.export.torch_engine import TorchEngine

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "bidirectional"
SHAPES = {"golden": ((1, 3, 4, 12, 20), (1, 40, 32)), "wide": ((1, 5, 16, 30, 52), (1, 512, 4096))}
"""Latents and text of each model."""

_RUN = """
import json, resource, sys, time
import numpy as np, onnxruntime
bundle, how, inputs, rounds, output = sys.argv[1:]
given = dict(np.load(inputs))
if how == "as it stands":
    session = onnxruntime.InferenceSession(
        bundle + "/transition.onnx", providers=["CPUExecutionProvider"])
    times = np.ones(given["latents"].shape[:2], np.float32)
    feed = {**given, "t": 900 * times, "r": 500 * times}
    velocity = lambda: session.run(["velocity"], feed)[0]
else:
    from anyflow_deploy import load_engine
    run = load_engine(bundle).start(given["latents"], given["text"])
    velocity = lambda: run.velocity(900, 500)
np.save(output, velocity())
seconds = []
for _ in range(int(rounds)):
    started = time.perf_counter()
    velocity()
    seconds.append(time.perf_counter() - started)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"seconds": min(seconds), "peak_mib": peak}))
"""


def models() -> dict[str, Weights]:
    """The two checkpoints."""
    wide = dataclasses.replace(MODELS["1.3b"].architecture, num_layers=2)
    return {"golden": open_checkpoint(GOLDEN), "wide": RandomWeights(wide, "wide")}


def measure_model(name: str, weights: Weights, folder: Path, rounds: int) -> dict[str, object]:
    """Both forms of one model, both ways."""
    generator = np.random.default_rng(0)
    latents, text = (generator.standard_normal(s).astype(np.float32) for s in SHAPES[name])
    inputs, output = folder / "inputs.npz", folder / "velocity.npy"
    np.savez(inputs, latents=latents, text=text)
    with TorchEngine(weights).start(latents, text) as run:
        expected = run.velocity(900, 500)
    rows: dict[str, object] = {}
    for form in ("primitive", "attention"):
        bundle = folder / f"{name}-{form}"
        export_bundle(weights, bundle, ExportSettings(opset=23, attention_op=form))
        for how in ("as it stands", "engine"):
            said = run_python(_RUN, str(bundle), how, str(inputs), str(rounds), str(output))
            error = np.linalg.norm(np.load(output) - expected) / np.linalg.norm(expected)
            row = {**json.loads(said["output"].splitlines()[-1]), "relative_l2": float(error)}
            rows[f"{form}, {how}"] = row
            print(
                f"{name:7s} {form:10s} {how:13s} {row['seconds'] * 1e3:9.1f} ms"
                f" {row['peak_mib']:8.0f} MiB  {error:.1e}"
            )
    return rows


def main() -> None:
    """Measure both models and print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        results = {
            name: measure_model(name, weights, Path(folder), rounds)
            for name, weights in models().items()
        }
    print_result("attention_op", {"rounds": rounds, **results})


if __name__ == "__main__":
    main()
