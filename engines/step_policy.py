"""What decides how many steps a video gets: a number, a deadline, or a quality; and what to say of it afterwards.

One class for each, with the same few methods; commands and servers know no more of them than `StepPolicy`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from anyflow_deploy.engines import sampler
from anyflow_deploy.engines.adaptive_steps import AdaptiveResult, AdaptiveSteps, reuse_first_chunk_steps
from anyflow_deploy.engines.deadline import Deadline, DeadlineResult, StepTimer
from anyflow_deploy.engines.sampler import Step
from anyflow_deploy.progress import Advance, console
from anyflow_deploy.schedule import Schedule

MAX_DEADLINE_STEPS, MAX_ADAPTIVE_STEPS = 50, 32
"""Steps, where --steps does not say."""


class StepPolicy(Protocol):
    """See the module."""

    @property
    def stage(self) -> str:
        """What the sampling is called in the closing line."""
        ...

    def progress_total(self, chunks: int) -> float | None:
        """What a progress bar has to reach for so many chunks (1: a whole video); None where nobody knows."""
        ...

    def update_progress(self, step: Step, advance: Advance) -> None:
        """Move the bar after a step."""
        ...

    def chunk_schedules(self, first: int) -> Callable[[int], sampler.AnySchedule]:
        """For `stream`; `first` is the first chunk that is made."""
        ...

    def interrupt_handler(self) -> AbstractContextManager[object]:
        """Stands around the sampling."""
        ...

    def summary_lines(self) -> Iterator[str]:
        """Lines for the user, when all is done."""
        ...


@dataclass
class FixedSteps:
    """As many steps as were asked for; `early` has those of the first chunk that is made, where they differ."""

    schedule: Schedule
    first_chunk_schedule: Schedule | None = None

    @property
    def stage(self) -> str:
        """See `StepPolicy`."""
        return f"{self.schedule.steps} steps"

    def progress_total(self, chunks: int) -> float | None:
        """See `StepPolicy`."""
        return self.schedule.steps * chunks + (
            self.first_chunk_schedule.steps - self.schedule.steps if self.first_chunk_schedule and chunks else 0
        )

    def update_progress(self, step: Step, advance: Advance) -> None:
        """See `StepPolicy`."""
        advance(1)

    def chunk_schedules(self, first: int) -> Callable[[int], sampler.AnySchedule]:
        """See `StepPolicy`."""
        return lambda chunk: (
            self.first_chunk_schedule if self.first_chunk_schedule is not None and chunk == first else self.schedule
        )

    def interrupt_handler(self) -> AbstractContextManager[object]:
        """See `StepPolicy`."""
        return contextlib.nullcontext()

    def summary_lines(self) -> Iterator[str]:
        """See `StepPolicy`."""
        return iter(())


@dataclass
class DeadlineSteps:
    """As many steps as fit; the first Ctrl-C says that it is enough.

    Attributes:
        seconds: of each chunk, or of the whole video.
        shift, max_steps: see `Deadline`; `first_chunk_max_steps` is the same for the first chunk that is made.
        results: what came of each chunk so far.
        stop_event: set it to finish with one jump.
        step_timer: what is known of the engine; a server shares one.
    """

    seconds: float
    shift: float
    max_steps: int
    first_chunk_max_steps: int | None = None
    stage: str = "transitions"
    results: list[DeadlineResult] = field(default_factory=list)
    stop_event: threading.Event = field(default_factory=threading.Event)
    step_timer: StepTimer = field(default_factory=StepTimer)
    _progress: float = 0.0

    def progress_total(self, chunks: int) -> float | None:
        """See `StepPolicy`: every sample is a way of length 1."""
        return chunks

    def update_progress(self, step: Step, advance: Advance) -> None:
        """See `StepPolicy`."""
        before = 0.0 if step.index == 0 else self._progress
        self._progress = max(before, (step.index + 1) / step.steps)  # a plan that grew does not turn the bar back
        advance(self._progress - before)

    def chunk_schedules(self, first: int) -> Callable[[int], sampler.AnySchedule]:
        """See `StepPolicy`."""
        return lambda chunk: Deadline(
            self.seconds,
            self.shift,
            max_steps=self.first_chunk_max_steps if self.first_chunk_max_steps is not None and chunk == first else self.max_steps,
            step_timer=self.step_timer,
            should_stop=self.stop_event.is_set,
            on_end=self.results.append,
        )

    def interrupt_handler(self) -> AbstractContextManager[object]:
        """See `StepPolicy`."""
        return stop_on_interrupt(self.stop_event)

    def summary_lines(self) -> Iterator[str]:
        """See `StepPolicy`."""
        if self.results:
            yield _describe_deadlines(self.results)


@dataclass
class AdaptiveStepsPolicy:
    """As many steps as it takes."""

    adaptive_steps: AdaptiveSteps
    stage: str = "transitions"
    _results: list[AdaptiveResult] = field(default_factory=list)

    def progress_total(self, chunks: int) -> float | None:
        """See `StepPolicy`."""
        return None

    def update_progress(self, step: Step, advance: Advance) -> None:
        """See `StepPolicy`."""
        advance(1)

    def chunk_schedules(self, first: int) -> Callable[[int], sampler.AnySchedule]:
        """See `StepPolicy`."""
        target = self.adaptive_steps
        return reuse_first_chunk_steps(AdaptiveSteps(target.psnr_db, target.shift, target.max_steps, self._results.append))

    def interrupt_handler(self) -> AbstractContextManager[object]:
        """See `StepPolicy`."""
        return contextlib.nullcontext()

    def summary_lines(self) -> Iterator[str]:
        """See `StepPolicy`."""
        for result in self._results:
            candidates = ", ".join(f"{steps} steps {difference.psnr_db:.1f} dB" for steps, difference in result.candidates)
            difference, extra = result.difference, result.transitions - result.steps
            yield (
                f"against half as many steps: {candidates}; {extra} transitions more than a video of {result.steps} steps needs."
            )
            distance = f"{difference.psnr_db:.1f} dB (relative L2 {difference.relative_l2:.2g})"
            if result.reached:
                yield f"picked {result.steps} steps: {distance}, and {self.adaptive_steps.psnr_db:g} dB were asked."
            else:
                why = "" if difference.not_finite == 0 else " Its latents are not finite: the model or the precision is broken."
                limit = f"{result.steps} steps; --steps allows {self.adaptive_steps.max_steps}"
                yield f"[yellow]warning:[/] {self.adaptive_steps.psnr_db:g} dB were not reached: {distance} with {limit}.{why}"


def _describe_deadlines(results: list[DeadlineResult]) -> str:
    """What came of the deadlines of a video, or of its chunks."""
    deadline, probe_steps = results[0].deadline, sum(result.probe_step for result in results)
    probing = f", after {probe_steps} draft{'s' * (probe_steps > 1)} to learn the pace" if probe_steps else ""
    worst = min(result.slack for result in results)
    if len(results) == 1:
        only, end = results[0], f"met with {worst:.3f} s to spare" if worst >= 0 else f"missed by {-worst:.3f} s"
        count = f"{only.steps} step{'s' * (only.steps > 1)}{probing}"
        return f"{count}, in {only.seconds:.3f} s: the deadline of {deadline:g} s was {end}."
    counts, late = ", ".join(str(result.steps) for result in results), sum(result.slack < 0 for result in results)
    end = f"missed by {late} of {len(results)}, by {-worst:.3f} s at most" if late else f"met by all, with {worst:.3f} s to spare"
    return f"steps by chunk {counts}{probing}: the deadline of {deadline:g} s a chunk was {end}{' at least' * (not late)}."


@contextlib.contextmanager
def stop_on_interrupt(stop_event: threading.Event) -> Iterator[None]:
    """Within it the first Ctrl-C sets `enough`, and the second one interrupts. (In a thread, which gets none: nothing.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle_signal(number: int, frame: object) -> None:
        if stop_event.is_set():
            raise KeyboardInterrupt
        stop_event.set()
        console.print("finishing with one jump; Ctrl-C again interrupts.")

    before = signal.signal(signal.SIGINT, handle_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
