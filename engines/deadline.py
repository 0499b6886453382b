"""Deadlines: as many steps as the time allows, and a clean sample when time is up.

Only a flow map can promise this: from any time t it reaches r = 0 in one transition. So the number
of steps need not be chosen beforehand. Before each transition the remaining time is divided by the
time of one transition, which gives the number of steps; when only one more fits, it goes straight
to r = 0. As long as transitions take equally long, the times are those of `Schedule.uniform`.

The time of a transition is measured while sampling and kept in a `StepTimer`, which many requests
share. The first request of a new shape has no measurement, so it begins with a probe step: one
transition to r = 0, timed and kept. The probe step is the result when there is no time for two
better steps.

A deadline is missed by at most one transition, unless one takes more than twice as long as the
slowest of the last five.

The caller may also end sampling at any moment (`Deadline.should_stop`): the next transition then
goes to r = 0, so the best sample available is one transition away. In a stream this holds for every
later chunk. docs/how-to/deadlines.md has an example.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.schedule import MAX_STEPS, TRAIN_TIMESTEPS, Step, next_timestep

if TYPE_CHECKING:
    from anyflow_deploy.engines.engine import Array, Run

Shape = tuple[int, ...]

_RECENT_STEPS = 5


class StepTimer:
    """Seconds that a transition takes, for each shape of latents.

    Requests to the same engine should share one timer.
    """

    def __init__(self) -> None:
        self._recent: dict[Shape, deque[float]] = {}

    def record(self, shape: Shape, seconds: float) -> None:
        """Record how many seconds a transition took."""
        self._recent.setdefault(shape, deque(maxlen=_RECENT_STEPS)).append(seconds)

    def seconds(self, shape: Shape) -> float | None:
        """Return the seconds to plan with, or None before the first transition of a shape.

        That is the slowest of the last five: a late sample is worse than an idle device.
        """
        recent = self._recent.get(shape)
        return max(recent) if recent else None


@dataclass(frozen=True)
class DeadlineResult:
    """The outcome of a deadline, for one sample or one chunk.

    Attributes:
        steps: transitions from noise to the sample.
        probe_step: whether a further transition was run to measure its time, and discarded.
        seconds: from the start until the sample was complete.
        deadline: seconds that were allowed.
    """

    steps: int
    probe_step: bool
    seconds: float
    deadline: float

    @property
    def slack(self) -> float:
        """Seconds left over; negative where the deadline was missed."""
        return self.deadline - self.seconds


@dataclass(frozen=True)
class Deadline:
    """The `StepPolicy` of a time limit.

    In `stream` it holds for each chunk separately.

    Attributes:
        seconds: for the transitions of the sample (of the chunk); text encoder, cache and VAE are
            not in it.
        shift: of the grid, see `Schedule.uniform`.
        max_steps: upper limit of the steps, however much time there is.
        step_timer: measured times of the engine's transitions.
        should_stop: called before every transition; where it returns True, that transition goes to
            r = 0 and ends the sample. `threading.Event().is_set` is a suitable function.
        on_end: called with the result after each sample or chunk.
        clock: returns seconds; tests replace it.
    """

    seconds: float
    shift: float = 5.0
    max_steps: int = 50
    step_timer: StepTimer = field(default_factory=StepTimer)
    should_stop: Callable[[], bool] = lambda: False
    on_end: Callable[[DeadlineResult], None] = lambda _: None
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise AnyFlowError(
                f"a deadline of {self.seconds} s was given; allowed is any positive number."
            )
        if not 1 <= self.max_steps <= MAX_STEPS:
            raise AnyFlowError(
                f"the maximum number of steps is {self.max_steps}; allowed are 1 to {MAX_STEPS}."
            )

    def run(
        self, start: Callable[[], Run], shape: tuple[int, ...], on_step: Callable[[Step], None]
    ) -> Array:
        """Generate one sample in as many transitions as fit into the time.

        Args:
            start: opens a run at the sample's noise; the clock runs once it is open.
            shape: of the latents, (B, F, C, H, W); times are measured for each shape.
            on_step: called after each transition; an exception it raises ends the sample.

        Returns:
            Clean latents, float32 (B, F, C, H, W).
        """
        with start() as run:
            return DeadlineController(self, shape).finish_sample(run, on_step)

    def for_chunk(self, index: int) -> Deadline:
        """Return this deadline: every chunk of a stream has as much time."""
        return self


class DeadlineController:
    """Decides the steps of one sample under a deadline; its clock starts when it is made.

    Attributes:
        t: timestep of the current state.
        steps_done: transitions so far.
        steps_planned: transitions of the whole sample, as currently planned.
    """

    def __init__(self, deadline: Deadline, shape: Shape) -> None:
        self._deadline = deadline
        self._shape = shape
        self._start_time = deadline.clock()
        self._end = self._start_time + deadline.seconds
        self.t = TRAIN_TIMESTEPS
        self.steps_done = 0
        self.steps_planned = 0

    def finish_sample(self, run: Run, on_step: Callable[[Step], None]) -> Array:
        """Take a run from noise to clean latents, float32 (B, F, C, H, W)."""
        probe_step = None
        if not self.is_calibrated:
            velocity: list[Array] = []
            self.time_step(lambda: velocity.append(run.velocity(TRAIN_TIMESTEPS, 0.0)))
            probe_step = velocity[0]
        while self.t > 0.0:
            t = self.t
            r = self.next_time()
            if probe_step is not None and (self.steps_done, r) == (0, 0.0):
                # The probe step was the same transition
                clean: Array = run.read() - probe_step
                self.finish(1, probe_step=False)
                on_step(Step(0, 1, t, r, clean.copy))
                return clean
            self.time_step(lambda: run.step(t, r))  # noqa: B023 - called at once
            self.advance_to(r)
            on_step(Step(self.steps_done - 1, self.steps_planned, t, r, run.read))
        clean = run.read()
        self.finish(self.steps_done, probe_step is not None)
        return clean

    @property
    def is_calibrated(self) -> bool:
        """Whether a transition of this shape has been timed."""
        return self._deadline.step_timer.seconds(self._shape) is not None

    def time_step(self, transition: Callable[[], None]) -> None:
        """Run a transition and record how long it takes."""
        start_time = self._deadline.clock()
        transition()
        self._deadline.step_timer.record(self._shape, self._deadline.clock() - start_time)

    def next_time(self) -> float:
        """Return the timestep r to go to from `t`: 0 when no two transitions fit any more."""
        step_seconds = self._deadline.step_timer.seconds(self._shape)
        seconds_left = self._end - self._deadline.clock()
        steps_that_fit = (
            self._deadline.max_steps
            if not step_seconds
            else int(min(seconds_left / step_seconds, self._deadline.max_steps))
        )
        count = (
            1
            if self._deadline.should_stop()
            else max(1, min(steps_that_fit, self._deadline.max_steps - self.steps_done))
        )
        self.steps_planned = self.steps_done + count
        return next_timestep(self.t, count, self._deadline.shift)

    def advance_to(self, r: float) -> None:
        """Record that a transition to the timestep `r` has been run."""
        self.t = r
        self.steps_done += 1

    def finish(self, steps: int, probe_step: bool) -> None:
        """Report the finished sample to `Deadline.on_end`."""
        seconds = self._deadline.clock() - self._start_time
        self._deadline.on_end(DeadlineResult(steps, probe_step, seconds, self._deadline.seconds))
