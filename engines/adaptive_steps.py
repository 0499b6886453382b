"""Adaptive steps: sampling refines until two candidates agree to a given quality.

A perfect flow map arrives at the same point whether it goes from t to r in one transition or in two
half as long. The distance between the two results is therefore an error that can be measured
without a teacher, a reference or a second model. Here it is measured over the whole trajectory: a
candidate is generated in 1 step, then in 2, 4, 8 …, where each transition of one candidate becomes
two of the next (`Schedule.uniform` of 2N passes through all times of N), until two candidates are
as close as the caller wants. The last candidate is the sample.

If halving all transitions at least halves the error, the distance between the last two candidates
bounds the distance of the last one to the limit of infinitely many steps: |z_2N - z_N| >= |z_N -
z*| - |z_2N - z*| >= |z_2N - z*|. (Between the first candidates of a strongly shifted grid, where
one transition stays long, the error halves less, and the distance is too small.) That limit is the
model's own flow: the distance does not tell how good the model is. docs/how-to/deadlines.md has
measurements.

The cost: a sample of 2N steps takes 4N - 1 transitions, nearly twice its own. In a stream
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
    """The number of steps that was chosen, and the comparisons that led to it.

    Attributes:
        steps: of the sample that was returned.
        candidates: each further step count, and the difference of its candidate from the one
            before.
        reached: whether the last candidate has the quality.
    """

    steps: int
    candidates: tuple[tuple[int, Difference], ...]
    reached: bool

    @property
    def difference(self) -> Difference:
        """Between the last two candidates; the module says what it bounds."""
        return self.candidates[-1][1]

    @property
    def transitions(self) -> int:
        """All transitions that were run, those of the coarser candidates included."""
        return 1 + sum(steps for steps, _ in self.candidates)


@dataclass(frozen=True)
class AdaptiveSteps:
    """The `StepPolicy` of a quality.

    In `stream` it holds for each chunk separately.

    Attributes:
        psnr_db: what to reach between the sample and the one of half as many steps, in decibels,
            with the range of the latents as peak.
        shift: of the grid, see `Schedule.uniform`.
        max_steps: upper limit of the steps; candidates have powers of two.
        on_end: called with the result after each sample or chunk.
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
                f"the maximum number of steps for a quality is {self.max_steps}; allowed are 2 to"
                f" {MAX_STEPS}."
            )

    def run(
        self, start: Callable[[], Run], shape: tuple[int, ...], on_step: Callable[[Step], None]
    ) -> Array:
        """Generate a sample in more and more steps until two candidates agree.

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
    """The `StepPolicy` of a stream whose first chunk decides the steps of all chunks.

    It keeps that number until a first chunk is generated again, so each stream needs a policy of
    its own.

    Args:
        search: the quality that the first chunk has to reach.
    """

    def __init__(self, search: AdaptiveSteps) -> None:
        self._search = search
        self._result: AdaptiveResult | None = None
        self._first = replace(search, on_end=self._record_result)

    def run(
        self, start: Callable[[], Run], shape: tuple[int, ...], on_step: Callable[[Step], None]
    ) -> Array:
        """Generate one sample with the policy of the first chunk, float32 (B, F, C, H, W)."""
        return self._first.run(start, shape, on_step)

    def for_chunk(self, index: int) -> AdaptiveSteps | Schedule:
        """Return the search for the first generated chunk, and its steps for the others."""
        if index == 0 or self._result is None:
            return self._first
        return Schedule.uniform(self._result.steps, self._search.shift)

    def _record_result(self, result: AdaptiveResult) -> None:
        self._result = result
        self._search.on_end(result)
