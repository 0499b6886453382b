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
from anyflow_deploy.engines.tensorrt.cuda import DeviceBuffer
from anyflow_deploy.engines.tensorrt.execution import ExecutionSlot
from anyflow_deploy.engines.tensorrt.plan import LoadedPlan
from anyflow_deploy.errors import AnyFlowError

Inputs = dict[str, tuple[Shape, int]]
"""Shape and device address of each."""


class TensorRTRun:
    """One sample, in two buffers on the device. For one thread at a time.

    Args:
        slot: what it runs in.
        plan: of a graph with inputs `latents`, `t`, `r` and outputs `z_r`, `velocity`.
        latents: the state to start from.
        tensors: every other input, and the address of every other output; asked before each step,
            since a cache can move.
        on_close: called when the run is.
    """

    def __init__(
        self,
        slot: ExecutionSlot,
        plan: LoadedPlan,
        latents: Array,
        tensors: Callable[[], tuple[Inputs, dict[str, int]]],
        on_close: Callable[[], None],
    ) -> None:
        self._slot = slot
        self._plan = plan
        self._shape = latents.shape
        self._tensors, self._on_close = tensors, on_close
        self._state_buffers = [slot.acquire(latents.nbytes) for _ in range(3)]
        self._time_buffers = [
            slot.acquire(4 * latents.shape[0] * latents.shape[1]) for _ in range(2)
        ]
        self._state, self._next, self._velocity = self._state_buffers
        self._open = True
        upload_into(slot, self._state, latents)

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
            self._slot.stream.synchronize()
            self._slot.release(*self._state_buffers, *self._time_buffers)
            self._on_close()

    def __enter__(self) -> TensorRTRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):  # a run that was dropped, perhaps at the interpreter's end
            self.close()

    def _run(self, t: ArrayLike, r: ArrayLike) -> None:
        """One transition from the state, into the other buffer; it is there when this returns."""
        self._check_open()
        source, target = frame_times(t, r, self._shape)
        stream = self._slot.stream
        for buffer, times in zip(self._time_buffers, (source, target), strict=True):
            stream.upload(buffer.address, times)
        inputs, outputs = self._tensors()
        own_inputs: Inputs = {"latents": (self._shape, self._state.address)}
        own_inputs |= {
            name: (self._shape[:2], buffer.address)
            for name, buffer in zip(("t", "r"), self._time_buffers, strict=True)
        }
        run_plan(
            self._slot,
            self._plan,
            own_inputs | inputs,
            outputs | {"z_r": self._next.address, "velocity": self._velocity.address},
        )
        stream.synchronize()

    def _read(self, buffer: DeviceBuffer) -> Array:
        result = np.empty(self._shape, np.float32)
        self._slot.stream.download(buffer.address, result)
        self._slot.stream.synchronize()
        return result

    def _check_open(self) -> None:
        if not self._open:
            raise AnyFlowError(
                "this run is closed; start another with engine.start(latents, text)."
            )


def run_plan(
    slot: ExecutionSlot, plan: LoadedPlan, inputs: Inputs, outputs: dict[str, int]
) -> None:
    """Put a run on a slot's stream; inputs that the plan lacks are left out."""
    plan_inputs = {name: inputs[name] for name in plan.inputs}
    addresses = {name: address for name, (_, address) in plan_inputs.items()} | {
        name: outputs[name] for name in plan.outputs
    }
    slot.run(plan, {name: shape for name, (shape, _) in plan_inputs.items()}, addresses)


def upload_into(slot: ExecutionSlot, buffer: DeviceBuffer, array: NDArray[Any]) -> None:
    """Copy an array into a buffer; it is there when this returns, and the array may change
    again."""
    contiguous = np.ascontiguousarray(array)
    slot.stream.upload(buffer.address, contiguous)
    slot.stream.synchronize()


def upload_array(slot: ExecutionSlot, array: NDArray[Any]) -> DeviceBuffer:
    """A buffer of the slot with an array's contents."""
    buffer = slot.acquire(array.nbytes)
    upload_into(slot, buffer, array)
    return buffer
