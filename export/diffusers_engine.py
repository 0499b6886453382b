"""PyTorch as the reference: a checkpoint in diffusers' own class, float32, behind the same `Engine`
protocol.

Validation compares an engine with this. It is diffusers' code and not ours, so a mistake in our
module shows. (That is right for bidirectional models only: diffusers' causal class pads attention
without a mask and is wrong by percents.)
"""

from __future__ import annotations

import torch
from numpy.typing import ArrayLike

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint, transformer_folder
from anyflow_deploy.checkpoints.hub import TRANSFORMER_FILES, download
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.checkpoints.weights import Weights
from anyflow_deploy.engines.engine import Stream, prepare_inputs
from anyflow_deploy.engines.kv_cache import CachePlan
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.export.torch_run import TorchRun, move_to_device
from anyflow_deploy.shape_ranges import ShapeRanges, widest_ranges


class DiffusersEngine:
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
            raise AnyFlowError(
                "diffusers' causal class is not a safe reference: it attends to padding. Use"
                " TorchEngine."
            )
        self.architecture = architecture
        self._device = device
        config = {k: v for k, v in architecture.as_config().items() if not k.startswith("_")}
        # Unneeded random weights would double time and memory.
        with init_empty_weights(include_buffers=False):
            model = AnyFlowTransformer3DModel(**config)
        model.load_state_dict(
            {name: weights.read(name).float() for name in weights.shapes()}, assign=True
        )
        self._model = move_to_device(model, device)

    @property
    def description(self) -> str:
        """See `Engine`."""
        return f"PyTorch {torch.__version__.split('+')[0]} (diffusers), {self._device}, float32"

    @property
    def ranges(self) -> ShapeRanges:
        """See `Engine`."""
        return widest_ranges(self.architecture)

    def start(self, latents: ArrayLike, text: ArrayLike) -> TorchRun:
        """See `Engine`."""
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
        """See `Engine`."""
        raise AnyFlowError("this is a bidirectional model: use sample(), not stream().")

    def close(self) -> None:
        """See `Engine`."""
        self._model = None


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
        checkpoint = str(
            transformer_folder(
                download(source.location, source.revision, TRANSFORMER_FILES, advice)
            )
        )
    weights = open_checkpoint(checkpoint or source.location)
    if weights.architecture != manifest.architecture:
        raise AnyFlowError(
            f"{weights.folder} is another model than the bundle was exported from. Give"
            " --checkpoint its checkpoint."
        )
    return weights
