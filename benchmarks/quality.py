"""Tests whether the distance between two candidates tells how far a sample is from the limit.

    python benchmarks/quality.py [--picture docs/images/quality.png]

On four small models (the golden ones, whose network is the AnyFlow authors', and the tiny
pipelines; all weights random) samples are generated in 1, 2, 4 … 64 steps from three noises. The
estimate is the distance to half as many steps, the truth the distance to 256 steps. For causal
models it also measures how far the first chunk's error is from that of the others.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import print_result

from anyflow_deploy import (
    MODELS,
    AdaptiveResult,
    AdaptiveSteps,
    Engine,
    Schedule,
    load_engine,
    noise,
    sample,
    stream,
)
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.checkpoints.tiny import save_tiny_pipeline
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.metrics import difference
from anyflow_deploy.export.exporter import export_bundle

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
COUNTS = (1, 2, 4, 8, 16, 32, 64)
LIMIT = 256
SEEDS = (0, 1, 2)
TARGETS = (26, 30, 34, 38, 42)
CHUNKS = (1, 3, 3, 3)


def engines(folder: Path) -> dict[str, Engine]:
    for name in ("tiny", "far-tiny"):
        save_tiny_pipeline(MODELS[name], folder / name)
    sources = {"golden": GOLDEN / "bidirectional", "golden causal": GOLDEN / "causal"}
    sources |= {"tiny": folder / "tiny", "tiny causal": folder / "far-tiny"}
    return {
        name: load_engine(export_bundle(open_checkpoint(source), folder / f"{name}-bundle"))
        for name, source in sources.items()
    }


def chunks(engine: Engine, seed: int, policy: Schedule | AdaptiveSteps) -> list[Array]:
    """Generate all chunks of a video; a bidirectional model has one."""
    a = engine.architecture
    text = noise((1, 16, a.text_dim), seed + 100)
    if a.chunk_partition is None:
        return [sample(engine, noise((1, 3, a.in_channels, 8, 12), seed), text, policy)]
    return [
        c.latents
        for c in stream(
            engine, noise((1, sum(CHUNKS), a.in_channels, 8, 8), seed), text, policy, CHUNKS
        )
    ]


def measure_tracking(engine: Engine) -> dict[str, Any]:
    """Compare estimate and truth for each number of steps.

    Also returns the range of their ratio, and the first chunk's deviation from the others.
    """
    runs = [
        {n: chunks(engine, seed, Schedule.uniform(n)) for n in (*COUNTS, LIMIT)} for seed in SEEDS
    ]
    rows = []
    ratios: list[float] = []
    spread = 0.0
    for steps in COUNTS[1:]:
        distances = [
            [
                (difference(*pair), difference(pair[1], limit))
                for *pair, limit in zip(run[steps // 2], run[steps], run[LIMIT], strict=True)
            ]
            for run in runs
        ]
        pairs = [pair for run in distances for pair in run]
        ratios += [estimate.relative_l2 / true.relative_l2 for estimate, true in pairs]
        spreads = [abs(run[0][1].psnr_db - true.psnr_db) for run in distances for _, true in run]
        spread = max([spread, *spreads])
        numbers = zip(
            *((e.relative_l2, t.relative_l2, e.psnr_db, t.psnr_db) for e, t in pairs), strict=True
        )
        rows.append((steps, *(round(statistics.median(column), 4) for column in numbers)))
    return {
        "rows": rows,
        "ratio": [round(min(ratios), 2), round(max(ratios), 2)],
        "first_chunk_off_db": round(spread, 1),
    }


def measure_selection(engine: Engine) -> dict[int, list[int]]:
    """Return the steps that each target selects, and all transitions that took."""
    selection = {}
    for target in TARGETS:
        results: list[AdaptiveResult] = []
        chunks(engine, 0, AdaptiveSteps(target, on_end=results.append))
        selection[target] = [results[0].steps, results[0].transitions]
    return selection


def draw(path: Path, results: dict[str, dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for index, (name, result) in enumerate(results.items()):
        steps, estimate, true, *_ = zip(*result["rows"], strict=True)
        axes.loglog(steps, true, color=f"C{index}", marker="o", label=name)
        axes.loglog(steps, estimate, color=f"C{index}", linestyle="--", marker="x")
    axes.set(
        xlabel="steps",
        ylabel="relative L2",
        title=f"to {LIMIT} steps (line), to half as many steps (dashed)",
    )
    axes.set_xticks(COUNTS[1:], map(str, COUNTS[1:]))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {
            name: {**measure_tracking(engine), "picked": measure_selection(engine)}
            for name, engine in engines(Path(folder)).items()
        }
    for name, result in results.items():
        print(f"{name}: estimate {result['ratio'][0]} to {result['ratio'][1]} of the truth")
        for steps, estimate, true, estimate_db, true_db in result["rows"]:
            print(
                f"  {steps:3} steps: estimate {estimate:.3f} ({estimate_db:.1f} dB), truth"
                f" {true:.3f} ({true_db:.1f} dB)"
            )
        print(
            "  "
            + ", ".join(
                f"{target} dB: {steps} steps, {transitions} transitions"
                for target, (steps, transitions) in result["picked"].items()
            )
        )
    if options.picture is not None:
        draw(options.picture, results)
    print_result("quality", {"models": results})


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
