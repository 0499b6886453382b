"""A small test of the paper's claim: a flow map distilled on policy is good at any number of steps.

    python benchmarks/any_step.py [--work FOLDER] [--processes 2] [--picture
    docs/images/any_step.png] [--tiny]

One tiny teacher learns the synthetic data (moving shapes with captions). Three methods distill it
at the same cost, counted in passes of the network, each with several seeds:

    (a) the full method     a flow map, then on policy
    (b) the flow map alone  the same run, longer
    (c) consistency         distillation, and its usual sampling in several steps

Their samples of 1, 2, 4 … 32 steps are compared with the data, as are the teacher's own. (a) and
(b) use the project's own trainer; (c) is in any_step_methods.py, the distances are in
any_step_distance.py.

It takes under 20 minutes on two cores. With --work the files are kept, and a run that was stopped
resumes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import any_step_methods as methods
import torch
from any_step_distance import VideoSet, distances
from any_step_methods import TINY, Size
from common import print_result
from safetensors.torch import load_file

COUNTS = (1, 2, 4, 8, 16, 32)
NAMES = {
    "teacher": "teacher",
    "full": "full method",
    "flow-map": "flow map alone",
    "consistency": "consistency",
}
SAMPLERS = {"teacher": "ode", "full": "jumps", "flow-map": "jumps", "consistency": "noised"}
DISTANCES = {
    "frechet": "Fréchet distance to the data",
    "sliced_wasserstein": "sliced Wasserstein distance to the data",
}
Row = tuple[str, int, list[dict[str, float]]]


def distill_and_measure(name: str, seed: int, work: Path, size: Size) -> Row:
    """Train one method with one seed, and measure it.

    The teacher is trained already.
    """
    runs = {
        "full": methods.full_run,
        "flow-map": methods.flow_map_alone,
        "consistency": methods.consistency_run,
    }
    model = runs[name](work, size, seed) if name in runs else work / "teacher" / "model"
    return measure_distances(name, seed, model, work, size)


def measure_distances(name: str, seed: int, model: Path, work: Path, size: Size) -> Row:
    """Measure the distances to the data for each of COUNTS."""
    data = load_videos(work, "data")
    videos = (
        methods.sample_videos(model, SAMPLERS[name], n, data.text, size.shift, seed) for n in COUNTS
    )
    return name, seed, [distances(one, data) for one in videos]


def load_videos(work: Path, name: str) -> VideoSet:
    return VideoSet(**load_file(work / f"{name}.safetensors"))


def make_executor(processes: int) -> Executor:
    """Return processes of one thread each: matrices this small gain little from a second one."""
    if processes == 1:
        return ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
    return ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,))


def compare_methods(work: Path, size: Size, processes: int) -> dict[str, Any]:
    """Train and measure everything."""
    methods.prepare(work, size)
    methods.teacher_run(work, size)
    seeds = range(size.seeds)
    with make_executor(processes) as pool:
        first_runs = [pool.submit(methods.flow_map_run, work, size, seed) for seed in seeds]
        rows = [pool.submit(distill_and_measure, "consistency", seed, work, size) for seed in seeds]
        wait(first_runs)  # the other methods start from them
        rows += [
            pool.submit(distill_and_measure, name, seed, work, size)
            for name in ("full", "flow-map", "teacher")
            for seed in seeds
        ]
        results = [row.result() for row in rows]
    by_name = {name: [one for which, _, one in results if which == name] for name in NAMES}
    table = {
        distance: {
            name: [summary([one[i][distance] for one in by_name[name]]) for i in range(len(COUNTS))]
            for name in NAMES
        }
        for distance in DISTANCES
    }
    return {
        "floor": distances(load_videos(work, "floor"), load_videos(work, "data")),
        "distances": table,
    }


def summary(values: list[float]) -> list[float]:
    """Return the mean and the standard deviation over seeds."""
    return [round(statistics.fmean(values), 5), round(statistics.stdev(values), 5)]


def claims(table: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Check the paper's claims in a table of one distance.

    "Worse" means by more than both standard deviations together.
    """

    def worse(later: list[float], earlier: list[float]) -> bool:
        return later[0] - earlier[0] > later[1] + earlier[1]

    best = {name: min(row, key=lambda cell: cell[0]) for name, row in table.items()}
    pairs = list(zip(COUNTS, table["full"], table["teacher"], strict=True))
    return {
        "full_better_than_teacher_at": [n for n, full, teacher in pairs if worse(teacher, full)],
        "full_worse_with_more_steps": worse(table["full"][-1], best["full"]),
        "flow_map_worse_with_more_steps": worse(table["flow-map"][-1], best["flow-map"]),
        "consistency_worse_with_more_steps": worse(table["consistency"][-1], best["consistency"]),
    }


def costs(work: Path, size: Size) -> dict[str, Any]:
    """Return the optimizer steps and seconds of every run, and the passes for each kind of step.

    The passes are counted for one sample.
    """
    runs = {
        path.parent.name: methods.read_progress(path.parent)
        for path in sorted(work.glob("*/done.json"))
    }
    return {
        "passes_a_step": methods.count_passes(methods.settings("on-policy", size, 0)),
        "runs": runs,
    }


def draw(path: Path, result: dict[str, Any]) -> None:
    """Draw a panel for each distance.

    Lines are means over seeds, bars a standard deviation, the dotted line the floor.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, (distance, label) in zip(panels, DISTANCES.items(), strict=True):
        for name, row in result["distances"][distance].items():
            mean, spread = zip(*row, strict=True)
            style = {"linestyle": "--", "color": "0.4"} if name == "teacher" else {}
            axes.errorbar(
                COUNTS,
                mean,
                spread,
                marker="o",
                markersize=4,
                capsize=3,
                label=NAMES[name],
                **style,
            )
        axes.axhline(
            result["floor"][distance], color="0.7", linestyle=":", label="data against data"
        )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(COUNTS, map(str, COUNTS))
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set(xlabel="steps", ylabel=label)
        axes.grid(alpha=0.3, which="both")
    panels[0].legend()
    figure.savefig(path, dpi=110)


def print_table(result: dict[str, Any]) -> None:
    for distance, label in DISTANCES.items():
        print(f"\n{label} (data against data: {result['floor'][distance]:.4f})")
        print(f"  {'steps':16}" + "".join(f"{n:>18}" for n in COUNTS))
        for name, row in result["distances"][distance].items():
            print(
                f"  {NAMES[name]:16}"
                + "".join(f"{mean:>9.4f} ± {spread:.4f}" for mean, spread in row)
            )
        print(
            "  " + ", ".join(f"{key}: {value}" for key, value in result["claims"][distance].items())
        )


@contextlib.contextmanager
def work_folder(folder: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as temporary:
        work = folder or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        yield work


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="keep the files in this folder")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--picture", type=Path)
    parser.add_argument(
        "--tiny", action="store_true", help="a test of seconds; the numbers mean nothing"
    )
    options = parser.parse_args()
    start = time.perf_counter()
    size = TINY if options.tiny else Size()
    with work_folder(options.work) as work:
        result = compare_methods(work, size, options.processes)
        result["claims"] = {
            distance: claims(table) for distance, table in result["distances"].items()
        }
        result["costs"] = costs(work, size)
    if options.picture is not None:
        draw(options.picture, result)
    print_table(result)
    seconds = round(time.perf_counter() - start)
    print_result(
        "any_step",
        {"size": dataclasses.asdict(size), "counts": COUNTS, "seconds": seconds, **result},
    )


if __name__ == "__main__":
    main()
