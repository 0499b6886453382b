"""PyTorch as the reference: a checkpoint in diffusers' own class, float32, behind the same `Engine` protocol.

Validation compares an engine with this. It is diffusers' code and not ours, so a mistake in our module shows. (That is
right for bidirectional models only: diffusers' causal class pads attention without a mask and is wrong by percents.)
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from anyflow_deploy.engines.engine import Array, checked_inputs, frame_times
from anyflow_deploy.errors import AnyFlowError, BackendError
from anyflow_deploy.export.checkpoint import open_checkpoint, transformer_folder
from anyflow_deploy.export.hub import TRANSFORMER_FILES, download
from anyflow_deploy.export.random_weights import RandomWeights
from anyflow_deploy.export.weights import Weights
from anyflow_deploy.manifest import Manifest
from anyflow_deploy.ranges import Ranges, widest
from anyflow_deploy.schedule import TRAIN_TIMESTEPS


class TorchEngine:
    """diffusers' transformer as an engine.

    Args:
        weights: a checkpoint, or random weights.
        device: torch device; "cuda" makes large models bearable.
    """

    def __init__(self, weights: Weights, device: str = "cpu") -> None:
        from accelerate import init_empty_weights
        from diffusers import AnyFlowTransformer3DModel

        architecture = weights.architecture
        if architecture.causal:
            raise AnyFlowError("diffusers' causal class is not a safe reference; this version validates bidirectional models.")
        self._architecture = architecture
        self._device = device
        config = {k: v for k, v in architecture.as_config().items() if not k.startswith("_")}
        with init_empty_weights(include_buffers=False):  # random weights that nobody wants would double time and memory
            model = AnyFlowTransformer3DModel(**config)
        model.load_state_dict({name: weights.read(name).float() for name in weights.shapes()}, assign=True)
        try:
            self._model = model.to(device).eval()
        except (RuntimeError, AssertionError) as error:  # torch's words for no such device, no CUDA, no memory
            reason = str(error).split("\n")[0]
            raise BackendError(f"torch cannot put the reference on device {device!r}: {reason} Try --device cpu.") from None

    @property
    def description(self) -> str:
        """See `Engine`."""
        return f"PyTorch {torch.__version__.split('+')[0]} (diffusers), {self._device}, float32"

    @property
    def ranges(self) -> Ranges:
        """See `Engine`."""
        return widest(self._architecture)

    def start(self, latents: ArrayLike, text: ArrayLike) -> TorchRun:
        """See `Engine`."""
        a = self._architecture
        z, words = checked_inputs(self.ranges, a.in_channels, a.text_dim, latents, text)
        return TorchRun(self._model, self._device, z, words)

    def close(self) -> None:
        """See `Engine`."""
        self._model = None


class TorchRun:
    """One sample on its way, see `Run`."""

    def __init__(self, model: Any, device: str, latents: Array, text: Array) -> None:
        self._model = model
        self._state = torch.from_numpy(latents).to(device)
        self._text = torch.from_numpy(text).to(device)

    def step(self, t: ArrayLike, r: ArrayLike) -> None:
        """See `Run`."""
        source, target, velocity = self._velocity(t, r)
        self._state = self._state - ((source - target) / TRAIN_TIMESTEPS)[:, :, None, None, None] * velocity

    def velocity(self, t: ArrayLike, r: ArrayLike) -> Array:
        """See `Run`."""
        return np.asarray(self._velocity(t, r)[2].cpu().numpy(), dtype=np.float32)

    def read(self) -> Array:
        """See `Run`."""
        return np.array(self._state.cpu().numpy(), dtype=np.float32)

    def close(self) -> None:
        """See `Run`."""
        self._state = self._text = torch.empty(0)

    def __enter__(self) -> TorchRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @torch.no_grad()
    def _velocity(self, t: ArrayLike, r: ArrayLike) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        times = frame_times(t, r, tuple(self._state.shape))
        source, target = (torch.from_numpy(time).to(self._state.device) for time in times)
        with torch.backends.cudnn.flags(allow_tf32=False):  # on by default, and the patch embedding is a convolution
            return source, target, self._model(self._state, source, target, self._text, return_dict=False)[0]


def weights_from_manifest(manifest: Manifest, checkpoint: str | None = None) -> Weights:
    """The weights a bundle was exported from.

    Args:
        manifest: of the bundle.
        checkpoint: where they are now, when that is not where the manifest says.

    Raises:
        CheckpointError: they are not there any more.
        AnyFlowError: they are of another architecture.
    """
    source = manifest.source
    if checkpoint is None and source.kind == "random":
        return RandomWeights(manifest.architecture, source.location, source.seed or 0)
    if checkpoint is None and source.kind == "hub":
        advice = "Give --checkpoint DIR, the checkpoint it was exported from."
        checkpoint = str(transformer_folder(download(source.location, source.revision, TRANSFORMER_FILES, advice)))
    weights = open_checkpoint(checkpoint or source.location)
    if weights.architecture != manifest.architecture:
        raise AnyFlowError(
            f"{weights.folder} is another model than the bundle was exported from. Give --checkpoint its checkpoint."
        )
    return weights
