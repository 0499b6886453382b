"""An engine that runs each of its operations inside a context of the caller's.

The profiler gives a clock as the context, and the Triton server a lock that requests take in turn.
The sampling loop (`sampler.py`) is the usual one: it is given the wrapper in place of the engine,
so what is measured or locked is the work of a real video.
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
"""`open` opens a run or stream and computes the text's keys and values, `step` runs a transition,
and `append` encodes a chunk into the cache."""

OperationHook = Callable[[EngineOperation], AbstractContextManager[object]]


class EngineWrapper:
    """An `Engine` that passes every call on to another engine, inside a context.

    Args:
        engine: runs the operations.
        hook: returns the context for each operation.
    """

    def __init__(self, engine: Engine, hook: OperationHook) -> None:
        self._engine = engine
        self._hook = hook

    @property
    def description(self) -> str:
        """Backend, version, device and precision, for people and reports."""
        return self._engine.description

    @property
    def architecture(self) -> Architecture:
        """The network it runs."""
        return self._engine.architecture

    @property
    def ranges(self) -> ShapeRanges:
        """The shapes it accepts."""
        return self._engine.ranges

    def start(self, latents: ArrayLike, text: ArrayLike) -> Run:
        """Open a run at latents (B, F, C, H, W) for text (B, L, D), inside the context `open`."""
        with self._hook("open"):
            return _RunWrapper(self._engine.start(latents, text), self._hook)

    def open_stream(self, text: ArrayLike, plan: CachePlan) -> Stream:
        """Open a stream for text (1, L, D), inside the context `open`."""
        with self._hook("open"):
            return _StreamWrapper(self._engine.open_stream(text, plan), self._hook)

    def close(self) -> None:
        """Release the engine."""
        self._engine.close()


class _RunWrapper:
    def __init__(self, run: Run, hook: OperationHook) -> None:
        self._run = run
        self._hook = hook

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
        self._stream = stream
        self._hook = hook

    def start(self, latents: Array) -> Run:
        return _RunWrapper(self._stream.start(latents), self._hook)

    def append(self, latents: Array) -> None:
        with self._hook("append"):
            self._stream.append(latents)

    def extend(self, plan: CachePlan) -> None:
        self._stream.extend(plan)

    def close(self) -> None:
        self._stream.close()
