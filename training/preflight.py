"""Checks before the first step: data, disk, memory, and whether a checkpoint is of this run."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from anyflow_deploy.checkpoints.weights import Weights
from anyflow_deploy.errors import AnyFlowError, CheckpointError
from anyflow_deploy.models import Architecture
from anyflow_deploy.training.data.source import Batch
from anyflow_deploy.training.distributed import DistributedContext
from anyflow_deploy.training.model.memory import (
    checkpoint_bytes,
    estimate_training_memory,
    model_bytes,
)
from anyflow_deploy.training.recipes import Recipe, recipe_from_dict, recipe_to_dict

CHANGEABLE = {
    "steps",
    "micro_batch",
    "learning_rate",
    "beta1",
    "beta2",
    "weight_decay",
    "clip",
    "warm_up",
    "final_rate",
    "ema",
    "ema_start",
    "compute",
    "checkpointing",
    "offload",
    "compile",
    "checkpoint_every",
    "keep",
    "asynchronous",
    "sample_every",
    "sample_steps",
    "spike",
    "save_type",
    "merge_padding",
}
"""Settings that may change when a run resumes: how fast it learns, what it costs and what it saves,
not what is learned from which data. `changes.jsonl` of the run records them."""


def check_packages(recipe: Recipe, wandb: str | None) -> None:
    """Check that the packages which the run imports are installed.

    Raises:
        AnyFlowError: with the command that installs it.
    """
    packages = {"tensorboard": True, "peft": recipe.adapting.lora_rank > 0}
    missing = [
        name
        for name, is_needed in packages.items()
        if is_needed and importlib.util.find_spec(name) is None
    ]
    if missing:
        raise AnyFlowError(
            f"training needs {' and '.join(missing)}. Run: pip install 'anyflow-deploy[train]'"
        )
    if wandb is not None and importlib.util.find_spec("wandb") is None:
        raise AnyFlowError("--wandb needs the package wandb. Run: pip install wandb")


def check_memory(recipe: Recipe, a: Architecture, world: DistributedContext) -> str:
    """Estimate the memory of a process, and return a line that tells it.

    Raises:
        AnyFlowError: weights and optimizer alone, which are counted and not estimated, do not fit.
    """
    pieces = world.mesh.size(world.mesh.ndim - 1) if world.mesh is not None else 1
    memory = estimate_training_memory(recipe, a, pieces)
    if world.device.type == "cuda":
        available = torch.cuda.get_device_properties(world.device).total_memory
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world.size
    fixed_bytes = memory.weights + memory.training
    if fixed_bytes > available:
        raise AnyFlowError(
            f"weights, gradients and optimizer take {fixed_bytes / 2**30:.1f} GiB a process; there"
            f" are {available / 2**30:.1f} GiB. Use more processes, or adapters (--lora-rank 256)."
        )
    parts = f"activations {memory.activations / 2**30:.2f}, estimated"
    line = f"memory {memory.total / 2**30:.2f} GiB a process ({parts}) of {available / 2**30:.1f}"
    return (
        line
        if memory.total <= available
        else (
            f"{line}: likely too little. Use --micro-batch 1, --checkpointing true, more processes."
        )
    )


def check_disk(recipe: Recipe, a: Architecture, output: Path) -> str:
    """Check that the disk has room for the run's files, and return a line that tells their size.

    Raises:
        AnyFlowError: the disk has no room for it, or the folder cannot be written to.
    """
    output.mkdir(parents=True, exist_ok=True)
    if not os.access(output, os.W_OK):
        raise AnyFlowError(f"{output} cannot be written to. Choose another --output.")
    needed_bytes = (recipe.running.keep + 1) * checkpoint_bytes(recipe, a) + model_bytes(recipe, a)
    free_bytes = shutil.disk_usage(output).free
    if needed_bytes > free_bytes:
        raise AnyFlowError(
            f"{recipe.running.keep + 1} checkpoints and the model take"
            f" {needed_bytes / 2**30:.1f} GiB; {output} has {free_bytes / 2**30:.1f} GiB free."
            " Lower --keep, or choose another --output."
        )
    return f"disk {needed_bytes / 2**30:.2f} GiB of {free_bytes / 2**30:.1f} free"


def check_batch(batch: Batch, recipe: Recipe, a: Architecture) -> None:
    """Check that a batch has the recipe's shapes.

    Raises:
        AnyFlowError: with the names of the samples.
    """
    recipe_shape = (recipe.frames, a.in_channels, recipe.height, recipe.width)
    batch_shape = tuple(batch.latents.shape[1:])
    names = ", ".join(batch.names[:4])
    if batch_shape != recipe_shape:
        raise AnyFlowError(
            f"samples {names} have latents (F, C, H, W) {batch_shape}; the recipe has"
            f" {recipe_shape}. Give --frames, --height and --width of the data."
        )
    if batch.text.shape[-1] != a.text_dim or batch.text.shape[0] != len(batch.latents):
        raise AnyFlowError(
            f"samples {names} have text {tuple(batch.text.shape)}; the model takes (B, tokens,"
            f" {a.text_dim})."
        )


def check_resume(
    state: dict[str, Any], recipe: Recipe, base: str, path: Path
) -> dict[str, tuple[Any, Any]]:
    """Check that a checkpoint belongs to this run.

    Returns:
        The settings that changed, and may: by name, the value before and now.

    Raises:
        CheckpointError: with the settings that differ and may not.
    """
    # A setting that is newer than the checkpoint had its default
    old = _flatten(recipe_to_dict(recipe_from_dict(state["recipe"])))
    new = _flatten(recipe_to_dict(recipe))
    differences = {n: (old.get(n), new[n]) for n in new if old.get(n) != new[n]}
    changes = [
        f"--{n.replace('_', '-')} {before} in it, {now} now"
        for n, (before, now) in differences.items()
        if n not in CHANGEABLE
    ]
    if changes:
        raise CheckpointError(
            f"{path} is of a run with other settings: {'; '.join(changes[:4])}. Give the same"
            " settings, or choose another --output."
        )
    if state["base"] != base:
        raise CheckpointError(
            f"{path} is of a run that started from other weights. Give the same --init and"
            " --teacher, or another --output."
        )
    return differences


def record_changes(output: Path, step: int, changes: dict[str, tuple[Any, Any]]) -> None:
    """Append the settings that changed when a run resumed to its changes.jsonl."""
    if changes:
        with (output / "changes.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "changes": changes}) + "\n")


def _flatten(content: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's settings by name, with the alpha that counts."""
    result: dict[str, Any] = {}
    for name, value in content.items():
        result |= value if isinstance(value, dict) else {name: value}
    if result["lora_rank"] == 0:
        result["lora_alpha"] = None
    elif result["lora_alpha"] is None:
        result["lora_alpha"] = result["lora_rank"]
    return result


def quick_fingerprint(*all_weights: Weights | None) -> str:
    """Return a fingerprint of weights, from their small tensors.

    To read whole tensors would take minutes.
    """
    digest = hashlib.sha256()
    for weights in all_weights:
        if weights is None:
            continue
        digest.update(repr(sorted(dataclasses.asdict(weights.architecture).items())).encode())
        for name, shape in sorted(weights.shapes().items()):
            if len(shape) == 1 or "patch_embedding" in name or name == "proj_out.weight":
                digest.update(
                    name.encode() + weights.read(name).float().contiguous().numpy().tobytes()
                )
    return digest.hexdigest()
