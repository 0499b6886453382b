"""The run of the two engines that consist of PyTorch modules."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from anyflow_deploy.engines.engine import Array, frame_times
from anyflow_deploy.errors import BackendError
from anyflow_deploy.schedule import TRAIN_TIMESTEPS

M = TypeVar("M", bound=nn.Module)


class TorchRun:
    """A `Run` whose state is a torch tensor.

    Args:
        velocity: computes u(z_t, t, r) of the state z_t (B, F, C, H, W) and the times t, r (B, F).
        latents: the state to start from.
        device: torch device.
    """

    def __init__(
        self, velocity: Callable[[Tensor, Tensor, Tensor], Tensor], latents: Array, device: str
    ) -> None:
        self._call = velocity
        self._state = torch.from_numpy(latents).to(device)

    def step(self, t: ArrayLike, r: ArrayLike) -> None:
        """Replace the state z_t by z_r; timesteps are numbers or (B, F)."""
        source, target, velocity = self._velocity(t, r)
        self._state = (
            self._state - ((source - target) / TRAIN_TIMESTEPS)[:, :, None, None, None] * velocity
        )

    def velocity(self, t: ArrayLike, r: ArrayLike) -> Array:
        """Return the average velocity u(z_t, t, r), float32 (B, F, C, H, W)."""
        return np.asarray(self._velocity(t, r)[2].cpu().numpy(), dtype=np.float32)

    def read(self) -> Array:
        """Return a copy of the state, float32 (B, F, C, H, W)."""
        return np.array(self._state.cpu().numpy(), dtype=np.float32)

    def close(self) -> None:
        """Release the state."""
        self._state = torch.empty(0)

    def __enter__(self) -> TorchRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @torch.no_grad()
    def _velocity(self, t: ArrayLike, r: ArrayLike) -> tuple[Tensor, Tensor, Tensor]:
        times = frame_times(t, r, tuple(self._state.shape))
        source, target = (torch.from_numpy(time).to(self._state.device) for time in times)
        # TF32 is on by default for convolutions, and the patch embedding is one.
        with torch.backends.cudnn.flags(allow_tf32=False):
            return source, target, self._call(self._state, source, target)


def move_to_device(model: M, device: str) -> M:
    """Move a model to a device, and set it to inference.

    Raises:
        BackendError: no such device, no CUDA, no memory.
    """
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise BackendError(
            f"torch cannot put the model on device {device!r}: {reason} Try --device cpu."
        ) from None
