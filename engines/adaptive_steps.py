"""Quality in place of a number of steps: the sampler takes as many as it needs to agree with
itself.

A flow map that is right goes from t to r in one jump or in two half jumps and arrives at the same
point. How far the two arrive from each other is therefore an error one can measure without a
teacher, a reference or a second model. Here it is measured on the whole way: a sample is made in 1
step, then in 2, 4, 8 …, where each jump of one try is two half jumps of the next
(`Schedule.uniform` of 2N passes through all times of N), until two tries are as near as asked. The
last try is the sample, so nothing is made that was not compared.

If halving all jumps at least halves the error, the distance between the last two tries bounds the
distance of the last one to the limit of infinitely many steps: |z_2N - z_N| >= |z_N - z*| - |z_2N -
z*| >= |z_2N - z*|. (Between the first tries of a strongly shifted grid, where one jump stays long,
it halves less, and the distance is too small.) That limit is the model's own flow, not the truth:
how good the model is cannot be seen this way. docs/how-to/deadlines.md has measurements.

The price: a sample of 2N steps costs 4N - 1 transitions, nearly twice its own. For a stream
`ReuseFirstChunkSteps` pays it once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from anyflow_deploy.engines.engine import Array, Run
from anyflow_deploy.engines.metrics import Difference, difference
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.schedule import MAX_STEPS, Schedule, Step


@dataclass(frozen=True)
class AdaptiveResult:
    """A number of steps, and what speaks for it.

    Attributes:
        steps: of the sample that was kept.
        candidates: step counts that were compared with the one before, and how far that was: from
            the coarser to the finer.
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
    """The `StepPolicy` of a quality, in `sample` and, for every chunk anew, in `stream`.

    Attributes:
        psnr_db: what to reach between the sample and the one of half as many steps, in decibels,
            with the range of the latents as peak.
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
            raise AnyFlowError(
                f"a quality of {self.psnr_db} dB was given; allowed is any positive number."
            )
        if not 2 <= self.max_steps <= MAX_STEPS:
            raise AnyFlowError(
                f"at most {self.max_steps} steps were asked for a quality; allowed are 2 to"
                f" {MAX_STEPS}."
            )

    def run(
        self, start: Callable[[], Run], shape: tuple[int, ...], on_step: Callable[[Step], None]
    ) -> Array:
        """Make a sample in ever more steps until two agree.

        Args:
            start: opens a run, always at the same noise.
            shape: of the latents, (B, F, C, H, W).
            on_step: called after each transition of each candidate; an exception it raises ends
                the sample.

        Returns:
            The last candidate, float32 (B, F, C, H, W): the first that reaches the quality; else
            the finest allowed, or the first that is not finite.
        """
        steps = 1
        sample = Schedule.uniform(steps, self.shift).run(start, shape, on_step)
        candidates: list[tuple[int, Difference]] = []
        reached = False
        while not reached and 2 * steps <= self.max_steps:
            coarser = sample
            steps = 2 * steps
            sample = Schedule.uniform(steps, self.shift).run(start, shape, on_step)
            distance = difference(coarser, sample)
            candidates.append((steps, distance))
            reached = distance.psnr_db >= self.psnr_db
            if not math.isfinite(distance.relative_l2):
                break
        self.on_end(AdaptiveResult(steps, tuple(candidates), reached))
        return sample

    def for_chunk(self, index: int) -> AdaptiveSteps:
        """Return this policy: every chunk of a stream finds its own number of steps."""
        return self


class ReuseFirstChunkSteps:
    """The `StepPolicy` of a stream whose first chunk finds its number of steps; all others take it.

    It remembers that number until a first chunk is made again, so each stream needs one of its own.

    Args:
        search: what the first chunk has to reach.
    """

    def __init__(self, search: AdaptiveSteps) -> None:
        self._search = search
        self._result: AdaptiveResult | None = None
        self._first = replace(search, on_end=self._end)

    def run(
        self, start: Callable[[], Run], shape: tuple[int, ...], on_step: Callable[[Step], None]
    ) -> Array:
        """Make one sample, as the first chunk is made; see `AdaptiveSteps.run`."""
        return self._first.run(start, shape, on_step)

    def for_chunk(self, index: int) -> AdaptiveSteps | Schedule:
        """Return the search for the first chunk that is made, and what it found for the others."""
        if index == 0 or self._result is None:
            return self._first
        return Schedule.uniform(self._result.steps, self._search.shift)

    def _end(self, result: AdaptiveResult) -> None:
        self._result = result
        self._search.on_end(result)
