"""Writes the result of a run: a checkpoint in diffusers' layout, and the adapters alone.

    OUTPUT/model/    a pipeline: `AnyFlowPipeline.from_pretrained`, `anyflow-export --checkpoint`
    OUTPUT/lora/     pytorch_lora_weights.safetensors; trained_weights.safetensors has the
                     parameters that are trained without adapters

Weights are merged (W + alpha/rank B A), in float32, one tensor at a time: no process holds more
than two copies of the largest. The pipeline's other parts are those the run started from, as hard
links where the file system allows it.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from anyflow_deploy.bundle.atomic_io import atomic_folder
from anyflow_deploy.checkpoints.checkpoint import STEM, pipeline_folder, read_json
from anyflow_deploy.checkpoints.dtypes import SAFETENSORS_NAMES
from anyflow_deploy.checkpoints.safetensors_stream import build_header
from anyflow_deploy.models import Architecture
from anyflow_deploy.training.distributed import DistributedContext
from anyflow_deploy.training.model.lora import (
    ADAPTER,
    adapter_name,
    base_name,
    lora_layers,
    lora_scaling,
)
from anyflow_deploy.training.model.model_factory import gather_tensor
from anyflow_deploy.training.model.network import TrainingTransformer
from anyflow_deploy.training.optimizer import OptimizerState

PARTS = ("text_encoder", "tokenizer", "vae")


def save_pretrained(
    output: Path,
    optimizer_state: OptimizerState,
    world: DistributedContext,
    shift: float,
    save_type: str,
    start: Path | None,
) -> Path:
    """Write `model/` and, with adapters, `lora/`.

    A folder that is there is replaced when the new one is complete.

    Args:
        optimizer_state: its network's current weights are written; the caller puts the moving
            average in first.
        start: the folder the run started from; its text encoder, tokenizer and VAE are copied.

    Returns:
        The model's folder.
    """
    with atomic_folder(output / "model") if world.is_main else nullcontext() as partial:
        _save_transformer(partial, optimizer_state, world, getattr(torch, save_type))
        if partial is not None:
            _write_pipeline(partial, optimizer_state.network.architecture, shift, start)
    adapters = (
        {name: gather_tensor(p.detach()).cpu() for name, p in optimizer_state.parameters.items()}
        if lora_layers(optimizer_state.network)
        else {}
    )
    if world.is_main and adapters:
        _save_adapters(output, optimizer_state.network, adapters)
    world.barrier()
    return output / "model"


@torch.no_grad()
def merge_weight(optimizer_state: OptimizerState, name: str) -> Tensor:
    """Return a whole parameter of the network with its adapter's update, float32.

    Every process has to call it.
    """
    network = optimizer_state.network
    value = gather_tensor(network.get_parameter(name).detach()).float()
    module = name.removesuffix(".base_layer.weight")
    if module != name:
        first, second = (
            network.get_parameter(f"{module}.lora_{half}.{ADAPTER}.weight").detach()
            for half in "AB"
        )
        value = value + lora_scaling(network, module) * (
            gather_tensor(second) @ gather_tensor(first)
        )
    return value


def _save_transformer(
    partial: Path | None,
    optimizer_state: OptimizerState,
    world: DistributedContext,
    kind: torch.dtype,
) -> None:
    """Write `transformer/` into the model's folder; the other processes help to gather."""
    names = [name for name, _ in optimizer_state.network.named_parameters() if ".lora_" not in name]
    head, _ = build_header(
        {
            base_name(n): (
                SAFETENSORS_NAMES[kind],
                tuple(optimizer_state.network.get_parameter(n).shape),
            )
            for n in names
        },
        {"format": "pt"},
    )
    folder = None if partial is None else partial / "transformer"
    if folder is not None:
        folder.mkdir()
    with (folder / f"{STEM}.safetensors" if folder is not None else Path(os.devnull)).open(
        "wb"
    ) as file:
        file.write(head)
        for name in names:
            value = merge_weight(optimizer_state, name)
            if world.is_main:
                file.write(
                    value.to("cpu", kind).contiguous().view(-1).view(torch.uint8).numpy().data
                )
    if folder is not None:
        (folder / "config.json").write_text(
            json.dumps(optimizer_state.network.architecture.as_config(), indent=2)
        )


def _write_pipeline(folder: Path, a: Architecture, shift: float, start: Path | None) -> None:
    """Write the parts around the transformer, where the run started from a pipeline."""
    pipeline = pipeline_folder(start) if start else None
    if pipeline is None:
        for path in (folder / "transformer").iterdir():  # the run started from a transformer alone
            path.rename(folder / path.name)
        (folder / "transformer").rmdir()
        return
    index = {
        key: value
        for key, value in read_json(pipeline / "model_index.json").items()
        if key in PARTS
    }
    for part in index:
        if (pipeline / part).is_dir():
            shutil.copytree(pipeline / part, folder / part, copy_function=_link_or_copy)
    (folder / "scheduler").mkdir()
    scheduler = {
        "_class_name": "FlowMapEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": shift,
    }
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2))
    content: dict[str, Any] = {
        "_class_name": "AnyFlowFARPipeline" if a.causal else "AnyFlowPipeline",
        **index,
        "scheduler": ["diffusers", "FlowMapEulerDiscreteScheduler"],
        "transformer": ["diffusers", a.as_config()["_class_name"]],
    }
    (folder / "model_index.json").write_text(json.dumps(content, indent=2))


def _link_or_copy(source: str, target: str) -> str:
    real = os.path.realpath(source)  # a hub's cache is a folder of links
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)
    return target


def _save_adapters(output: Path, network: TrainingTransformer, values: dict[str, Tensor]) -> None:
    """Write the adapters for loaders that add B A: B has the factor alpha / rank in it."""
    halves = {}
    for name, value in values.items():
        if ".lora_" in name:
            module, _, half = name.partition(".lora_")
            scale = lora_scaling(network, module) if half.startswith("B") else 1.0
            halves[adapter_name(name)] = (scale * value).contiguous()
    rest = {name: value.contiguous() for name, value in values.items() if ".lora_" not in name}
    with atomic_folder(output / "lora") as partial:
        save_file(halves, partial / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
        if rest:
            save_file(rest, partial / "trained_weights.safetensors", metadata={"format": "pt"})
