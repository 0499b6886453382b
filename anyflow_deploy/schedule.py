"""The times a sample passes through, chosen at run time.

A flow map goes from any t to any r <= t, so a schedule is only a falling list of times from noise
(1000) to clean (0), and one engine serves them all. `Schedule.uniform` is the grid the released
models were distilled on: `steps + 1` evenly spaced s from 1 to 0, shifted to `shift * s / (1 +
(shift - 1) * s)`, in timesteps `t = 1000 s` (AnyFlow, arXiv 2605.13724; the numbers agree with the
authors' code). Arithmetic is in double precision.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anyflow_deploy.errors import AnyFlowError

if TYPE_CHECKING:  # this module is light: it needs neither numpy nor a backend
    from anyflow_deploy.engines.engine import Array, Run

TRAIN_TIMESTEPS = 1000.0
"""Timesteps between clean (0) and noise (1000): the unit of t and r everywhere in this project."""

MAX_STEPS = 1000
"""Largest number of steps: the model cannot tell times apart that are finer than in training."""


@dataclass(frozen=True)
class Step:
    """A transition that was just made.

    Attributes:
        index: 0 for the first.
        steps: number of steps; under a deadline, the number planned by now; of adaptive steps, the
            candidate's number.
        t, r: times before and after, in timesteps.
        read: fetches the state z_r, float32 (B, F, C, H, W); on a GPU this is a copy, so call it
            only when you look at it.
    """

    index: int
    steps: int
    t: float
    r: float
    read: Callable[[], Array]


@dataclass(frozen=True)
class Schedule:
    """Strictly falling timesteps, the last of them 0; `N + 1` of them make `N` transitions.

    Build one with `uniform`, `from_sigmas` or `from_timesteps`.

    Attributes:
        timesteps: floats in [0, 1000].

    Raises:
        AnyFlowError: empty, not falling, out of range, not finite, not ending at 0, or over 1000
            transitions.
    """

    timesteps: tuple[float, ...]

    def __post_init__(self) -> None:
        times = self.timesteps
        if len(times) < 2:
            raise AnyFlowError(
                f"a schedule needs at least one transition (two timesteps); given {list(times)}."
            )
        if len(times) - 1 > MAX_STEPS:
            raise AnyFlowError(
                f"a schedule of {len(times) - 1} steps was given; allowed are 1 to {MAX_STEPS}."
            )
        for index, time in enumerate(times):
            if not math.isfinite(time) or not 0.0 <= time <= TRAIN_TIMESTEPS:
                raise AnyFlowError(
                    f"timestep {index} is {time}; allowed are 0 (clean) to 1000 (noise)."
                )
        for index, (t, r) in enumerate(itertools.pairwise(times)):
            if r >= t:
                raise AnyFlowError(
                    f"timesteps must fall from noise to clean: number {index + 1} is {r}, after"
                    f" {t}. Sort them downwards."
                )
        if times[-1] != 0.0:
            raise AnyFlowError(f"a schedule ends at 0 (clean); this one ends at {times[-1]}.")

    @classmethod
    def uniform(cls, steps: int, shift: float = 5.0) -> Schedule:
        """Make `steps` transitions on the shifted uniform grid.

        Args:
            steps: 1 to 1000.
            shift: positive; 5 for the released models, 1 for no shift.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
            raise AnyFlowError(
                f"steps is {steps!r}; allowed are whole numbers from 1 to {MAX_STEPS}."
            )
        sigmas = [1.0 - i / steps for i in range(steps)] + [0.0]
        return cls(tuple(TRAIN_TIMESTEPS * s for s in shift_sigmas(sigmas, shift)))

    @classmethod
    def from_sigmas(cls, sigmas: Iterable[float], shift: float = 1.0) -> Schedule:
        """Make a schedule from your own noise levels, 1 (noise) to 0 (clean).

        A closing 0 is added where missing, as diffusers does. Unlike diffusers' scheduler, which
        applies the model's shift on top, the values are used as given unless you ask for a `shift`.
        """
        return cls(_append_zero(TRAIN_TIMESTEPS * s for s in shift_sigmas(list(sigmas), shift)))

    @classmethod
    def from_timesteps(cls, timesteps: Iterable[float]) -> Schedule:
        """Make a schedule from your own timesteps, 1000 (noise) to 0 (clean).

        They are used as given; a closing 0 is added where missing.
        """
        return cls(_append_zero(timesteps))

    @property
    def steps(self) -> int:
        """Number of transitions."""
        return len(self.timesteps) - 1

    @property
    def transitions(self) -> tuple[tuple[float, float], ...]:
        """The pairs (t, r), in order."""
        return tuple(itertools.pairwise(self.timesteps))

    def run(
        self, start: Callable[[], Run], shape: tuple[int, ...], on_step: Callable[[Step], None]
    ) -> Array:
        """Run one sample through these transitions, as every `StepPolicy` does.

        Args:
            start: opens a run at the sample's noise.
            shape: of the latents, (B, F, C, H, W).
            on_step: called after each transition; an exception it raises ends the sample.

        Returns:
            Clean latents, float32 (B, F, C, H, W).
        """
        with start() as run:
            for index, (t, r) in enumerate(self.transitions):
                run.step(t, r)
                on_step(Step(index, self.steps, t, r, run.read))
            return run.read()

    def for_chunk(self, index: int) -> Schedule:
        """Return this schedule: every chunk of a stream has the same."""
        return self


def shift_sigmas(sigmas: Sequence[float], shift: float) -> list[float]:
    """Shift each s in [0, 1] to `shift * s / (1 + (shift - 1) * s)`.

    Larger shifts spend more steps near the noise.

    It is written so that 1 stays exactly 1, whatever the rounding of `shift - 1`.
    """
    if not math.isfinite(shift) or shift <= 0:
        raise AnyFlowError(
            f"shift is {shift}; allowed is any positive number (the released models use 5)."
        )
    for index, s in enumerate(sigmas):
        if not 0.0 <= s <= 1.0:
            raise AnyFlowError(f"sigma {index} is {s}; allowed are 0 (clean) to 1 (noise).")
    return [shift * s / (shift * s + (1.0 - s)) for s in sigmas]


def next_timestep(t: float, steps: int, shift: float = 5.0) -> float:
    """Return where the first of `steps` transitions from `t` to 0 leads, on the shifted grid.

    It is 0 when there is only one.

    `Schedule.uniform` passes through the same times: from each of them, with one step fewer.
    """
    if steps == 1:
        return 0.0
    s = t / TRAIN_TIMESTEPS
    even = s / (s + shift * (1.0 - s)) * (1.0 - 1.0 / steps)
    return TRAIN_TIMESTEPS * shift_sigmas([even], shift)[0]


def _append_zero(times: Iterable[float]) -> tuple[float, ...]:
    values = tuple(float(t) for t in times)
    return values if not values or values[-1] == 0.0 else (*values, 0.0)
