"""Policies that decide how many steps a video gets: a number, a deadline, or a quality.

`StepPolicy` is the protocol that the sampler runs. It is implemented by `Schedule` (a number of
steps), `Deadline` (as many as fit into the time), `AdaptiveSteps` (as many as two candidates need
to agree), and for streams by `FirstChunkPolicy` and `ReuseFirstChunkSteps`. `StepSettings` is what
a request says about its steps; its fields have the same names on the command line, in the servers
and in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from anyflow_deploy.engines.adaptive_steps import (
    AdaptiveResult,
    AdaptiveSteps,
    ReuseFirstChunkSteps,
)
from anyflow_deploy.engines.deadline import Deadline, DeadlineResult, StepTimer
from anyflow_deploy.errors import InvalidRequestError
from anyflow_deploy.schedule import Schedule, Step

if TYPE_CHECKING:
    from anyflow_deploy.engines.engine import Array, Run

MAX_DEADLINE_STEPS = 50
"""The most steps under a deadline, where the request does not say."""

MAX_ADAPTIVE_STEPS = 32
"""The most steps for a quality, where the request does not say."""


class StepPolicy(Protocol):
    """Decides how many steps a sample gets, and runs them."""

    def run(
        self, start: Callable[[], Run], shape: tuple[int, ...], on_step: Callable[[Step], None]
    ) -> Array:
        """Generate one sample.

        Args:
            start: opens a run at the sample's noise; a policy may open several, one after the
                other.
            shape: of the latents, (B, F, C, H, W).
            on_step: called after each transition; an exception it raises ends the sample.

        Returns:
            Clean latents, float32 (B, F, C, H, W).
        """
        ...

    def for_chunk(self, index: int) -> StepPolicy:
        """Return the policy of one chunk of a stream; called when the chunk begins.

        Args:
            index: 0 for the first generated chunk; chunks of the context do not count.
        """
        ...


@dataclass(frozen=True)
class FirstChunkPolicy:
    """One policy for the first generated chunk of a stream, and another for all later ones.

    Attributes:
        first: policy of the first generated chunk.
        others: policy of all later chunks.
    """

    first: StepPolicy
    others: StepPolicy

    def run(
        self, start: Callable[[], Run], shape: tuple[int, ...], on_step: Callable[[Step], None]
    ) -> Array:
        """Generate one sample with the policy of the first chunk, float32 (B, F, C, H, W)."""
        return self.first.run(start, shape, on_step)

    def for_chunk(self, index: int) -> StepPolicy:
        """Return `first` for the first generated chunk, else `others`."""
        return (self.first if index == 0 else self.others).for_chunk(index)


def ignore_result(result: DeadlineResult | AdaptiveResult) -> None:
    """Do nothing with the outcome of a deadline or of a quality."""


@dataclass(frozen=True)
class StepSettings:
    """What a request says about its steps. None stands for "not said".

    Attributes:
        num_inference_steps: transitions of a video (of each chunk); with `deadline_s` or
            `target_psnr`, the maximum.
        first_steps: the same for the first generated chunk.
        shift: of the grid, see `Schedule.uniform`.
        sigmas: noise levels, in place of steps and shift.
        deadline_s: seconds for the transitions of a video (of each chunk).
        target_psnr: PSNR in decibels to reach between the sample and one of half as many steps.
    """

    num_inference_steps: int | None = None
    first_steps: int | None = None
    shift: float | None = None
    sigmas: tuple[float, ...] | None = None
    deadline_s: float | None = None
    target_psnr: float | None = None

    def check(self, name: Callable[[str], str] = str) -> None:
        """Refuse settings that contradict each other.

        Args:
            name: turns a field of this class into what the user calls it, such as a flag.

        Raises:
            InvalidRequestError: naming which to leave out.
        """
        fields = ("sigmas", "deadline_s", "target_psnr")
        choices = [field for field in fields if getattr(self, field) is not None]
        sigmas, quality = name("sigmas"), name("target_psnr")
        steps = name("num_inference_steps")
        first = name("first_steps")
        problem = None
        if len(choices) > 1:
            names = " and ".join(map(name, choices))
            problem = f"{names} each decide how many steps there are; give one of them."
        elif choices == ["sigmas"] and (self.num_inference_steps, self.shift) != (None, None):
            problem = f"{sigmas} is the whole schedule; leave out {steps} and {name('shift')}."
        elif choices == ["sigmas"] and self.first_steps is not None:
            problem = f"{sigmas} is the whole schedule, of every chunk; leave out {first}."
        elif choices == ["target_psnr"] and self.first_steps is not None:
            problem = (
                f"{quality} is decided on the first chunk, and the others follow; leave out"
                f" {first}."
            )
        elif choices == ["target_psnr"] and self.num_inference_steps == 1:
            problem = (
                f"{quality} compares one step with two, and {steps} 1 allows one; allowed are 2 or"
                " more."
            )
        if problem is not None:
            raise InvalidRequestError(problem, choices[0])

    def make_policy(
        self,
        default_steps: int,
        default_shift: float,
        step_timer: StepTimer | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_end: Callable[[DeadlineResult | AdaptiveResult], None] = ignore_result,
    ) -> StepPolicy:
        """Make the policy of one video.

        Args:
            default_steps, default_shift: of the bundle, where the request does not say.
            step_timer: measured times of the engine's transitions; share one between its requests.
            should_stop: see `Deadline`.
            on_end: called with the result of each sample, of a deadline or a quality.

        Raises:
            AnyFlowError: a number out of range.
        """
        shift = default_shift if self.shift is None else self.shift
        steps = self.num_inference_steps
        if self.deadline_s is not None:
            return self._make_deadline(shift, step_timer or StepTimer(), should_stop, on_end)
        if self.target_psnr is not None:
            max_steps = MAX_ADAPTIVE_STEPS if steps is None else steps
            return ReuseFirstChunkSteps(AdaptiveSteps(self.target_psnr, shift, max_steps, on_end))
        if self.sigmas is not None:
            return Schedule.from_sigmas(self.sigmas)
        schedule = Schedule.uniform(default_steps if steps is None else steps, shift)
        if self.first_steps is None:
            return schedule
        return FirstChunkPolicy(Schedule.uniform(self.first_steps, shift), schedule)

    def _make_deadline(
        self,
        shift: float,
        step_timer: StepTimer,
        should_stop: Callable[[], bool],
        on_end: Callable[[DeadlineResult | AdaptiveResult], None],
    ) -> StepPolicy:
        assert self.deadline_s is not None
        steps = self.num_inference_steps
        max_steps = MAX_DEADLINE_STEPS if steps is None else steps
        deadline = Deadline(self.deadline_s, shift, max_steps, step_timer, should_stop, on_end)
        if self.first_steps is None:
            return deadline
        first = Deadline(self.deadline_s, shift, self.first_steps, step_timer, should_stop, on_end)
        return FirstChunkPolicy(first, deadline)


class ProgressTracker:
    """Turns steps into the fraction of a video that has been sampled, for any policy.

    Args:
        samples: number of samples that are generated in turn: chunks, or 1 for a whole video.
    """

    def __init__(self, samples: int) -> None:
        self._samples = max(1, samples)
        self._finished_samples = 0
        self._current = 0.0

    def update(self, step: Step) -> float:
        """Record a step and return the progress.

        Returns:
            The fraction that is done, 0 to 1. It never decreases, even where a deadline plans more
            steps than before.
        """
        if step.index == 0 and self._current > 0.0:
            self._finished_samples += 1
            self._current = 0.0
        self._current = max(self._current, (step.index + 1) / step.steps)
        return min(1.0, (self._finished_samples + self._current) / self._samples)
