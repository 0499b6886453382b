"""The reference engine for bidirectional models: diffusers' own class, in float32.

Validation compares an engine with this one. It is diffusers' code and not ours, so a mistake in our
module shows. Causal models have another reference: diffusers' causal class pads attention without a
mask, and its results are wrong by percents.
"""

from __future__ import annotations

from pathlib import Path

import torch
from numpy.typing import ArrayLike

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.checkpoints.hub import fetch_checkpoint
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.checkpoints.weights import Weights
from anyflow_deploy.engines.engine import Stream, prepare_inputs
from anyflow_deploy.engines.kv_cache import CachePlan
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.export.torch_run import TorchRun, move_to_device
from anyflow_deploy.hub import parse_hub_id
from anyflow_deploy.shape_ranges import ShapeRanges, widest_ranges


class DiffusersEngine:
    """An `Engine` that runs diffusers' transformer, float32.

    Args:
        weights: a checkpoint, or random weights.
        device: torch device; large models need "cuda".

    Raises:
        AnyFlowError: a causal model.
        BackendError: torch cannot use the device.
    """

    def __init__(self, weights: Weights, device: str = "cpu") -> None:
        from accelerate import init_empty_weights
        from diffusers import AnyFlowTransformer3DModel

        architecture = weights.architecture
        if architecture.causal:
            raise AnyFlowError(
                "diffusers' causal class is no reference: it attends to padding. Use TorchEngine."
            )
        self.architecture = architecture
        self._device = device
        config = {k: v for k, v in architecture.as_config().items() if not k.startswith("_")}
        # Otherwise diffusers would fill the model with random weights first
        with init_empty_weights(include_buffers=False):
            model = AnyFlowTransformer3DModel(**config)
        model.load_state_dict(
            {name: weights.read(name).float() for name in weights.shapes()}, assign=True
        )
        self._model = move_to_device(model, device)

    @property
    def description(self) -> str:
        """torch's version and the device, for people and reports."""
        return f"PyTorch {torch.__version__.split('+')[0]} (diffusers), {self._device}, float32"

    @property
    def ranges(self) -> ShapeRanges:
        """The shapes it accepts: all that the network allows."""
        return widest_ranges(self.architecture)

    def start(self, latents: ArrayLike, text: ArrayLike) -> TorchRun:
        """Open a run at latents (B, F, C, H, W) for text (B, L, D)."""
        a = self.architecture
        z, prompt_embeds = prepare_inputs(self.ranges, a.in_channels, a.text_dim, latents, text)
        model = self._model
        prompt_tensor = torch.from_numpy(prompt_embeds).to(self._device)
        return TorchRun(
            lambda state, t, r: model(state, t, r, prompt_tensor, return_dict=False)[0],
            z,
            self._device,
        )

    def open_stream(self, text: ArrayLike, plan: CachePlan) -> Stream:
        """Raise AnyFlowError: a bidirectional model has no streams."""
        raise AnyFlowError("this is a bidirectional model: use sample(), not stream().")

    def close(self) -> None:
        """Release the model."""
        self._model = None


def weights_from_manifest(manifest: Manifest, checkpoint: str | None = None) -> Weights:
    """Open the weights that a bundle was exported from.

    Args:
        manifest: of the bundle.
        checkpoint: their folder, file or Hub id, where that is not what the manifest names.

    Raises:
        CheckpointError: the weights are not there any more.
        AnyFlowError: the weights are of another architecture.
    """
    source = manifest.source
    if checkpoint is None and source.kind == "random":
        return RandomWeights(manifest.architecture, source.location, source.seed or 0)
    path = Path(source.location) if checkpoint is None else Path(checkpoint)
    hub_id = None if checkpoint is None else parse_hub_id(checkpoint)
    if checkpoint is None and source.kind == "hub":
        hub_id = source.location, source.revision
    if hub_id is not None:
        path, _ = fetch_checkpoint(*hub_id)
    variant = None if path.is_file() else source.variant
    weights = open_checkpoint(path, source if checkpoint is None else None, variant)
    if weights.architecture != manifest.architecture:
        raise AnyFlowError(
            f"{weights.folder} is another model than the one the bundle was exported from. Give"
            " --checkpoint the bundle's own checkpoint."
        )
    return weights
