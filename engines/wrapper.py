"""An engine with something around its work, around any other: a clock (profiles), a turn among many
(Triton).

The sampling loop stays the one and only (`sampler.py`): it is given this engine, and every piece of
work it asks for happens within a context, in the midst of a real clip.
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
from anyflow_deploy.shape_ranges import ShapeRanges

EngineOperation = Literal["open", "step", "append"]
"""A run or stream is opened (the text's keys and values are made), a transition is made, a chunk
enters the cache."""

OperationHook = Callable[[EngineOperation], AbstractContextManager[object]]


class EngineWrapper:
    """See `Engine`.

    Args:
        engine: does the work.
        hook: gives the context for each piece of work.
    """

    def __init__(self, engine: Engine, hook: OperationHook) -> None:
        self._engine, self._hook = engine, hook

    @property
    def description(self) -> str:
        """See `Engine`."""
        return self._engine.description

    @property
    def architecture(self) -> Architecture:
        """See `Engine`."""
        return self._engine.architecture

    @property
    def ranges(self) -> ShapeRanges:
        """See `Engine`."""
        return self._engine.ranges

    def start(self, latents: ArrayLike, text: ArrayLike) -> Run:
        """See `Engine`."""
        with self._hook("open"):
            return _RunWrapper(self._engine.start(latents, text), self._hook)

    def open_stream(self, text: ArrayLike, plan: CachePlan) -> Stream:
        """See `Engine`."""
        with self._hook("open"):
            return _StreamWrapper(self._engine.open_stream(text, plan), self._hook)

    def close(self) -> None:
        """See `Engine`."""
        self._engine.close()


class _RunWrapper:
    def __init__(self, run: Run, hook: OperationHook) -> None:
        self._run, self._hook = run, hook

    def step(self, t: ArrayLike, r: ArrayLike) -> None:
        with self._hook("step"):
            self._run.step(t, r)

    def velocity(self, t: ArrayLike, r: ArrayLike) -> Array:
        with self._hook("step"):
            return self._run.velocity(t, r)

    def read(self) -> Array:
        return self._run.read()

    def close(self) -> None:
        self._run.close()

    def __enter__(self) -> _RunWrapper:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _StreamWrapper:
    def __init__(self, stream: Stream, hook: OperationHook) -> None:
        self._stream, self._hook = stream, hook

    def start(self, latents: Array) -> Run:
        return _RunWrapper(self._stream.start(latents), self._hook)

    def append(self, latents: Array) -> None:
        with self._hook("append"):
            self._stream.append(latents)

    def extend(self, plan: CachePlan) -> None:
        self._stream.extend(plan)

    def close(self) -> None:
        self._stream.close()
