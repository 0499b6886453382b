"""What a run leaves: a checkpoint in diffusers' own layout, and the adapters alone in diffusers' LoRA layout.

    OUTPUT/model/    a pipeline: `AnyFlowPipeline.from_pretrained`, `anyflow-export --checkpoint`
    OUTPUT/lora/     pytorch_lora_weights.safetensors; trained_weights.safetensors for what is trained without adapters

Weights are merged (W + alpha/rank B A), in float32, one tensor at a time: no process holds more than the largest, twice. The
pipeline's other parts are those the run started from, as hard links where the disk allows.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from anyflow_deploy.checkpoints.checkpoint import STEM, pipeline_folder, read_json
from anyflow_deploy.checkpoints.dtypes import SAFETENSORS
from anyflow_deploy.checkpoints.safetensors_stream import layout
from anyflow_deploy.models import Architecture
from anyflow_deploy.training.distributed import World
from anyflow_deploy.training.model.lora import ADAPTER, adapter_name, base_name, lora_layers, scaling
from anyflow_deploy.training.model.model_factory import whole
from anyflow_deploy.training.optimizer import Learner

PARTS = ("text_encoder", "tokenizer", "vae")


def save_finished(output: Path, learner: Learner, world: World, shift: float, save_type: str, start: Path | None) -> Path:
    """Write `model/` and, with adapters, `lora/`; what was there is replaced when the new one is whole.

    Args:
        learner: its moving average is put in by the caller where that is wanted.
        start: the folder the run started from: its text encoder, tokenizer and VAE are taken over.

    Returns:
        The model's folder.
    """
    partial = output / ".model.partial"
    if world.first:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "transformer").mkdir(parents=True)
    _save_transformer(partial / "transformer", learner, world, getattr(torch, save_type))
    adapters = {name: whole(p.detach()).cpu() for name, p in learner.parameters.items()} if lora_layers(learner.network) else {}
    if world.first:
        _write_pipeline(partial, learner.network.architecture, shift, start)
        _replace(partial, output / "model")
        if adapters:
            _save_adapters(output, adapters)
    world.barrier()
    return output / "model"


@torch.no_grad()
def merged(learner: Learner, name: str) -> Tensor:
    """A parameter of the network, by its name in it, with its adapter's update: float32, whole. Every process calls it."""
    network = learner.network
    value = whole(network.get_parameter(name).detach()).float()
    module = name.removesuffix(".base_layer.weight")
    if module != name:
        first, second = (network.get_parameter(f"{module}.lora_{half}.{ADAPTER}.weight").detach() for half in "AB")
        value = value + scaling(network, module) * (whole(second) @ whole(first))
    return value


def _save_transformer(folder: Path, learner: Learner, world: World, kind: torch.dtype) -> None:
    names = [name for name, _ in learner.network.named_parameters() if ".lora_" not in name]
    head, _ = layout(
        {base_name(n): (SAFETENSORS[kind], tuple(learner.network.get_parameter(n).shape)) for n in names}, {"format": "pt"}
    )
    path = folder / f"{STEM}.safetensors"
    with (path if world.first else Path(os.devnull)).open("wb") as file:
        file.write(head)
        for name in names:
            value = merged(learner, name)
            if world.first:
                file.write(value.to("cpu", kind).contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        if world.first:
            os.fsync(file.fileno())
    if world.first:
        (folder / "config.json").write_text(json.dumps(learner.network.architecture.as_config(), indent=2))


def _write_pipeline(folder: Path, a: Architecture, shift: float, start: Path | None) -> None:
    """The parts around the transformer, where the run started from a pipeline."""
    pipeline = pipeline_folder(start) if start else None
    if pipeline is None:
        for path in (folder / "transformer").iterdir():  # a transformer alone, as it was given
            path.rename(folder / path.name)
        (folder / "transformer").rmdir()
        return
    index = {key: value for key, value in read_json(pipeline / "model_index.json").items() if key in PARTS}
    for part in index:
        if (pipeline / part).is_dir():
            shutil.copytree(pipeline / part, folder / part, copy_function=_linked)
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "FlowMapEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": shift}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2))
    content: dict[str, Any] = {
        "_class_name": "AnyFlowFARPipeline" if a.causal else "AnyFlowPipeline",
        **index,
        "scheduler": ["diffusers", "FlowMapEulerDiscreteScheduler"],
        "transformer": ["diffusers", a.as_config()["_class_name"]],
    }
    (folder / "model_index.json").write_text(json.dumps(content, indent=2))


def _linked(source: str, target: str) -> str:
    real = os.path.realpath(source)  # a hub's cache is a folder of links
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)
    return target


def _save_adapters(output: Path, values: dict[str, Tensor]) -> None:
    partial = output / ".lora.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    halves = {adapter_name(name): value.contiguous() for name, value in values.items() if ".lora_" in name}
    save_file(halves, partial / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
    rest = {name: value.contiguous() for name, value in values.items() if ".lora_" not in name}
    if rest:
        save_file(rest, partial / "trained_weights.safetensors", metadata={"format": "pt"})
    _replace(partial, output / "lora")


def _replace(partial: Path, final: Path) -> None:
    """Rename into place; an older one is moved aside first and removed after."""
    old = final.parent / f".{final.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)
