"""Quality in place of a number of steps: the sampler takes as many as it needs to agree with itself.

A flow map that is right goes from t to r in one jump or in two half jumps and arrives at the same point. How far the two
arrive from each other is therefore an error one can measure without a teacher, a reference or a second model. Here it is
measured on the whole way: a sample is made in 1 step, then in 2, 4, 8 …, where each jump of one try is two half jumps of
the next (`Schedule.uniform` of 2N passes through all times of N), until two tries are as near as asked. The last try is
the sample, so nothing is made that was not compared.

If halving all jumps at least halves the error, the distance between the last two tries bounds the distance of the last one
to the limit of infinitely many steps: |z_2N - z_N| >= |z_N - z*| - |z_2N - z*| >= |z_2N - z*|. (Between the first tries of
a strongly shifted grid, where one jump stays long, it halves less, and the distance is too small.) That limit is the model's own
flow, not the truth: how good the model is cannot be seen this way. docs/deadlines.md has measurements.

The price: a sample of 2N steps costs 4N - 1 transitions, nearly twice its own. For a stream `first_chunk_decides` pays it
once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.metrics import Difference, difference
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.schedule import MAX_STEPS, Schedule


@dataclass(frozen=True)
class Pick:
    """A number of steps, and what speaks for it.

    Attributes:
        steps: of the sample that was kept.
        tries: step counts that were compared with the one before, and how far that was: from the coarser to the finer.
        reached: whether the last of them is as near as asked.
    """

    steps: int
    tries: tuple[tuple[int, Difference], ...]
    reached: bool

    @property
    def difference(self) -> Difference:
        """Of the last two tries; see the module for what it bounds."""
        return self.tries[-1][1]

    @property
    def transitions(self) -> int:
        """All that were made, with those of the coarser tries."""
        return 1 + sum(steps for steps, _ in self.tries)


@dataclass(frozen=True)
class Quality:
    """Stands where a `Schedule` may stand, in `sample` and, for every chunk anew, in `stream`.

    Attributes:
        psnr_db: what to reach between the sample and the one of half as many steps, in decibels, with the range of the
            latents as peak.
        shift: of the grid, see `Schedule.uniform`.
        most: steps are never more than this; tries are powers of two.
        on_end: told what was picked, after each sample or chunk.
    """

    psnr_db: float
    shift: float = 5.0
    most: int = 32
    on_end: Callable[[Pick], None] = field(default=lambda _: None)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.psnr_db) and self.psnr_db > 0):
            raise AnyFlowError(f"a quality of {self.psnr_db} dB was given; allowed is any positive number.")
        if not 2 <= self.most <= MAX_STEPS:
            raise AnyFlowError(f"at most {self.most} steps were asked for a quality; allowed are 2 to {MAX_STEPS}.")


def refined(made: Callable[[Schedule], Array], quality: Quality) -> Array:
    """Make a sample in ever more steps until two agree.

    Args:
        made: makes the sample by a schedule, always from the same noise.
        quality: what to reach, and who wants to know.

    Returns:
        The last try: the first that reaches the quality; else the finest allowed, or the first that is not finite.
    """
    sample, steps, tries, reached = made(Schedule.uniform(1, quality.shift)), 1, [], False
    while not reached and 2 * steps <= quality.most:
        coarser, steps = sample, 2 * steps
        sample = made(Schedule.uniform(steps, quality.shift))
        found = difference(coarser, sample)
        tries.append((steps, found))
        reached = found.psnr_db >= quality.psnr_db
        if not math.isfinite(found.relative_l2):
            break
    quality.on_end(Pick(steps, tuple(tries), reached))
    return sample


def first_chunk_decides(quality: Quality) -> Callable[[int], Schedule | Quality]:
    """For `stream`: the first chunk that is made finds its number of steps, all others take the same."""
    picked: list[Pick] = []

    def end(pick: Pick) -> None:
        picked.append(pick)
        quality.on_end(pick)

    search = Quality(quality.psnr_db, quality.shift, quality.most, end)
    return lambda chunk: Schedule.uniform(picked[0].steps, quality.shift) if picked else search
