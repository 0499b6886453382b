"""A run through compiled torch graphs; its state stays on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from anyflow_deploy.engines.engine import Array, frame_times
from anyflow_deploy.errors import AnyFlowError

if TYPE_CHECKING:
    from torch import Tensor


class AotInductorRun:
    """A `Run` whose state is a tensor on the device.

    Args:
        torch: the module.
        call: runs the graph on the state z_t (B, F, C, H, W) and times t, r (B, F); its first two
            outputs are z_r and the velocity.
        latents: the state to start from.
        device: torch's name of it.
    """

    def __init__(
        self,
        torch: Any,
        call: Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]],
        latents: Array,
        device: str,
    ) -> None:
        self._torch = torch
        self._call = call
        self._device = device
        self._shape = latents.shape
        self._state: Tensor | None = torch.from_numpy(latents).to(device, copy=True)

    def step(self, t: ArrayLike, r: ArrayLike) -> None:
        """Replace the state z_t by z_r; timesteps are numbers or (B, F)."""
        self._state = self._outputs(t, r)[0]
        if self._device != "cpu":
            self._torch.cuda.current_stream(self._device).synchronize()

    def velocity(self, t: ArrayLike, r: ArrayLike) -> Array:
        """Return the average velocity u(z_t, t, r), float32 (B, F, C, H, W)."""
        return _to_numpy(self._outputs(t, r)[1])

    def read(self) -> Array:
        """Return a copy of the state, float32 (B, F, C, H, W)."""
        return _to_numpy(self._require_open())

    def close(self) -> None:
        """Release the state."""
        self._state = None

    def __enter__(self) -> AotInductorRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _outputs(self, t: ArrayLike, r: ArrayLike) -> Sequence[Tensor]:
        state = self._require_open()
        times = [
            self._torch.from_numpy(time).to(self._device) for time in frame_times(t, r, self._shape)
        ]
        with disable_tf32(self._torch, self._device):
            return self._call(state, *times)

    def _require_open(self) -> Tensor:
        if self._state is None:
            raise AnyFlowError(
                "this run is closed; start another with engine.start(latents, text)."
            )
        return self._state


@contextlib.contextmanager
def disable_tf32(torch: Any, device: str) -> Any:
    """Select the device, and compute in it without TF32.

    TF32 is on by default in convolutions, and the patch embedding is one.
    """
    if device == "cpu":
        yield
        return
    with torch.cuda.device(device), torch.backends.cudnn.flags(allow_tf32=False):
        yield


def _to_numpy(tensor: Tensor) -> Array:
    """Return an array that owns its memory."""
    return np.array(tensor.cpu().numpy(), dtype=np.float32)
