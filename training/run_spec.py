"""The request for a run, and functions that open its weights, teacher and data."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anyflow_deploy.checkpoints.checkpoint import pipeline_folder
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.checkpoints.weights import Weights
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.training.data.source import DataShard, DataSource
from anyflow_deploy.training.data.synthetic import SyntheticLatents
from anyflow_deploy.training.model.weight_init import open_initial_weights
from anyflow_deploy.training.recipes import Recipe

OpenData = Callable[[str, Recipe, Weights, DataShard], DataSource]


@dataclass(frozen=True)
class RunSpec:
    """A request for a run.

    Attributes:
        recipe: all settings.
        output: folder of the run; if it has a checkpoint, the run resumes from it.
        init: checkpoint to start from; None makes a tiny recipe start from random weights.
        teacher: checkpoint of the score, for the stage on policy.
        data: "synthetic", or a folder of shards.
        shard: processes that share one copy of the weights.
        device: "cpu" or "cuda"; None for CUDA where there is any.
        wandb: project to log to.
    """

    recipe: Recipe
    output: Path
    init: Path | None = None
    teacher: Path | None = None
    data: str = "synthetic"
    shard: int | None = None
    device: str | None = None
    wandb: str | None = None


def open_weights(spec: RunSpec) -> tuple[Weights, Weights | None]:
    """Open the weights that are trained, and the teacher.

    Raises:
        AnyFlowError: a checkpoint is missing, of another kind, or not needed.
    """
    recipe = spec.recipe
    row = recipe.row
    if spec.init is not None:
        weights: Weights = open_initial_weights(spec.init, recipe.causal, recipe.architecture)
    elif row.hub_id is None:
        weights = RandomWeights(row.architecture, row.name, recipe.running.seed)
    else:
        raise AnyFlowError(
            "--init is missing: the folder of a Wan2.1 or AnyFlow checkpoint in diffusers' layout."
        )
    if recipe.stage != "on-policy":
        if spec.teacher is not None:
            raise AnyFlowError(
                f"--teacher belongs to the stage on-policy; {recipe.name} takes only --init."
            )
        return weights, None
    if spec.teacher is None:
        raise AnyFlowError(
            "--teacher is missing: the checkpoint of the stage teacher, whose score is matched."
        )
    teacher = open_initial_weights(spec.teacher, None, row.architecture)
    if teacher.architecture.in_channels != weights.architecture.in_channels:
        raise AnyFlowError(
            "--teacher and --init have latents with different channels; give two of one family."
        )
    return weights, teacher


def open_data(data: str, recipe: Recipe, weights: Weights, part: DataShard) -> DataSource:
    """Open a source by its name.

    Raises:
        AnyFlowError: there is none of that name.
    """
    a = weights.architecture
    if data == "synthetic":
        shape = (recipe.frames, a.in_channels, recipe.height, recipe.width)
        return SyntheticLatents(part, shape, (recipe.text_tokens, a.text_dim), recipe.running.seed)
    try:
        open_source: Callable[..., DataSource] = importlib.import_module(
            "anyflow_deploy.training.data.shard_source"
        ).open_source
    except ModuleNotFoundError as error:
        if error.name != "anyflow_deploy.training.data.shard_source":
            raise
        raise AnyFlowError(f"--data is {data!r}; this version allows only 'synthetic'.") from None
    return open_source(data, recipe, weights, part)


def find_vae_pipeline(start: Path | None) -> Path | None:
    """Return the pipeline around a starting checkpoint, or None where it cannot decode."""
    pipeline = pipeline_folder(start) if start else None
    return pipeline if pipeline is not None and (pipeline / "vae").is_dir() else None
