"""The sampling loop, for every backend and every schedule.

    z_0 = sample(engine, noise((1, 21, 16, 60, 104), seed=0), text, Schedule.uniform(4))

There is nothing to it, and that is the point of a flow map: no noise is added between steps and no guidance is run, so
a sample is N transitions and depends on nothing but its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from anyflow_deploy.engines.engine import Array, Engine
from anyflow_deploy.schedule import Schedule


@dataclass(frozen=True)
class Step:
    """A transition that was just made.

    Attributes:
        index: 0 for the first.
        steps: how many there are.
        t, r: where it went from and to, in timesteps.
        read: fetches the state z_r; on a GPU this is a copy, so call it only when you look at it.
    """

    index: int
    steps: int
    t: float
    r: float
    read: Callable[[], Array]


def sample(
    engine: Engine, latents: ArrayLike, text: ArrayLike, schedule: Schedule, on_step: Callable[[Step], None] | None = None
) -> Array:
    """Take latents from noise to clean.

    Args:
        engine: from `load_engine`.
        latents: noise, (B, F, C, H, W).
        text: prompt embeddings, (B, L, D).
        schedule: the times to pass through.
        on_step: called after each transition; an exception it raises ends the sampling and reaches the caller.

    Returns:
        Clean latents, float32 (B, F, C, H, W); the same inputs give the same bits on the same engine.

    Raises:
        AnyFlowError: inputs outside what the engine declares.
    """
    with engine.start(latents, text) as run:
        for index, (t, r) in enumerate(schedule.transitions):
            run.step(t, r)
            if on_step is not None:
                on_step(Step(index, schedule.steps, t, r, run.read))
        return run.read()


def noise(shape: Sequence[int], seed: int) -> Array:
    """Standard normal latents that are the same on every machine, with or without torch.

    numpy's PCG64 in double precision, rounded to float32. (torch's generator gives other numbers for the same seed.)
    """
    return np.random.default_rng(seed).standard_normal(tuple(shape)).astype(np.float32)
