"""An engine with something around its work, around any other: a clock (profiles), a turn among many (Triton).

The sampling loop stays the one and only (`sampler.py`): it is given this engine, and every piece of work it asks for happens
within a context, in the midst of a real clip.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Literal

from numpy.typing import ArrayLike

from anyflow_deploy.engines.engine import Array, Engine, Run, Stream
from anyflow_deploy.engines.kv_cache import CachePlan
from anyflow_deploy.models import Architecture
from anyflow_deploy.shape_ranges import Ranges

Work = Literal["open", "step", "remember"]
"""A run or stream is opened (the text's keys and values are made), a transition is made, a chunk enters the cache."""

Around = Callable[[Work], AbstractContextManager[object]]


class EngineAround:
    """See `Engine`.

    Args:
        engine: does the work.
        around: gives the context for each piece of work.
    """

    def __init__(self, engine: Engine, around: Around) -> None:
        self._engine, self._around = engine, around

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
        with self._around("open"):
            return _RunAround(self._engine.start(latents, text), self._around)

    def open_stream(self, text: ArrayLike, plan: CachePlan) -> Stream:
        """See `Engine`."""
        with self._around("open"):
            return _StreamAround(self._engine.open_stream(text, plan), self._around)

    def close(self) -> None:
        """See `Engine`."""
        self._engine.close()


class _RunAround:
    def __init__(self, run: Run, around: Around) -> None:
        self._run, self._around = run, around

    def step(self, t: ArrayLike, r: ArrayLike) -> None:
        with self._around("step"):
            self._run.step(t, r)

    def velocity(self, t: ArrayLike, r: ArrayLike) -> Array:
        with self._around("step"):
            return self._run.velocity(t, r)

    def read(self) -> Array:
        return self._run.read()

    def close(self) -> None:
        self._run.close()

    def __enter__(self) -> _RunAround:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _StreamAround:
    def __init__(self, stream: Stream, around: Around) -> None:
        self._stream, self._around = stream, around

    def start(self, latents: Array) -> Run:
        return _RunAround(self._stream.start(latents), self._around)

    def remember(self, latents: Array) -> None:
        with self._around("remember"):
            self._stream.remember(latents)

    def extend(self, plan: CachePlan) -> None:
        self._stream.extend(plan)

    def close(self) -> None:
        self._stream.close()
