"""The bidirectional part of `gpu.py`: a step, and clips of some steps."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from gpu_contestants import contestants
from gpu_device import BenchmarkDevice, floor_seconds, milliseconds
from gpu_size import Size

from anyflow_deploy import Schedule, noise, sample
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.engines.engine import Array

STEPS = (1, 2, 4, 8)


def steps_in_turn(
    engines: dict[str, Any],
    inputs: tuple[Array, Array],
    machine: BenchmarkDevice,
    rounds: int,
    repeats: int,
) -> Any:
    """Seconds of a step by contestant, one for each round."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for index in range(rounds):
        for name in sorted(engines, reverse=bool(index % 2)):
            with engines[name].start(*inputs) as run:
                work = lambda run=run: [run.step(900.0, 500.0) for _ in range(repeats)]  # noqa: E731
                times[name].append(machine.seconds(work) / repeats)
    return times


def clips_in_turn(
    engines: dict[str, Any], inputs: tuple[Array, Array], machine: BenchmarkDevice, rounds: int
) -> dict[str, Any]:
    """Median milliseconds of a clip by contestant and number of steps."""
    times: dict[str, dict[int, list[float]]] = {name: {n: [] for n in STEPS} for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            for n in STEPS:
                work = lambda engine=engine, n=n: sample(engine, *inputs, Schedule.uniform(n))  # noqa: E731
                times[name][n].append(machine.seconds(work))
    return {
        name: {str(n): milliseconds(values) for n, values in rows.items()}
        for name, rows in times.items()
    }


def whole(
    options: argparse.Namespace, size: Size, folder: Path, machine: BenchmarkDevice
) -> dict[str, Any]:
    """The bidirectional part."""
    weights = RandomWeights(size.model, "1.3b")
    inputs = noise(size.latents, 0), noise(size.text, 1)
    floor = floor_seconds(size.model, size, machine, options.rounds)
    bound = floor["products_ms_per_step"] + floor["attentions_ms_per_step"]
    theirs = (
        []
        if options.skip_diffusers
        else ["diffusers"]
        if options.skip_compile
        else ["diffusers", "diffusers_compile"]
    )
    names = [*theirs, *options.engines.split(",")]
    with contestants(names, weights, folder, machine, inputs) as (engines, known):
        times = steps_in_turn(engines, inputs, machine, options.rounds, options.repeats)
        clips = clips_in_turn(engines, inputs, machine, max(1, options.rounds // 2))
    base = next((n for n in ("diffusers_compile", "diffusers") if n in times), None)
    for name, values in times.items():
        step = milliseconds(values)
        known[name] |= {
            "step_ms": step,
            "clip_ms": clips[name],
            "floor_share": round(bound / step, 3),
        }
        if base is not None:
            known[name][f"times_as_fast_as_{base}"] = round(
                float(np.median(np.array(times[base]) / np.array(values))), 2
            )
    return {"floor": floor, "contestants": known}
