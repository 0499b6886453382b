"""A run in ONNX Runtime; its state lies in two buffers on the provider's device."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from anyflow_deploy.engines.engine import Array, frame_times
from anyflow_deploy.engines.onnxruntime.device import OrtDevice
from anyflow_deploy.errors import AnyFlowError


class OnnxRuntimeRun:
    """A `Run` whose state lies in two buffers on the provider's device.

    Args:
        device: of the buffers.
        session: of a graph with inputs `latents`, `t`, `r` and outputs `z_r`, `velocity`.
        latents: the state to start from.
        inputs: further inputs, by name, that stay the same for the whole run.
        bind: adds inputs that are parts of a buffer to each binding.
    """

    def __init__(
        self,
        device: OrtDevice,
        session: Any,
        latents: Array,
        inputs: dict[str, Any],
        bind: Callable[[Any], None] | None = None,
    ) -> None:
        self._device = device
        self._session = session
        self._shape = latents.shape
        self._state = device.upload(latents)
        self._next = device.upload(np.empty_like(latents))
        self._inputs = inputs
        self._bind = bind

    def step(self, t: ArrayLike, r: ArrayLike) -> None:
        """Replace the state z_t by z_r; timesteps are numbers or (B, F)."""
        self._run(t, r, "z_r", self._next)
        self._state, self._next = self._next, self._state

    def velocity(self, t: ArrayLike, r: ArrayLike) -> Array:
        """Return the average velocity u(z_t, t, r), float32 (B, F, C, H, W)."""
        self._run(t, r, "velocity", self._next)
        return _to_numpy(self._next)

    def read(self) -> Array:
        """Return a copy of the state, float32 (B, F, C, H, W)."""
        self._check_open()
        return _to_numpy(self._state)

    def close(self) -> None:
        """Release the run's buffers."""
        self._state = self._next = self._bind = None
        self._inputs = {}

    def __enter__(self) -> OnnxRuntimeRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, t: ArrayLike, r: ArrayLike, output: str, buffer: Any) -> None:
        self._check_open()
        source, target = frame_times(t, r, self._shape)
        times = {"t": self._device.upload(source), "r": self._device.upload(target)}
        binding = self._session.io_binding()
        for name, value in {"latents": self._state, **times, **self._inputs}.items():
            binding.bind_ortvalue_input(name, value)
        if self._bind is not None:
            self._bind(binding)
        binding.bind_ortvalue_output(output, buffer)
        self._session.run_with_iobinding(binding)

    def _check_open(self) -> None:
        if self._state is None:
            raise AnyFlowError(
                "this run is closed; start another with engine.start(latents, text)."
            )


def _to_numpy(value: Any) -> Array:
    """Return an array that owns its memory: on the CPU, `numpy()` is a view of the buffer."""
    return np.array(value.numpy(), dtype=np.float32)
