"""One sample on its way through a TensorRT plan, its state on the device. See `engine.Run`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anyflow_deploy.engines.engine import Array, frame_times
from anyflow_deploy.engines.tensorrt.build.optimization_profiles import Shape
from anyflow_deploy.engines.tensorrt.cuda import Buffer
from anyflow_deploy.engines.tensorrt.execution import Lane
from anyflow_deploy.engines.tensorrt.plan import Plan
from anyflow_deploy.errors import AnyFlowError

Inputs = dict[str, tuple[Shape, int]]
"""Shape and device address of each."""


class TensorRTRun:
    """One sample, in two buffers on the device. For one thread at a time.

    Args:
        lane: what it runs in.
        plan: of a graph with inputs `latents`, `t`, `r` and outputs `z_r`, `velocity`.
        latents: the state to start from.
        tensors: every other input, and the address of every other output; asked before each step, since a cache can move.
        closed: called when the run is.
    """

    def __init__(
        self,
        lane: Lane,
        plan: Plan,
        latents: Array,
        tensors: Callable[[], tuple[Inputs, dict[str, int]]],
        closed: Callable[[], None],
    ) -> None:
        self._lane, self._plan, self._shape = lane, plan, latents.shape
        self._tensors, self._closed = tensors, closed
        self._held = [lane.take(latents.nbytes) for _ in range(3)]
        self._times = [lane.take(4 * latents.shape[0] * latents.shape[1]) for _ in range(2)]
        self._state, self._next, self._velocity = self._held
        self._open = True
        upload(lane, self._state, latents)

    def step(self, t: ArrayLike, r: ArrayLike) -> None:
        """See `Run`."""
        self._run(t, r)
        self._state, self._next = self._next, self._state

    def velocity(self, t: ArrayLike, r: ArrayLike) -> Array:
        """See `Run`."""
        self._run(t, r)
        return self._read(self._velocity)

    def read(self) -> Array:
        """See `Run`."""
        self._check_open()
        return self._read(self._state)

    def close(self) -> None:
        """See `Run`."""
        if self._open:
            self._open = False
            self._lane.queue.wait()
            self._lane.give(*self._held, *self._times)
            self._closed()

    def __enter__(self) -> TensorRTRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):  # a run that was dropped, perhaps at the interpreter's end
            self.close()

    def _run(self, t: ArrayLike, r: ArrayLike) -> None:
        """One transition from the state, into the other buffer; it is there when this returns."""
        self._check_open()
        source, target = frame_times(t, r, self._shape)
        queue = self._lane.queue
        for buffer, times in zip(self._times, (source, target), strict=True):
            queue.upload(buffer.address, times)
        inputs, outputs = self._tensors()
        mine: Inputs = {"latents": (self._shape, self._state.address)}
        mine |= {name: (self._shape[:2], buffer.address) for name, buffer in zip(("t", "r"), self._times, strict=True)}
        run_plan(self._lane, self._plan, mine | inputs, outputs | {"z_r": self._next.address, "velocity": self._velocity.address})
        queue.wait()

    def _read(self, buffer: Buffer) -> Array:
        result = np.empty(self._shape, np.float32)
        self._lane.queue.download(buffer.address, result)
        self._lane.queue.wait()
        return result

    def _check_open(self) -> None:
        if not self._open:
            raise AnyFlowError("this run is closed; start another with engine.start(latents, text).")


def run_plan(lane: Lane, plan: Plan, inputs: Inputs, outputs: dict[str, int]) -> None:
    """Put a run on a lane's stream; inputs that the plan lacks are left out."""
    taken = {name: inputs[name] for name in plan.inputs}
    addresses = {name: address for name, (_, address) in taken.items()} | {name: outputs[name] for name in plan.outputs}
    lane.run(plan, {name: shape for name, (shape, _) in taken.items()}, addresses)


def upload(lane: Lane, buffer: Buffer, array: NDArray[Any]) -> None:
    """Copy an array into a buffer; it is there when this returns, and the array may change again."""
    contiguous = np.ascontiguousarray(array)
    lane.queue.upload(buffer.address, contiguous)
    lane.queue.wait()


def uploaded(lane: Lane, array: NDArray[Any]) -> Buffer:
    """A buffer of the lane with an array's contents."""
    buffer = lane.take(array.nbytes)
    upload(lane, buffer, array)
    return buffer
