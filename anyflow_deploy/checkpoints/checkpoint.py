"""Find a checkpoint, and read its weights one tensor at a time.

A checkpoint is a folder in diffusers' layout: either a whole pipeline (`model_index.json`,
`transformer/`, …) or just the transformer (`config.json` and `diffusion_pytorch_model.safetensors`,
possibly in shards with an index). Only safetensors are read: `.bin` and `.pt` files are pickles,
and loading a pickle runs whatever program is inside.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from anyflow_deploy.bundle.manifest import WeightsSource
from anyflow_deploy.checkpoints.dtypes import CHECKPOINT_DTYPES
from anyflow_deploy.checkpoints.safetensors_stream import TensorEntry, read_bytes, read_header
from anyflow_deploy.checkpoints.weights import Weights, WeightsBase
from anyflow_deploy.errors import AnyFlowError, CheckpointError
from anyflow_deploy.models import MODELS, Architecture, architecture_from_config, model_name

STEM = "diffusion_pytorch_model"


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


def open_checkpoint(path: str | Path, source: WeightsSource | None = None) -> Checkpoint:
    """Open a pipeline folder or its transformer folder.

    Args:
        path: the folder.
        source: where it came from, when that is not the folder itself.

    Raises:
        CheckpointError: no AnyFlow transformer there, pickled weights, LoRA weights, or broken
            shards.
    """
    folder = transformer_folder(Path(path))
    config = read_json(folder / "config.json")
    architecture = architecture_from_config(config, str(folder / "config.json"))
    return open_transformer(
        folder,
        architecture,
        source or WeightsSource(kind="folder", location=str(Path(path).resolve())),
    )


def open_transformer(folder: Path, architecture: Architecture, source: WeightsSource) -> Checkpoint:
    """Open the weights in a transformer folder whose architecture is known.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    tensors = {
        name: (file, entry)
        for file in _weight_files(folder)
        for name, entry in read_header(file).items()
    }
    lora = [name for name in tensors if "lora" in name.lower()]
    if lora:
        raise CheckpointError(
            f"{folder} holds LoRA weights ({lora[0]}, …). Merge them into the base model first"
            " (fuse_lora, save_pretrained)."
        )
    unsupported = [
        f"{n} ({e.type})" for n, (_, e) in tensors.items() if e.type not in CHECKPOINT_DTYPES
    ]
    if unsupported:
        raise CheckpointError(
            f"{folder} stores {unsupported[0]}; allowed types are {', '.join(CHECKPOINT_DTYPES)}."
        )
    return Checkpoint(folder, architecture, source, tensors)


def transformer_folder(path: Path) -> Path:
    """Find the folder with the transformer's config.json.

    `path` is that folder, or the pipeline around it.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder. Give a diffusers pipeline folder, or its transformer/ folder."
        )
    if (path / "model_index.json").is_file():
        return path / "transformer"
    if (path / "config.json").is_file():
        return path
    raise CheckpointError(
        f"{path} has neither model_index.json (a pipeline) nor config.json (a transformer). "
        f"It holds: {', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'nothing'}."
    )


def pipeline_folder(path: Path) -> Path | None:
    """Find the pipeline around a checkpoint; None where there is only the transformer."""
    return next((p for p in (path, path.parent) if (p / "model_index.json").is_file()), None)


def missing_parts(pipeline: Path | None, parts: Iterable[str]) -> list[str]:
    """Name the subfolders that a pipeline lacks: all of them where there is no pipeline."""
    return [part for part in parts if pipeline is None or not (pipeline / part).is_dir()]


def _weight_files(folder: Path) -> list[Path]:
    index = folder / f"{STEM}.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map", {})
        if not isinstance(weight_map, dict) or not all(
            isinstance(n, str) for n in weight_map.values()
        ):
            raise CheckpointError(
                f"{index} is damaged: weight_map has to map parameters to file names. Download it"
                " again."
            )
        names = sorted(set(weight_map.values()))
        outside = [n for n in names if len(PurePosixPath(n).parts) != 1]
        if outside or not names:
            raise CheckpointError(
                f"{index} names {outside[0] if outside else 'no shards'}; shards lie beside their"
                " index."
            )
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of {len(names)} shards: {', '.join(missing)}."
                " Download them."
            )
        return [folder / n for n in names]
    single = folder / f"{STEM}.safetensors"
    if single.is_file():
        return [single]
    pickles = sorted(
        p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".ckpt"}
    )
    if pickles:
        raise CheckpointError(
            f"{folder} has only pickled weights ({', '.join(pickles)}), which are never loaded: a"
            " pickle is a program. Convert them where you trust them: pipe.save_pretrained(DIR,"
            " safe_serialization=True)."
        )
    raise CheckpointError(
        f"{folder} has no {single.name} (nor an index of shards). Download the weights."
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


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
