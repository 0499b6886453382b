"""The pipeline that training starts from: trained VAE and text encoder, untrained transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from anyflow_deploy.bundle.atomic_io import atomic_folder
from anyflow_deploy.models import Model


def build_base_pipeline(
    model: Model, vae: Any, text_encoder: Any, tokenizer: Any, seed: int
) -> Any:
    """Build a pipeline of diffusers around an untrained transformer.

    Args:
        model: row of the table, with its architecture and shift.
        vae, text_encoder, tokenizer: the trained parts.
        seed: of the transformer's weights.
    """
    import diffusers

    config = model.architecture.as_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = diffusers.AnyFlowTransformer3DModel(
            **{key: value for key, value in config.items() if not key.startswith("_")}
        )
    _initialize(transformer)
    return diffusers.AnyFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=model.shift),
    )


@torch.no_grad()
def _initialize(transformer: Any) -> None:
    """Set what Wan sets: matrices by Xavier's rule, times small, and an output of zero."""
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    for name, parameter in transformer.named_parameters():
        if name.endswith("scale_shift_table"):
            parameter *= 0.1
        elif "time_embedder" in name and name.endswith("weight"):
            parameter.normal_(std=0.02)
    transformer.condition_embedder.time_proj.weight *= 0.1
    transformer.proj_out.weight.zero_()


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Save a pipeline as diffusers does, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as partial:
        pipeline.save_pretrained(partial, safe_serialization=True)
