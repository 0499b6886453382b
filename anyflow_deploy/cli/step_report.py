"""What a command shows of the steps: a bar while they are made, and lines for the user at the end.

The first Ctrl-C under a deadline finishes the sample with a single step; the second interrupts.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from anyflow_deploy.engines.adaptive_steps import AdaptiveResult
from anyflow_deploy.engines.deadline import DeadlineResult
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

    Attributes:
        policy: decides the steps.
        deadlines, qualities: results of the samples so far.
        stop_event: set by the first Ctrl-C under a deadline.

    Raises:
        AnyFlowError: a number out of range.
    """

    def __init__(self, settings: StepSettings, default_steps: int, default_shift: float) -> None:
        self.deadlines: list[DeadlineResult] = []
        self.qualities: list[AdaptiveResult] = []
        self.stop_event = threading.Event()
        self._settings = settings
        self._default_steps = default_steps
        self.policy: StepPolicy = settings.make_policy(
            default_steps,
            default_shift,
            should_stop=self.stop_event.is_set,
            on_end=self.add_result,
        )

    def add_result(self, result: DeadlineResult | AdaptiveResult) -> None:
        """Note the result of a sample."""
        if isinstance(result, DeadlineResult):
            self.deadlines.append(result)
        else:
            self.qualities.append(result)

    @property
    def stage(self) -> str:
        """What the sampling is called in the closing line, such as `4 steps`."""
        settings = self._settings
        if settings.deadline_s is not None or settings.target_psnr is not None:
            return "transitions"
        if settings.sigmas is not None:
            return f"{Schedule.from_sigmas(settings.sigmas).steps} steps"
        return f"{settings.num_inference_steps or self._default_steps} steps"

    @contextlib.contextmanager
    def show(self, progress: Progress, samples: int) -> Iterator[StepBar]:
        """Draw a bar while steps are made; Ctrl-C is caught under a deadline.

        Args:
            progress: draws the bar.
            samples: that are made: chunks, or 1 for a whole video.
        """
        catch: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self._settings.deadline_s is not None:
            catch = stop_on_interrupt(self.stop_event)
        total = None if self._settings.target_psnr is not None else 1.0
        with progress.stage("transitions", total) as advance, catch:
            yield StepBar(samples, advance, known=total is not None)

    def summary_lines(self) -> Iterator[str]:
        """Say what became of the deadline or of the quality."""
        if self.deadlines:
            yield _describe_deadlines(self.deadlines)
        most = self._settings.num_inference_steps or MAX_ADAPTIVE_STEPS
        for result in self.qualities:
            yield from _describe_quality(result, self._settings.target_psnr or 0.0, most)


class StepBar:
    """Advances a progress bar with each step.

    Args:
        samples: see `StepReport.show`.
        advance: moves the bar.
        known: how many steps there will be is known.
    """

    def __init__(self, samples: int, advance: Advance, known: bool) -> None:
        self._tracker = ProgressTracker(samples)
        self._advance = advance
        self._known = known
        self._share = 0.0

    def update(self, step: Step) -> None:
        """Note a step."""
        if not self._known:
            self._advance(1)
            return
        share = self._tracker.update(step)
        self._advance(share - self._share)
        self._share = share


def _describe_quality(result: AdaptiveResult, target_psnr: float, max_steps: int) -> Iterator[str]:
    """What was picked, and what it cost."""
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
        yield f"picked {result.steps} steps: {distance}, and {target_psnr:g} dB were asked."
        return
    why = ""
    if difference.not_finite:
        why = " Its latents are not finite: the model or the precision is broken."
    yield (
        f"[yellow]warning:[/] {target_psnr:g} dB were not reached: {distance} with {result.steps} "
        f"steps; --steps allows {max_steps}.{why}"
    )


def _describe_deadlines(results: list[DeadlineResult]) -> str:
    """What became of the deadlines of a video, or of its chunks."""
    deadline = results[0].deadline
    probe_steps = sum(result.probe_step for result in results)
    plural = "s" * (probe_steps > 1)
    probing = f", after {probe_steps} draft{plural} to learn the pace" if probe_steps else ""
    worst = min(result.slack for result in results)
    if len(results) == 1:
        only = results[0]
        end = f"met with {worst:.3f} s to spare" if worst >= 0 else f"missed by {-worst:.3f} s"
        count = f"{only.steps} step{'s' * (only.steps > 1)}{probing}"
        return f"{count}, in {only.seconds:.3f} s: the deadline of {deadline:g} s was {end}."
    counts = ", ".join(str(result.steps) for result in results)
    late = sum(result.slack < 0 for result in results)
    end = f"met by all, with {worst:.3f} s to spare at least"
    if late:
        end = f"missed by {late} of {len(results)}, by {-worst:.3f} s at most"
    return f"steps by chunk {counts}{probing}: the deadline of {deadline:g} s a chunk was {end}."


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
        console.print("finishing with one jump; Ctrl-C again interrupts.")

    before = signal.signal(signal.SIGINT, handle_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
