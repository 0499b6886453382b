"""An engine that notes how long its calls take, around any other.

The sampling loop stays the one and only (`engines/sampler.py`): it is given this engine, and what it calls is timed where it
happens, in the midst of a real clip.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from numpy.typing import ArrayLike

from anyflow_deploy.engines.cache import CachePlan
from anyflow_deploy.engines.engine import Array, Engine, Run, Stream
from anyflow_deploy.models import Architecture
from anyflow_deploy.profiling.measure import clock
from anyflow_deploy.ranges import Ranges

T = TypeVar("T")


class Watched:
    """See `Engine`.

    Args:
        engine: does the work.

    Attributes:
        steps: seconds of every transition since the list was last emptied.
        remembered: the same of every chunk that went into a cache.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.steps: list[float] = []
        self.remembered: list[float] = []

    @property
    def description(self) -> str:
        """See `Engine`."""
        return self._engine.description

    @property
    def architecture(self) -> Architecture:
        """See `Engine`."""
        return self._engine.architecture

    @property
    def ranges(self) -> Ranges:
        """See `Engine`."""
        return self._engine.ranges

    def start(self, latents: ArrayLike, text: ArrayLike) -> Run:
        """See `Engine`."""
        return _WatchedRun(self._engine.start(latents, text), self)

    def open_stream(self, text: ArrayLike, plan: CachePlan) -> Stream:
        """See `Engine`."""
        return _WatchedStream(self._engine.open_stream(text, plan), self)

    def close(self) -> None:
        """See `Engine`."""
        self._engine.close()


class _WatchedRun:
    def __init__(self, run: Run, watch: Watched) -> None:
        self._run, self._watch = run, watch

    def step(self, t: ArrayLike, r: ArrayLike) -> None:
        _timed(lambda: self._run.step(t, r), self._watch.steps)

    def velocity(self, t: ArrayLike, r: ArrayLike) -> Array:
        return _timed(lambda: self._run.velocity(t, r), self._watch.steps)

    def read(self) -> Array:
        return self._run.read()

    def close(self) -> None:
        self._run.close()

    def __enter__(self) -> _WatchedRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _WatchedStream:
    def __init__(self, stream: Stream, watch: Watched) -> None:
        self._stream, self._watch = stream, watch

    def start(self, latents: Array) -> Run:
        return _WatchedRun(self._stream.start(latents), self._watch)

    def remember(self, latents: Array) -> None:
        _timed(lambda: self._stream.remember(latents), self._watch.remembered)

    def extend(self, plan: CachePlan) -> None:
        self._stream.extend(plan)

    def close(self) -> None:
        self._stream.close()


def _timed(work: Callable[[], T], into: list[float]) -> T:
    began = clock()
    result = work()
    into.append(clock() - began)
    return result
