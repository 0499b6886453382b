"""LoRA with peft on the training network: its layers, types and names.

The adapters' weights are float32 and multiply in the type of the layer they adapt. There is no
dropout: two forwards of a finite difference have to use the same network. The update is
alpha / rank B A; a saved B has that factor in it, since loaders disagree about where alpha stands.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from anyflow_deploy.training.config import LoRAConfig
from anyflow_deploy.training.model.network import CastLinear, TrainingTransformer
from anyflow_deploy.training.timestep_sampling import seeded_generator

ADAPTER = "default"
LAYERS = r"blocks\.\d+\.(attn1\.to_[qkv]|attn1\.to_out\.0|ffn\.net\.0\.proj|ffn\.net\.2)"
TIMES = r"condition_embedder\.(time|delta)_embedder\.linear_[12]"
FULLY_TRAINED = ("far_patch_embedding.",)
"""Prefixes of parameters that are trained without adapters, where the network has them."""


def add_lora(network: TrainingTransformer, settings: LoRAConfig) -> None:
    """Wrap the adapted layers (on the meta device), and freeze the rest.

    Only adapters and `FULLY_TRAINED` keep a gradient.
    """
    from peft import LoraConfig, inject_adapter_in_model

    network.requires_grad_(False)
    pattern = f"{LAYERS}|{TIMES}" if settings.lora_times else LAYERS
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or settings.lora_rank,
        lora_dropout=0.0,
        target_modules=f"^({pattern})$",
        init_lora_weights=False,
    )
    inject_adapter_in_model(config, network, ADAPTER, low_cpu_mem_usage=True)
    for layer in lora_layers(network).values():
        layer.cast_input_dtype_enabled = False  # CastLinear casts
        for half in (layer.lora_A, layer.lora_B):
            half[ADAPTER] = _to_cast_linear(half[ADAPTER], layer.base_layer)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith(FULLY_TRAINED))


def _to_cast_linear(plain: nn.Linear, base: CastLinear) -> CastLinear:
    result = CastLinear(
        plain.in_features, plain.out_features, bias=False, dtype=torch.float32, device="meta"
    )
    result.compute_type = base.compute_type
    result.large = base.large
    return result


def lora_layers(network: nn.Module) -> dict[str, Any]:
    """Return peft's layers by the name of the layer they wrap."""
    return {name: module for name, module in network.named_modules() if hasattr(module, "lora_A")}


def initial_adapter(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return the initial weights of an adapter: A is uniform in +-1/sqrt(inputs), B is zero.

    The adapted network starts as its base. The numbers depend on the name, so they are the same on
    any process.
    """
    if ".lora_B." in name:
        return torch.zeros(shape)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(
        -bound, bound, generator=seeded_generator(seed, "lora", name)
    )


def base_name(name: str) -> str:
    """Return diffusers' name of a parameter like `blocks.0.attn1.to_q.base_layer.weight`."""
    return name.replace(".base_layer.", ".")


def adapter_name(name: str) -> str:
    """Return the name in diffusers' LoRA files of `blocks.0.attn1.to_q.lora_A.default.weight`."""
    return "transformer." + re.sub(rf"\.(lora_[AB])\.{ADAPTER}\.", r".\1.", name)


@contextlib.contextmanager
def disable_adapters(network: nn.Module) -> Iterator[None]:
    """Switch the adapters off until the block ends.

    The frozen teacher and the fake score that started from it share one set of large weights.

    peft's own switch also turns `requires_grad` off and on, which FSDP may not see change; so its
    flag is set directly.
    """
    layers = list(lora_layers(network).values())
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def lora_scaling(network: nn.Module, module: str) -> float:
    """Return alpha / rank of an adapted layer."""
    return cast(float, network.get_submodule(module).scaling[ADAPTER])  # type: ignore[index]
