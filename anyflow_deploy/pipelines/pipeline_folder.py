"""Find the text encoder and the VAE of a bundle's model."""

from __future__ import annotations

from pathlib import Path

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.checkpoints.checkpoint import missing_parts, pipeline_folder
from anyflow_deploy.checkpoints.hub import PIPELINE_FILES, download
from anyflow_deploy.errors import CheckpointError

_ADVICE = "Give --pipeline DIR, a diffusers pipeline on this machine."
_ALTERNATIVE = (
    ", or avoid the text encoder with --prompt-embeds FILE and the VAE with --output"
    " latents.safetensors"
)


def find_pipeline(
    manifest: Manifest, source: str | None, parts: list[str], alternative: str = _ALTERNATIVE
) -> Path:
    """Find the pipeline folder that belongs to a bundle; download it where it is on the Hub.

    Args:
        manifest: says where the weights came from.
        source: a folder or Hub id to use instead.
        parts: subfolders that are needed, such as "vae".
        alternative: how to go without the pipeline, for the message.

    Raises:
        CheckpointError: no pipeline is known, or it lacks a part.
    """
    folder = _find_folder(manifest, source)
    missing = missing_parts(folder, parts)
    if folder is None or missing:
        raise CheckpointError(
            f"this needs {' and '.join(parts)} of the model's pipeline, and"
            f" {folder or manifest.source.location} has"
            f" {'none' if folder is None else 'no ' + ', '.join(missing)}. Give --pipeline DIR (a"
            f" diffusers pipeline){alternative}."
        )
    return folder


def _find_folder(manifest: Manifest, source: str | None) -> Path | None:
    if source is not None:
        path = Path(source)
        return path if path.is_dir() else download(source, None, PIPELINE_FILES, _ADVICE)
    if manifest.source.kind == "hub":
        return download(manifest.source.location, manifest.source.revision, PIPELINE_FILES, _ADVICE)
    return (
        pipeline_folder(Path(manifest.source.location))
        if manifest.source.kind == "folder"
        else None
    )
