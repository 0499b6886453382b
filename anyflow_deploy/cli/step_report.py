"""What a command shows of the steps: a bar while they run, and lines at the end.

The first Ctrl-C under a deadline finishes the sample with a single step; the second interrupts.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from anyflow_deploy.engines.adaptive_steps import AdaptiveResult
from anyflow_deploy.engines.deadline import DeadlineResult, StepTimer
from anyflow_deploy.engines.step_policy import (
    MAX_ADAPTIVE_STEPS,
    ProgressTracker,
    StepPolicy,
    StepSettings,
)
from anyflow_deploy.progress import Advance, Progress, console
from anyflow_deploy.schedule import Schedule, Step


class StepReport:
    """Follows the steps of one video for the command line.

    Args:
        settings: what the user asked for.
        default_steps, default_shift: of the bundle.
        step_timer: measured times of the engine, where several videos share them.

    Attributes:
        policy: decides the steps.
        deadlines, qualities: results of the samples so far.
        stop_event: set by the first Ctrl-C under a deadline.

    Raises:
        AnyFlowError: a number out of range.
    """

    def __init__(
        self,
        settings: StepSettings,
        default_steps: int,
        default_shift: float,
        step_timer: StepTimer | None = None,
    ) -> None:
        self.deadlines: list[DeadlineResult] = []
        self.qualities: list[AdaptiveResult] = []
        self.stop_event = threading.Event()
        self._settings = settings
        self._default_steps = default_steps
        self.policy: StepPolicy = settings.make_policy(
            default_steps,
            default_shift,
            step_timer,
            should_stop=self.stop_event.is_set,
            on_end=self.add_result,
        )

    def add_result(self, result: DeadlineResult | AdaptiveResult) -> None:
        """Add the result of a sample."""
        if isinstance(result, DeadlineResult):
            self.deadlines.append(result)
        else:
            self.qualities.append(result)

    @property
    def stage(self) -> str:
        """Name of the sampling in the closing line, such as `4 steps`."""
        settings = self._settings
        if settings.deadline_s is not None or settings.target_psnr is not None:
            return "transitions"
        if settings.sigmas is not None:
            return f"{Schedule.from_sigmas(settings.sigmas).steps} steps"
        return f"{settings.num_inference_steps or self._default_steps} steps"

    @contextlib.contextmanager
    def show(
        self, progress: Progress, samples: int, name: str = "transitions"
    ) -> Iterator[StepBar]:
        """Draw a bar while steps run; under a deadline, catch Ctrl-C.

        Args:
            progress: draws the bar.
            samples: number of chunks, or 1 for a whole video.
            name: of the bar.
        """
        interrupt_handler: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self._settings.deadline_s is not None:
            interrupt_handler = stop_on_interrupt(self.stop_event)
        total = None if self._settings.target_psnr is not None else 1.0
        with progress.stage(name, total) as advance, interrupt_handler:
            yield StepBar(samples, advance, is_total_known=total is not None)

    def summary_lines(self) -> Iterator[str]:
        """Yield lines that say how the deadline or the target quality was met."""
        if self.deadlines:
            yield _describe_deadlines(self.deadlines)
        max_steps = self._settings.num_inference_steps or MAX_ADAPTIVE_STEPS
        for result in self.qualities:
            yield from _describe_quality(result, self._settings.target_psnr or 0.0, max_steps)


class StepBar:
    """Advances a progress bar with each step.

    Args:
        samples: number of chunks, or 1 for a whole video.
        advance: moves the bar.
        is_total_known: whether the number of steps is known beforehand.
    """

    def __init__(self, samples: int, advance: Advance, is_total_known: bool) -> None:
        self._tracker = ProgressTracker(samples)
        self._advance = advance
        self._is_total_known = is_total_known
        self._share = 0.0

    def update(self, step: Step) -> None:
        """Advance the bar by one step."""
        if not self._is_total_known:
            self._advance(1)
            return
        share = self._tracker.update(step)
        self._advance(share - self._share)
        self._share = share


def _describe_quality(result: AdaptiveResult, target_psnr: float, max_steps: int) -> Iterator[str]:
    """Describe which number of steps was picked, and what it cost."""
    candidates = ", ".join(
        f"{steps} steps {difference.psnr_db:.1f} dB" for steps, difference in result.candidates
    )
    difference = result.difference
    extra = result.transitions - result.steps
    yield (
        f"against half as many steps: {candidates}; {extra} transitions more than a video of"
        f" {result.steps} steps needs."
    )
    distance = f"{difference.psnr_db:.1f} dB (relative L2 {difference.relative_l2:.2g})"
    if result.reached:
        yield f"picked {result.steps} steps: {distance}, and the target is {target_psnr:g} dB."
        return
    why = ""
    if difference.not_finite:
        why = " Its latents are not finite: the model or the precision is broken."
    yield (
        f"[yellow]warning:[/] {target_psnr:g} dB were not reached: {distance} with {result.steps} "
        f"steps; --steps allows {max_steps}.{why}"
    )


def _describe_deadlines(results: list[DeadlineResult]) -> str:
    """Describe how the deadlines of a video, or of its chunks, were met."""
    deadline = results[0].deadline
    probe_steps = sum(result.probe_step for result in results)
    plural = "s" * (probe_steps > 1)
    timing = f", after {probe_steps} probe step{plural} to measure the speed" if probe_steps else ""
    worst = min(result.slack for result in results)
    if len(results) == 1:
        only = results[0]
        end = f"met with {worst:.3f} s to spare" if worst >= 0 else f"missed by {-worst:.3f} s"
        count = f"{only.steps} step{'s' * (only.steps > 1)}{timing}"
        return f"{count}, in {only.seconds:.3f} s: the deadline of {deadline:g} s was {end}."
    counts = ", ".join(str(result.steps) for result in results)
    late_count = sum(result.slack < 0 for result in results)
    end = f"met by all, with {worst:.3f} s to spare at least"
    if late_count:
        end = f"missed by {late_count} of {len(results)}, by {-worst:.3f} s at most"
    return f"steps by chunk {counts}{timing}: the deadline of {deadline:g} s a chunk was {end}."


@contextlib.contextmanager
def stop_on_interrupt(stop_event: threading.Event) -> Iterator[None]:
    """Let the first Ctrl-C set `stop_event`, and the second one interrupt.

    In a thread other than the main one, which gets no signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle_signal(number: int, frame: object) -> None:
        if stop_event.is_set():
            raise KeyboardInterrupt
        stop_event.set()
        console.print("finishing with a single step; press Ctrl-C again to interrupt.")

    old_handler = signal.signal(signal.SIGINT, handle_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old_handler)
