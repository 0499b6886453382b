"""Packs a pipeline for shipping: every weight in 16 bits, and the digest of every file."""

from __future__ import annotations

import shutil
from pathlib import Path

import safetensors.torch
import torch

from anyflow_deploy.bundle.atomic_io import atomic_folder, file_sha256
from anyflow_deploy.errors import AnyFlowError

DIGESTS = "SHA256SUMS"
"""File with the digest of every other, as `sha256sum --check` reads it."""


def pack_pipeline(source: Path, target: Path) -> None:
    """Copy a pipeline with its weights as float16.

    Args:
        source: folder in diffusers' layout.
        target: to create.

    Raises:
        AnyFlowError: a weight does not fit into float16.
    """
    with atomic_folder(target, replace=False) as partial:
        for path in sorted(source.rglob("*")):
            copy = partial / path.relative_to(source)
            if path.is_dir():
                copy.mkdir()
            elif path.suffix == ".safetensors":
                _write_halves(path, copy)
            else:
                shutil.copyfile(path, copy)
        write_digests(partial)


def _write_halves(path: Path, copy: Path) -> None:
    tensors = safetensors.torch.load_file(path)
    halves = {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
    broken_names = [name for name, half in halves.items() if not torch.isfinite(half).all()]
    if broken_names:
        raise AnyFlowError(
            f"{path}: {broken_names[0]} has numbers beyond float16's 65504; nothing was written."
        )
    safetensors.torch.save_file(halves, copy, metadata={"format": "pt"})


def write_digests(folder: Path) -> None:
    """Write the digests of all files of a folder."""
    lines = [
        f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n"
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != DIGESTS
    ]
    (folder / DIGESTS).write_text("".join(lines))


def find_changed_files(folder: Path) -> list[str]:
    """Return the files of a packed pipeline that are missing, or not as they were packed."""
    changed = []
    for line in (folder / DIGESTS).read_text().splitlines():
        digest, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file() or file_sha256(path) != digest:
            changed.append(name)
    return changed
