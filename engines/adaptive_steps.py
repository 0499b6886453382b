"""Quality in place of a number of steps: the sampler takes as many as it needs to agree with itself.

A flow map that is right goes from t to r in one jump or in two half jumps and arrives at the same point. How far the two
arrive from each other is therefore an error one can measure without a teacher, a reference or a second model. Here it is
measured on the whole way: a sample is made in 1 step, then in 2, 4, 8 …, where each jump of one try is two half jumps of
the next (`Schedule.uniform` of 2N passes through all times of N), until two tries are as near as asked. The last try is
the sample, so nothing is made that was not compared.

If halving all jumps at least halves the error, the distance between the last two tries bounds the distance of the last one
to the limit of infinitely many steps: |z_2N - z_N| >= |z_N - z*| - |z_2N - z*| >= |z_2N - z*|. (Between the first tries of
a strongly shifted grid, where one jump stays long, it halves less, and the distance is too small.) That limit is the model's own
flow, not the truth: how good the model is cannot be seen this way. docs/how-to/deadlines.md has measurements.

The price: a sample of 2N steps costs 4N - 1 transitions, nearly twice its own. For a stream `reuse_first_chunk_steps` pays it
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
class AdaptiveResult:
    """A number of steps, and what speaks for it.

    Attributes:
        steps: of the sample that was kept.
        candidates: step counts that were compared with the one before, and how far that was: from the coarser to the finer.
        reached: whether the last of them is as near as asked.
    """

    steps: int
    candidates: tuple[tuple[int, Difference], ...]
    reached: bool

    @property
    def difference(self) -> Difference:
        """Of the last two tries; see the module for what it bounds."""
        return self.candidates[-1][1]

    @property
    def transitions(self) -> int:
        """All that were made, with those of the coarser tries."""
        return 1 + sum(steps for steps, _ in self.candidates)


@dataclass(frozen=True)
class AdaptiveSteps:
    """Stands where a `Schedule` may stand, in `sample` and, for every chunk anew, in `stream`.

    Attributes:
        psnr_db: what to reach between the sample and the one of half as many steps, in decibels, with the range of the
            latents as peak.
        shift: of the grid, see `Schedule.uniform`.
        max_steps: steps are never more than this; tries are powers of two.
        on_end: told what was picked, after each sample or chunk.
    """

    psnr_db: float
    shift: float = 5.0
    max_steps: int = 32
    on_end: Callable[[AdaptiveResult], None] = field(default=lambda _: None)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.psnr_db) and self.psnr_db > 0):
            raise AnyFlowError(f"a quality of {self.psnr_db} dB was given; allowed is any positive number.")
        if not 2 <= self.max_steps <= MAX_STEPS:
            raise AnyFlowError(f"at most {self.max_steps} steps were asked for a quality; allowed are 2 to {MAX_STEPS}.")


def sample_adaptively(make_sample: Callable[[Schedule], Array], target: AdaptiveSteps) -> Array:
    """Make a sample in ever more steps until two agree.

    Args:
        make_sample: makes the sample by a schedule, always from the same noise.
        target: what to reach, and who wants to know.

    Returns:
        The last try: the first that reaches the quality; else the finest allowed, or the first that is not finite.
    """
    sample, steps, candidates, reached = make_sample(Schedule.uniform(1, target.shift)), 1, [], False
    while not reached and 2 * steps <= target.max_steps:
        coarser, steps = sample, 2 * steps
        sample = make_sample(Schedule.uniform(steps, target.shift))
        distance = difference(coarser, sample)
        candidates.append((steps, distance))
        reached = distance.psnr_db >= target.psnr_db
        if not math.isfinite(distance.relative_l2):
            break
    target.on_end(AdaptiveResult(steps, tuple(candidates), reached))
    return sample


def reuse_first_chunk_steps(target: AdaptiveSteps) -> Callable[[int], Schedule | AdaptiveSteps]:
    """For `stream`: the first chunk that is made finds its number of steps, all others take the same."""
    results: list[AdaptiveResult] = []

    def end(result: AdaptiveResult) -> None:
        results.append(result)
        target.on_end(result)

    search = AdaptiveSteps(target.psnr_db, target.shift, target.max_steps, end)
    return lambda chunk: Schedule.uniform(results[0].steps, target.shift) if results else search
