"""A build that shows its progress and can be stopped.

TensorRT calls the monitor from threads of its own and stops at the next step when told so; an
exception must not leave the callback, since there is C++ around it. The build itself runs on a
second thread, so that the first is free to notice Ctrl-C: Python tells only that one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import SupportsInt, TypeVar

from anyflow_deploy.engines.tensorrt.api import trt
from anyflow_deploy.progress import Advance, Progress

T = TypeVar("T")
_MAX_LEVEL = 2
"""Levels of nested phases that are shown; below are thousands of single kernels."""


@dataclass
class _Phase:
    level: int
    stage: AbstractContextManager[Advance] | None
    advance: Advance
    done: int = 0


class BuildProgressMonitor(trt.IProgressMonitor):
    """Shows TensorRT's phases in a `Progress`.

    Args:
        progress: where progress goes.
        title: written before each phase's name.

    Attributes:
        cancelled: set it, and the build stops at its next step.
        error: what the report raised, if it did; the build is stopped then.
    """

    def __init__(self, progress: Progress, title: str) -> None:
        trt.IProgressMonitor.__init__(self)
        self._progress, self._title = progress, title
        self._phases: dict[str, _Phase] = {}
        self._lock = threading.Lock()
        self.cancelled = threading.Event()
        self.error: BaseException | None = None

    def phase_start(self, phase_name: str, parent_phase: str, num_steps: SupportsInt) -> None:
        """Called by TensorRT."""
        self._call_safely(lambda: self._start(phase_name, parent_phase, int(num_steps)))

    def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
        """Called by TensorRT; False stops the build."""
        self._call_safely(lambda: self._step(phase_name, int(step)))
        return not self.cancelled.is_set()

    def phase_finish(self, phase_name: str) -> None:
        """Called by TensorRT, for stopped phases, too."""
        self._call_safely(lambda: self._finish(phase_name))

    def close(self) -> None:
        """End the phases that TensorRT left open."""
        for name in reversed(list(self._phases)):
            self._call_safely(lambda name=name: self._finish(name))  # type: ignore[misc]  # a default binds the loop's name

    def _call_safely(self, action: Callable[[], None]) -> None:
        try:
            with self._lock:
                action()
        except BaseException as error:  # noqa: BLE001 - there is C++ around this; it is raised when the build has ended
            self.error = self.error or error
            self.cancelled.set()

    def _start(self, name: str, parent: str | None, steps: int) -> None:
        above = self._phases.get(parent or "")
        level = above.level + 1 if above else 1
        if level > _MAX_LEVEL:
            self._phases[name] = _Phase(level, None, lambda amount: None)
            return
        stage = self._progress.stage(f"{self._title}: {name}", max(steps, 1))
        self._phases[name] = _Phase(level, stage, stage.__enter__())

    def _step(self, name: str, step: int) -> None:
        phase = self._phases.get(name)
        if phase is not None and step + 1 > phase.done:
            phase.advance(step + 1 - phase.done)
            phase.done = step + 1

    def _finish(self, name: str) -> None:
        phase = self._phases.pop(name, None)
        if phase is not None and phase.stage is not None:
            phase.stage.__exit__(None, None, None)


def run_interruptibly(action: Callable[[], T], cancelled: threading.Event) -> T:
    """Do `work` on another thread; Ctrl-C sets `cancelled` and is raised again once `work` has
    ended."""
    result: list[T] = []
    failure: list[BaseException] = []

    finished = threading.Event()

    def body() -> None:
        try:
            result.append(action())
        except BaseException as error:  # noqa: BLE001 - it is raised again on the caller's thread
            failure.append(error)
        finally:
            finished.set()

    threading.Thread(target=body, name="tensorrt-build", daemon=True).start()
    interrupted = False
    while not finished.is_set():
        try:
            # Thread.join, interrupted, may call a living thread dead (Python up to 3.12)
            while not finished.wait(0.1):
                pass
        except KeyboardInterrupt:
            if interrupted:
                raise  # asked twice: TensorRT is left behind
            interrupted = True
            cancelled.set()
    if interrupted:
        raise KeyboardInterrupt
    if failure:
        raise failure[0]
    return result[0]
