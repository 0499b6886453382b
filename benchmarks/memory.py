"""Compares a transition's memory in ONNX Runtime on the CPU with our estimate of it.

    python benchmarks/memory.py [--model 1.3b] [--layers 2] [--precision fp32]

The estimate is that of `anyflow_deploy/memory/estimate.py`. The model has its real width, few
layers and random weights. Each shape runs in a process of its own, two steps; the highest resident
memory during the steps, less that of the loaded model, is compared with the estimate's activations
and margin. Linux only: the peak is reset between loading and running through /proc.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from common import print_result, run_python

from anyflow_deploy import MODELS
from anyflow_deploy.memory.estimate import RUNTIME, LatentShape, estimate_memory
from anyflow_deploy.quantization.calibration import Calibration, TensorRange
from anyflow_deploy.quantization.layers import quantizable_layers
from anyflow_deploy.targets import TARGETS

if TYPE_CHECKING:
    from anyflow_deploy.checkpoints.weights import Weights

AMAX = 6.0
"""The range of every activation. Its value does not change the memory of a layer."""

SHAPES = (
    LatentShape(1, 30, 52),
    LatentShape(5, 30, 52),
    LatentShape(3, 60, 104),
    LatentShape(5, 60, 104),
)

_ONE = """
import json, sys
from pathlib import Path
import numpy as np
from anyflow_deploy import load_engine, noise

def now(word):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(word))

frames, height, width = map(int, sys.argv[2:])
empty = now("VmRSS")
engine = load_engine(sys.argv[1], threads=1)
a = engine.bundle.manifest.architecture
latents, text = noise((1, frames, a.in_channels, height, width), 0), noise((1, 512, a.text_dim), 1)
loaded = now("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
with engine.start(latents, text) as run:
    run.step(900, 500)
    run.step(500, 0)
print(json.dumps({"weights": loaded - empty, "activations": now("VmHWM") - loaded}))
"""


def constant_calibration(weights: Weights) -> Calibration:
    """Return a calibration with the same range for all activations."""

    a = weights.architecture
    return Calibration(
        config=a.as_config(),
        weights=weights.fingerprint,
        prompts=["none"],
        steps=[1],
        seeds=[0],
        shift=5.0,
        shapes=[[1, 1, a.in_channels, 8, 8]],
        tools={},
        tensors={
            f"{name}.input": TensorRange(amax=AMAX, channels=[AMAX] * k)
            for name, (k, _) in quantizable_layers(a).items()
        },
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="1.3b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--precision", default="fp32")
    options = parser.parse_args()
    from anyflow_deploy.checkpoints.random_weights import RandomWeights
    from anyflow_deploy.export.exporter import ExportSettings, export_bundle
    from anyflow_deploy.precision import EIGHT_BIT

    a = dataclasses.replace(MODELS[options.model].architecture, num_layers=options.layers)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        weights = RandomWeights(a, options.model)
        calibration = constant_calibration(weights) if options.precision in EIGHT_BIT else None
        export_bundle(
            weights,
            bundle,
            ExportSettings(options.precision, calibration=calibration, target="cpu"),
        )
        for shape in SHAPES:
            sizes = (shape.frames, shape.height, shape.width)
            memory = json.loads(run_python(_ONE, str(bundle), *map(str, sizes))["output"])
            need = estimate_memory(a, options.precision, TARGETS["cpu"], shape)
            estimate = need.activations + need.workspace - RUNTIME
            rows.append(
                {
                    "tokens": shape.tokens(a),
                    "weights_mb": round(memory["weights"] / 1e6),
                    "estimated_weights_mb": round(need.weights / 1e6),
                    "activations_mb": round(memory["activations"] / 1e6),
                    "estimated_activations_mb": round(estimate / 1e6),
                    "deviation": round(estimate / memory["activations"] - 1, 3),
                }
            )
    print_result("memory", {**vars(options), "rows": rows})


if __name__ == "__main__":
    main()
