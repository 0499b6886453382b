"""Find a checkpoint, and read its weights one tensor at a time.

A checkpoint is a folder in diffusers' layout: either a whole pipeline (`model_index.json`,
`transformer/`, …) or just the transformer (`config.json` and the weights, `weight_files` says in
which files); or one .safetensors file of weights, with its config.json beside it or of a model that
this project knows. Only safetensors are read: `.bin` and `.pt` files are pickles, and loading a
pickle runs whatever program is inside.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from anyflow_deploy.bundle.manifest import WeightsSource
from anyflow_deploy.bundle.renames import file_mode
from anyflow_deploy.checkpoints.dtypes import CHECKPOINT_DTYPES
from anyflow_deploy.checkpoints.names import strip_prefixes
from anyflow_deploy.checkpoints.safetensors_stream import TensorEntry, read_bytes, read_header
from anyflow_deploy.checkpoints.weight_files import (
    INDEX_SUFFIX,
    STEM,
    files_from_index,
    find_weight_files,
    read_json,
)
from anyflow_deploy.checkpoints.weights import Weights, WeightsBase
from anyflow_deploy.errors import AnyFlowError, CheckpointError, unreadable
from anyflow_deploy.memory.parameter_shapes import parameter_shapes
from anyflow_deploy.models import MODELS, Architecture, architecture_from_config, model_name

__all__ = [
    "STEM",
    "Checkpoint",
    "missing_parts",
    "open_checkpoint",
    "open_transformer",
    "pipeline_folder",
    "read_json",
    "schedule_shift",
    "transformer_folder",
]

_log = logging.getLogger("anyflow.checkpoints")


@dataclass(frozen=True)
class Checkpoint(WeightsBase):
    """Weights on disk, with the architecture they belong to.

    Attributes:
        folder: holds config.json and the weights.
        architecture: from config.json.
        source: for the manifest.
        tensors: parameter name -> the file it is in and its place there.
    """

    folder: Path
    architecture: Architecture
    source: WeightsSource
    tensors: dict[str, tuple[Path, TensorEntry]] = field(repr=False)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return parameter name -> shape, from the files' headers."""
        return {name: entry.shape for name, (_, entry) in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """Read one parameter, on the CPU, in the type it is stored in."""
        path, entry = self.tensors[name]
        data = read_bytes(path, entry)
        return torch.frombuffer(data, dtype=CHECKPOINT_DTYPES[entry.type]).reshape(entry.shape)


def open_checkpoint(
    path: str | Path, source: WeightsSource | None = None, variant: str | None = None
) -> Checkpoint:
    """Open a pipeline folder, its transformer folder, or a file of weights.

    Args:
        path: the folder; a .safetensors file; or an index of shards (.safetensors.index.json).
        source: where it came from, when that is not the path itself.
        variant: of the files in a folder, such as "fp16".

    Raises:
        CheckpointError: no AnyFlow transformer there, pickled weights, LoRA weights, or broken
            shards; or it may not be read.
    """
    path = Path(path)
    origin = source or WeightsSource(kind="folder", location=str(path.resolve()), variant=variant)
    if stat.S_ISREG(_mode(path)):
        if variant is not None:
            raise CheckpointError(f"{path} is a file; --variant chooses one in a folder.")
        return _open_file(path, origin)
    folder = transformer_folder(path)
    config = read_json(folder / "config.json")
    architecture = architecture_from_config(config, str(folder / "config.json"))
    return open_transformer(folder, architecture, origin, variant)


def open_transformer(
    folder: Path, architecture: Architecture, source: WeightsSource, variant: str | None = None
) -> Checkpoint:
    """Open the weights in a transformer folder whose architecture is known.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    tensors = _read_headers(folder, find_weight_files(folder, variant))
    return Checkpoint(folder, architecture, source, tensors)


def _open_file(path: Path, source: WeightsSource) -> Checkpoint:
    """Open one file of weights, or the shards of an index."""
    if path.name.endswith(INDEX_SUFFIX):
        files = files_from_index(path)
    elif path.suffix == ".safetensors":
        files = [path]
    else:
        raise CheckpointError(
            f"{path} is not a checkpoint. Give a diffusers pipeline folder, its transformer/"
            " folder, or a .safetensors file of weights."
        )
    tensors = _read_headers(path, files)
    config = path.parent / "config.json"
    if _mode(config):
        architecture = architecture_from_config(read_json(config), str(config))
    else:
        architecture = _known_architecture(path, {n: e.shape for n, (_, e) in tensors.items()})
    return Checkpoint(path.parent, architecture, source, tensors)


def _known_architecture(path: Path, shapes: dict[str, tuple[int, ...]]) -> Architecture:
    """Return the architecture of a file without config.json, told by the shapes of its tensors."""
    for row in MODELS.values():
        if parameter_shapes(row.architecture) == shapes:
            _log.warning("%s has the shapes of %s, and is taken for one.", path, row.name)
            return row.architecture
    raise CheckpointError(
        f"{path} has no config.json beside it, and its tensors ({', '.join(sorted(shapes)[:3])}, …)"
        f" are of none of {', '.join(MODELS)}. Put the transformer's config.json beside it, with"
        " diffusers' names in the file."
    )


def _read_headers(place: Path, files: list[Path]) -> dict[str, tuple[Path, TensorEntry]]:
    """Read what the files of a checkpoint hold, under diffusers' names."""
    found = {name: (file, entry) for file in files for name, entry in read_header(file).items()}
    lora = [name for name in found if "lora" in name.lower()]
    if lora:
        raise CheckpointError(
            f"{place} holds LoRA weights ({lora[0]}, …). Merge them into the base model first"
            " (fuse_lora, save_pretrained)."
        )
    names, stripped = strip_prefixes(found)
    if stripped:
        _log.warning("%s: %s was stripped from the names of its tensors.", place, stripped)
    tensors = {names[name]: value for name, value in found.items()}
    unsupported = [
        f"{n} ({e.type})" for n, (_, e) in tensors.items() if e.type not in CHECKPOINT_DTYPES
    ]
    if unsupported:
        raise CheckpointError(
            f"{place} stores {unsupported[0]}; allowed types are {', '.join(CHECKPOINT_DTYPES)}."
        )
    return tensors


def transformer_folder(path: Path) -> Path:
    """Find the folder with the transformer's config.json.

    `path` is that folder, or the pipeline around it.

    Raises:
        CheckpointError: there is none, or it may not be read.
    """
    if not stat.S_ISDIR(_mode(path)):
        missing = "" if _mode(path) else " (nothing is there)"
        raise CheckpointError(
            f"{path} is not a folder{missing}. Give a diffusers pipeline folder, or its"
            " transformer/ folder."
        )
    if _mode(path / "model_index.json"):
        return path / "transformer"
    if _mode(path / "config.json"):
        return path
    try:
        names = sorted(p.name for p in path.iterdir())
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from None
    files = [name for name in names if name.endswith(".safetensors")]
    advice = f" For a file of weights give {path / files[0]}." if files else ""
    raise CheckpointError(
        f"{path} has neither model_index.json (a pipeline) nor config.json (a transformer). "
        f"It holds: {', '.join(names[:8]) or 'nothing'}.{advice}"
    )


def _mode(path: Path) -> int:
    try:
        return file_mode(path)
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from None


def pipeline_folder(path: Path) -> Path | None:
    """Find the pipeline around a checkpoint; None where there is only the transformer.

    Args:
        path: the pipeline, a folder in it, or a file in such a folder.
    """
    places = (path, path.parent, *([path.parent.parent] if path.is_file() else []))
    return next((p for p in places if (p / "model_index.json").is_file()), None)


def missing_parts(pipeline: Path | None, parts: Iterable[str]) -> list[str]:
    """Name the subfolders that a pipeline lacks: all of them where there is no pipeline."""
    return [part for part in parts if pipeline is None or not (pipeline / part).is_dir()]


def schedule_shift(weights: Weights) -> float:
    """Return the shift of the sampling schedule.

    It is the pipeline's where there is one, else that of the model's row, else the released models'
    5.
    """
    pipeline = (
        pipeline_folder(Path(weights.source.location)) if weights.source.kind == "folder" else None
    )
    path = pipeline / "scheduler" / "scheduler_config.json" if pipeline else None
    row = MODELS.get(model_name(weights.architecture))
    default = row.shift if row else 5.0
    shift = read_json(path).get("shift", default) if path and path.is_file() else default
    if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not shift > 0:
        raise AnyFlowError(
            f"{path} has shift {shift!r}; allowed is any positive number (the released models"
            " use 5)."
        )
    return float(shift)
