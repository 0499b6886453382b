"""Builds a network for training: on the meta device, adapted, sharded, then filled.

Weights are read from the checkpoint, one parameter at a time, only after FSDP2 has cut the
parameters, and each process keeps its own piece: no process ever holds the model whole.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from anyflow_deploy.checkpoints.weights import Weights
from anyflow_deploy.training.model.lora import add_lora, base_name, initial_adapter
from anyflow_deploy.training.model.network import TrainingTransformer
from anyflow_deploy.training.model.weight_init import fill_constants
from anyflow_deploy.training.recipes import Recipe


def build_trained_network(
    weights: Weights, recipe: Recipe, device: torch.device, mesh: DeviceMesh | None
) -> TrainingTransformer:
    """Build a network whose weights, or whose adapters, are trained.

    Args:
        weights: complete, of the architecture that is trained.
        recipe: decides which parameters are trained, and the types.
        mesh: to shard over; None for one process.
    """
    return _build_network(weights, recipe, device, mesh, trained=True)


def build_frozen_network(
    weights: Weights, recipe: Recipe, device: torch.device, mesh: DeviceMesh | None
) -> TrainingTransformer:
    """Build a network that is only evaluated."""
    return _build_network(weights, recipe, device, mesh, trained=False)


def _build_network(
    weights: Weights, recipe: Recipe, device: torch.device, mesh: DeviceMesh | None, trained: bool
) -> TrainingTransformer:
    has_adapters = trained and recipe.adapting.lora_rank > 0
    compute = getattr(torch, recipe.running.compute)
    with torch.device("meta"):
        network = TrainingTransformer(
            weights.architecture, compute, frozen=has_adapters or not trained
        )
    network.requires_grad_(trained)
    network.merges_padding = recipe.running.merge_padding
    if has_adapters:
        add_lora(network, recipe.adapting)
    network.set_gradient_checkpointing(
        recipe.running.checkpointing and trained, recipe.running.offload
    )
    if recipe.running.compile:
        for block in network.blocks:
            block.compile()
    if mesh is not None:
        shard_network(network, mesh)
    network.to_empty(device=device)
    load_parameters(network, weights, recipe.running.seed)
    fill_constants(network, device)
    return network


def shard_network(network: TrainingTransformer, mesh: DeviceMesh) -> None:
    """Shard a network with FSDP2, block by block.

    A mesh of two dimensions replicates over the first and shards over the second.
    """
    from torch.distributed.fsdp import fully_shard

    # The outputs are views, and nothing here changes one in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


@torch.no_grad()
def load_parameters(network: nn.Module, weights: Weights, seed: int) -> None:
    """Set every parameter: from the checkpoint, or to the initial value of an adapter."""
    for name, parameter in network.named_parameters():
        start = (
            initial_adapter(name, tuple(parameter.shape), seed)
            if ".lora_" in name
            else weights.read(base_name(name))
        )
        assign_parameter(parameter, start)


@torch.no_grad()
def assign_parameter(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter, or this process's piece of it into its piece."""
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        value = distribute_tensor(
            value, parameter.device_mesh, parameter.placements, src_data_rank=None
        ).to_local()
        parameter.to_local().copy_(value)
    else:
        parameter.copy_(value)


def gather_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor; every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the optimizer, by name, in order."""
    return {
        name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad
    }
