"""What decides how many steps a video gets: a number, a deadline, or a quality; and what to say of it afterwards.

One class for each, with the same few methods; commands and servers know no more of them than `Course`.
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
from anyflow_deploy.engines.adaptive_steps import Pick, Quality, first_chunk_decides
from anyflow_deploy.engines.deadline import Deadline, Outcome, Pace
from anyflow_deploy.engines.sampler import Step
from anyflow_deploy.progress import Advance, console
from anyflow_deploy.schedule import Schedule

MOST_UNDER_A_DEADLINE, MOST_FOR_A_QUALITY = 50, 32
"""Steps, where --steps does not say."""


class Course(Protocol):
    """See the module."""

    @property
    def stage(self) -> str:
        """What the sampling is called in the closing line."""
        ...

    def amount(self, chunks: int) -> float | None:
        """What a progress bar has to reach for so many chunks (1: a whole video); None where nobody knows."""
        ...

    def advanced(self, step: Step, advance: Advance) -> None:
        """Move the bar after a step."""
        ...

    def schedules(self, first: int) -> Callable[[int], sampler.Course]:
        """For `stream`; `first` is the first chunk that is made."""
        ...

    def finishing(self) -> AbstractContextManager[object]:
        """Stands around the sampling."""
        ...

    def report(self) -> Iterator[str]:
        """Lines for the user, when all is done."""
        ...


@dataclass
class Fixed:
    """As many steps as were asked for; `early` has those of the first chunk that is made, where they differ."""

    every: Schedule
    early: Schedule | None = None

    @property
    def stage(self) -> str:
        """See `Course`."""
        return f"{self.every.steps} steps"

    def amount(self, chunks: int) -> float | None:
        """See `Course`."""
        return self.every.steps * chunks + (self.early.steps - self.every.steps if self.early and chunks else 0)

    def advanced(self, step: Step, advance: Advance) -> None:
        """See `Course`."""
        advance(1)

    def schedules(self, first: int) -> Callable[[int], sampler.Course]:
        """See `Course`."""
        return lambda chunk: self.early if self.early is not None and chunk == first else self.every

    def finishing(self) -> AbstractContextManager[object]:
        """See `Course`."""
        return contextlib.nullcontext()

    def report(self) -> Iterator[str]:
        """See `Course`."""
        return iter(())


@dataclass
class InTime:
    """As many steps as fit; the first Ctrl-C says that it is enough.

    Attributes:
        seconds: of each chunk, or of the whole video.
        shift, most: see `Deadline`; `first` is the most for the first chunk that is made.
        outcomes: what came of each chunk so far.
        enough: set it to finish with one jump.
        pace: what is known of the engine; a server shares one.
    """

    seconds: float
    shift: float
    most: int
    first: int | None = None
    stage: str = "transitions"
    outcomes: list[Outcome] = field(default_factory=list)
    enough: threading.Event = field(default_factory=threading.Event)
    pace: Pace = field(default_factory=Pace)
    _way: float = 0.0

    def amount(self, chunks: int) -> float | None:
        """See `Course`: every sample is a way of length 1."""
        return chunks

    def advanced(self, step: Step, advance: Advance) -> None:
        """See `Course`."""
        before = 0.0 if step.index == 0 else self._way
        self._way = max(before, (step.index + 1) / step.steps)  # a plan that grew does not turn the bar back
        advance(self._way - before)

    def schedules(self, first: int) -> Callable[[int], sampler.Course]:
        """See `Course`."""
        return lambda chunk: Deadline(
            self.seconds,
            self.shift,
            most=self.first if self.first is not None and chunk == first else self.most,
            pace=self.pace,
            enough=self.enough.is_set,
            on_end=self.outcomes.append,
        )

    def finishing(self) -> AbstractContextManager[object]:
        """See `Course`."""
        return enough_on_interrupt(self.enough)

    def report(self) -> Iterator[str]:
        """See `Course`."""
        if self.outcomes:
            yield _in_words(self.outcomes)


@dataclass
class ToQuality:
    """As many steps as it takes."""

    quality: Quality
    stage: str = "transitions"
    _picks: list[Pick] = field(default_factory=list)

    def amount(self, chunks: int) -> float | None:
        """See `Course`."""
        return None

    def advanced(self, step: Step, advance: Advance) -> None:
        """See `Course`."""
        advance(1)

    def schedules(self, first: int) -> Callable[[int], sampler.Course]:
        """See `Course`."""
        asked = self.quality
        return first_chunk_decides(Quality(asked.psnr_db, asked.shift, asked.most, self._picks.append))

    def finishing(self) -> AbstractContextManager[object]:
        """See `Course`."""
        return contextlib.nullcontext()

    def report(self) -> Iterator[str]:
        """See `Course`."""
        for pick in self._picks:
            tries = ", ".join(f"{steps} steps {found.psnr_db:.1f} dB" for steps, found in pick.tries)
            found, more = pick.difference, pick.transitions - pick.steps
            yield f"against half as many steps: {tries}; {more} transitions more than a video of {pick.steps} steps needs."
            distance = f"{found.psnr_db:.1f} dB (relative L2 {found.relative_l2:.2g})"
            if pick.reached:
                yield f"picked {pick.steps} steps: {distance}, and {self.quality.psnr_db:g} dB were asked."
            else:
                why = "" if found.not_finite == 0 else " Its latents are not finite: the model or the precision is broken."
                limit = f"{pick.steps} steps; --steps allows {self.quality.most}"
                yield f"[yellow]warning:[/] {self.quality.psnr_db:g} dB were not reached: {distance} with {limit}.{why}"


def _in_words(outcomes: list[Outcome]) -> str:
    """What came of the deadlines of a video, or of its chunks."""
    deadline, drafts = outcomes[0].deadline, sum(outcome.draft for outcome in outcomes)
    learning = f", after {drafts} draft{'s' * (drafts > 1)} to learn the pace" if drafts else ""
    worst = min(outcome.spare for outcome in outcomes)
    if len(outcomes) == 1:
        made, end = outcomes[0], f"met with {worst:.3f} s to spare" if worst >= 0 else f"missed by {-worst:.3f} s"
        count = f"{made.steps} step{'s' * (made.steps > 1)}{learning}"
        return f"{count}, in {made.seconds:.3f} s: the deadline of {deadline:g} s was {end}."
    counts, late = ", ".join(str(outcome.steps) for outcome in outcomes), sum(outcome.spare < 0 for outcome in outcomes)
    end = (
        f"missed by {late} of {len(outcomes)}, by {-worst:.3f} s at most" if late else f"met by all, with {worst:.3f} s to spare"
    )
    return f"steps by chunk {counts}{learning}: the deadline of {deadline:g} s a chunk was {end}{' at least' * (not late)}."


@contextlib.contextmanager
def enough_on_interrupt(enough: threading.Event) -> Iterator[None]:
    """Within it the first Ctrl-C sets `enough`, and the second one interrupts. (In a thread, which gets none: nothing.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        if enough.is_set():
            raise KeyboardInterrupt
        enough.set()
        console.print("finishing with one jump; Ctrl-C again interrupts.")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
