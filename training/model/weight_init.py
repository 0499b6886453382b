"""The initial weights: those of a Wan2.1 or AnyFlow checkpoint, or random ones, with additions.

Wan2.1 has neither a second time embedder nor an embedding of compressed chunks. The first starts as
a copy of the time embedder, so that at r = t the network is Wan. The second starts as the first
embedding spread over the larger patch, so that a coarse token is the mean of the fine ones it
replaces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyflow_deploy.bundle.manifest import WeightsSource
from anyflow_deploy.checkpoints.checkpoint import (
    open_checkpoint,
    open_transformer,
    read_json,
    transformer_folder,
)
from anyflow_deploy.checkpoints.weights import Weights, WeightsBase, check_parameters
from anyflow_deploy.errors import CheckpointError
from anyflow_deploy.memory.parameter_shapes import parameter_shapes
from anyflow_deploy.model.transformer import constants
from anyflow_deploy.models import BIDIRECTIONAL_CLASS, Architecture, architecture_from_config
from anyflow_deploy.training.model.network import TrainingTransformer

WAN_CLASS = "WanTransformer3DModel"
_WAN_ONLY_KEYS = {
    "qk_norm": "rms_norm_across_heads",
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
"""Keys that only Wan's config has, with the one value that AnyFlow's network computes."""

_DELTA = "condition_embedder.delta_embedder."
_TIME = "condition_embedder.time_embedder."


class InitialWeights(WeightsBase):
    """The `Weights` of a base, completed by the parameters that it lacks.

    Args:
        base: a checkpoint or random weights.
        architecture: of the network that is trained.

    Raises:
        CheckpointError: the base lacks other parameters than the two additions, or has other
            shapes.
    """

    def __init__(self, base: Weights, architecture: Architecture) -> None:
        self.architecture = architecture
        self.source = base.source
        self._base = base
        self._base_shapes = base.shapes()
        expected = parameter_shapes(architecture)
        self.added_names = tuple(
            n
            for n in expected
            if n not in self._base_shapes and (n.startswith((_DELTA, "far_patch_embedding.")))
        )
        check_parameters(
            base, {name: shape for name, shape in expected.items() if name not in self.added_names}
        )
        self._shapes = expected

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter, by name."""
        return dict(self._shapes)

    def read(self, name: str) -> Tensor:
        """Return one parameter, on the CPU."""
        if name not in self.added_names:
            return self._base.read(name)
        if name.startswith(_DELTA):
            return self._base.read(_TIME + name[len(_DELTA) :]).clone()
        near = self._base.read(name.removeprefix("far_"))
        if name.endswith("bias"):
            return near.clone()
        compressed = self.architecture.compressed_patch_size
        fine = self.architecture.patch_size
        assert compressed is not None
        rows = compressed[1] // fine[1]
        columns = compressed[2] // fine[2]
        return near.repeat(1, 1, 1, rows, columns) / (rows * columns)


def open_initial_weights(
    path: str | Path, causal: bool | None, like: Architecture
) -> InitialWeights:
    """Open the weights that a run starts from.

    Args:
        path: a pipeline or transformer folder, of Wan2.1 or AnyFlow.
        causal: train a causal model, for which a bidirectional checkpoint is completed. None takes
            the checkpoint as it is.
        like: architecture whose chunks are used where the checkpoint has none.

    Raises:
        CheckpointError: another kind of model, or a causal checkpoint for a bidirectional run.
    """
    folder = transformer_folder(Path(path))
    config = read_json(folder / "config.json")
    source = WeightsSource(kind="folder", location=str(Path(path).resolve()))
    if config.get("_class_name") == WAN_CLASS:
        base: Weights = open_transformer(
            folder, architecture_from_wan(config, str(folder / "config.json")), source
        )
    else:
        base = open_checkpoint(path, source)
    architecture = base.architecture
    if architecture.causal and causal is False:
        raise CheckpointError(
            f"{path} is a causal model and the recipe trains a bidirectional one. Add -causal to"
            " the recipe."
        )
    if causal and not architecture.causal:
        architecture = dataclasses.replace(
            architecture,
            compressed_patch_size=like.compressed_patch_size,
            full_chunk_limit=like.full_chunk_limit,
            chunk_partition=like.chunk_partition,
        )
    return InitialWeights(base, architecture)


def architecture_from_wan(config: Mapping[str, Any], where: str) -> Architecture:
    """Return the AnyFlow architecture of a Wan2.1 transformer's config.json.

    Raises:
        CheckpointError: a variant of Wan that AnyFlow's network does not compute (image
            conditioning, other norms).
    """
    unsupported = [
        f"{key} {config[key]!r}"
        for key, value in _WAN_ONLY_KEYS.items()
        if key in config and config[key] != value
    ]
    if unsupported:
        raise CheckpointError(
            f"{where} has {', '.join(unsupported)}; AnyFlow starts from Wan2.1 text-to-video"
            " models."
        )
    rest = {
        key: value
        for key, value in config.items()
        if key not in _WAN_ONLY_KEYS and not key.startswith("_")
    }
    return architecture_from_config({**rest, "_class_name": BIDIRECTIONAL_CLASS}, where)


def build_network(
    a: Architecture,
    tensors: Mapping[str, Tensor],
    compute_type: torch.dtype = torch.float32,
    frozen: bool = False,
) -> TrainingTransformer:
    """Build a network on the CPU with copies of these parameters, for tests and small tools."""
    with torch.device("meta"):
        network = TrainingTransformer(a, compute_type, frozen)
    expected = {name: parameter.dtype for name, parameter in network.named_parameters()}
    network.load_state_dict(
        {name: tensor.to(expected[name], copy=True) for name, tensor in tensors.items()},
        assign=True,
    )
    fill_constants(network, torch.device("cpu"))
    return network.requires_grad_(not frozen)


def fill_constants(network: TrainingTransformer, device: torch.device) -> None:
    """Set the computed buffers (rotary tables, frequencies)."""
    for name, value in constants(network.architecture).items():
        module, _, buffer = name.rpartition(".")
        setattr(network.get_submodule(module), buffer, value.to(device))
