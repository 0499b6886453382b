"""Checkpoint folders by model name: from the Hugging Face Hub, from this repository, or made here.

Nothing is downloaded that is not needed: an export asks for the transformer alone, generation for
the rest.
"""

from __future__ import annotations

import os
from pathlib import Path

import anyflow_deploy
from anyflow_deploy.bundle.manifest import WeightsSource
from anyflow_deploy.errors import CheckpointError
from anyflow_deploy.hub import download
from anyflow_deploy.models import Model

__all__ = [
    "PIPELINE_FILES",
    "TRANSFORMER_FILES",
    "asset_folder",
    "cache_folder",
    "download",
    "fetch_checkpoint",
    "pipeline_from_model",
]

TRANSFORMER_FILES = ["model_index.json", "transformer/*.json", "transformer/*.safetensors"]
_CONFIG_FILES = ["model_index.json", "config.json", "transformer/*.json"]
_FOLDER_FILES = ["config.json", "*.safetensors", "*.safetensors.index*.json"]
PIPELINE_FILES = [
    "model_index.json",
    "scheduler/*",
    "tokenizer/*",
    "text_encoder/*.json",
    "text_encoder/*.safetensors",
    "vae/*.json",
    "vae/*.safetensors",
]

_EXPORT_ADVICE = (
    "Without the network, give --checkpoint DIR (a pipeline folder or its transformer/), or"
    " --random-weights to export the architecture alone."
)


def cache_folder() -> Path:
    """Return this project's cache: `$ANYFLOW_CACHE`, or `~/.cache/anyflow_deploy`."""
    return Path(os.environ.get("ANYFLOW_CACHE") or Path.home() / ".cache" / "anyflow_deploy")


def pipeline_from_model(model: Model, files: list[str]) -> tuple[Path, WeightsSource]:
    """Find a known model's files; download or make those that are not there yet.

    Args:
        model: a row of the table.
        files: patterns, `TRANSFORMER_FILES` or `PIPELINE_FILES`.

    Returns:
        The folder, and where it came from, for the manifest.

    Raises:
        CheckpointError: the Hub cannot be reached and the cache does not have it.
    """
    if model.asset is not None:
        folder = asset_folder(model.asset)
        return folder, WeightsSource(kind="folder", location=str(folder))
    if model.hub_id is None:
        from anyflow_deploy.checkpoints.tiny import TINY_SEED, get_tiny_pipeline

        folder = get_tiny_pipeline(model, cache_folder())
        return folder, WeightsSource(kind="folder", location=str(folder), seed=TINY_SEED)
    folder = download(model.hub_id, None, files, _EXPORT_ADVICE)
    return folder, WeightsSource(kind="hub", location=model.hub_id, revision=folder.name)


def asset_folder(name: str) -> Path:
    """Return the folder of a pipeline that ships with the repository, under `assets/`.

    Raises:
        CheckpointError: the package was installed without the repository.
    """
    folder = Path(anyflow_deploy.__file__).resolve().parents[1] / "assets" / name
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"the pipeline {name!r} comes with a checkout of anyflow_deploy, and {folder} is not"
            f" there. Clone the repository and give --checkpoint assets/{name}, or take the model"
            " tiny."
        )
    return folder


def fetch_checkpoint(hub_id: str, revision: str | None) -> tuple[Path, WeightsSource]:
    """Download the transformer of a Hub repository: a pipeline's, or the repository itself.

    Returns:
        The folder, and where it came from, for the manifest.

    Raises:
        CheckpointError: the Hub cannot be reached and the cache does not have it.
    """
    folder = download(hub_id, revision, _CONFIG_FILES, _EXPORT_ADVICE)
    is_pipeline = (folder / "model_index.json").is_file()
    files = TRANSFORMER_FILES if is_pipeline else _FOLDER_FILES
    folder = download(hub_id, folder.name, files, _EXPORT_ADVICE)
    return folder, WeightsSource(kind="hub", location=hub_id, revision=folder.name)
