"""One GPU, everything that runs on it: milliseconds per step, per clip and to the first chunk, side
by side.

    python benchmarks/gpu.py                        # 1.3B, 480x832, 81 frames (32,760 tokens)
    python benchmarks/gpu.py --tiny --device cpu    # the same on a toy, to see that it works

Contestants, in turns within each round, random weights, the same noise and embeddings:

- `diffusers`: its transformer, eager, bf16; `diffusers_compile`: the same under torch.compile.
- `BACKEND_PRECISION` for each of --engines: a bundle exported here, built here, run through
  `load_engine`.

A backend that is missing on the machine is named in the result with its reason, and the others go
on.

1. A step: time of `--repeats` transitions and one synchronization, divided; medians over rounds,
  ratios per round.
2. A clip at 1, 2, 4, 8 steps, without text encoder and VAE.
3. A causal clip at 4 steps (the released chunk plan): seconds to its first chunk, seconds of the
   whole, frames per second, against diffusers' `AnyFlowFARPipeline` with the same weights.
4. What the device can do: the matrix products and attentions of one step alone (the floor of a
   step; its share of a contestant's time is how close that comes), the rate of one large product,
   and of a copy.

Memory is what the device has less of after a contestant's first steps than before it was loaded
(allocator's blocks included), so it is comparable between runtimes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import describe_failure, print_result
from gpu_causal import causal
from gpu_contestants import open_contestant
from gpu_device import BenchmarkDevice, floor_seconds
from gpu_size import Size, sizes
from gpu_whole import whole

from anyflow_deploy import AnyFlowError, Architecture
from anyflow_deploy.checkpoints.random_weights import RandomWeights

ENGINES = "aotinductor:bf16,aotinductor:fp8,tensorrt:bf16,tensorrt:fp8"


def device_ceilings(
    options: argparse.Namespace, size: Size, folder: Path, machine: BenchmarkDevice
) -> dict[str, float]:
    """The floor of a step and the device's rates, alone."""
    return floor_seconds(size.model, size, machine, options.rounds)


def build_ahead(
    architecture: Architecture,
    name: str,
    options: argparse.Namespace,
    folder: Path,
    machine: BenchmarkDevice,
) -> Any:
    """Export and build what a later run with the same --folder measures."""
    result: dict[str, Any] = {}
    for choice in options.engines.split(","):
        try:
            engine, result[choice] = open_contestant(
                RandomWeights(architecture, name), choice, folder, machine.device
            )
            engine.close()
        except (AnyFlowError, ImportError, RuntimeError) as error:
            result[choice] = describe_failure(error)
    return result


PARTS: dict[str, Callable[[argparse.Namespace, Size, Path, BenchmarkDevice], Any]] = {
    "whole": whole,
    "causal": causal,
    "ceilings": device_ceilings,
    "build-whole": lambda options, size, folder, machine: build_ahead(
        size.model, "1.3b", options, folder, machine
    ),
    "build-causal": lambda options, size, folder, machine: build_ahead(
        size.causal, "far-1.3b", options, folder, machine
    ),
}


def parse_options() -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--engines", default=ENGINES, help="backend:precision, …")
    parser.add_argument(
        "--layers", type=int, help="fewer than the model has, where minutes are short"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2, help="steps between two synchronizations")
    parser.add_argument(
        "--part",
        choices=tuple(PARTS),
        help="only this one; build-… fills --folder and measures nothing",
    )
    parser.add_argument("--skip-compile", action="store_true")
    parser.add_argument("--skip-diffusers", action="store_true")
    parser.add_argument(
        "--folder", type=Path, help="keep bundles and engines here, and use those that are there"
    )
    return parser.parse_args()


def main() -> None:
    """Run it."""
    options = parse_options()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(
            "torch sees no CUDA device here. To see that the program works: --tiny --device cpu"
        )
    machine = BenchmarkDevice(options.device)
    size = sizes(options.tiny, options.layers)
    result: dict[str, Any] = {
        "device": machine.describe(),
        "rounds": options.rounds,
        "layers": size.model.num_layers,
        "tokens": size.tokens,
    }
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True, parents=True)
        for name in [options.part] if options.part else ["whole", "causal"]:
            print(f"{name}:", flush=True)
            result[name] = PARTS[name](options, size, folder, machine)
    print_result("gpu", result)


if __name__ == "__main__":
    main()
