"""Checkpoints of a run: written atomically, and read on any number of processes, without a pickle.

    OUTPUT/checkpoints/step-00000250/
        *.safetensors      weights, optimizer and averages, a file per process
                           (torch.distributed.checkpoint as safetensors)
        state.json         step, recipe, data position, running means, and other counts

Each process writes its FSDP pieces, and any number of processes can read them. A checkpoint is
written under a hidden name and renamed when every file is on the disk, so a checkpoint with its
final name is complete. There is no state of random generators: every draw is a function of seed and
step (see `timestep_sampling`).
"""

from __future__ import annotations

import json
import shutil
import warnings
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from anyflow_deploy.bundle.renames import fsync_tree, replace_folder
from anyflow_deploy.errors import CheckpointError
from anyflow_deploy.training.distributed import DistributedContext

warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
)
"""Runs of one process do not use torch.distributed on purpose."""

STATE = "state.json"
VERSION = 1


@dataclass
class PendingCheckpoint:
    """A checkpoint that is being written."""

    partial: Path
    path: Path
    future: Future[Any] | None


class CheckpointManager:
    """The checkpoints of one run.

    Args:
        folder: `OUTPUT/checkpoints`; created where missing.
        world: the processes that write together.
        keep: how many to keep; the oldest are deleted first.
        asynchronous: return from `save` once tensors are copied, and write in the background.
    """

    def __init__(
        self, folder: Path, world: DistributedContext, keep: int, asynchronous: bool
    ) -> None:
        self._folder = folder
        self._world = world
        self._keep = keep
        self._asynchronous = asynchronous
        self._pending: PendingCheckpoint | None = None
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for partial in folder.glob(".step-*"):  # of a run that was killed
                shutil.rmtree(partial, ignore_errors=True)
        world.barrier()

    def latest(self) -> Path | None:
        """Return the last complete checkpoint, or None."""
        folders = self._folder.glob("step-*")
        checkpoints = sorted(path for path in folders if (path / STATE).is_file())
        return checkpoints[-1] if checkpoints else None

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint; every process calls it with its pieces, and the same state."""
        self.finish()
        path = self._folder / f"step-{step:08d}"
        partial = self._folder / f".step-{step:08d}.partial"
        if self._world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            (partial / STATE).write_text(
                json.dumps({"version": VERSION, "step": step, **state}, indent=1)
            )
        self._world.barrier()
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        is_single = self._world.size == 1
        if self._asynchronous:
            group = self._world.writers
            future = async_save(
                dict(tensors), storage_writer=writer, process_group=group, no_dist=is_single
            )
            self._pending = PendingCheckpoint(partial, path, cast("Future[Any]", future))
        else:
            save(dict(tensors), storage_writer=writer, no_dist=is_single)
            self._pending = PendingCheckpoint(partial, path, None)
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and give it its name."""
        if self._pending is None:
            return
        pending = self._pending
        self._pending = None
        if pending.future is not None:
            pending.future.result()
        self._world.barrier()
        if self._world.is_main:
            fsync_tree(pending.partial)
            replace_folder(pending.partial, pending.path)
            for old in sorted(self._folder.glob("step-*"))[: -self._keep]:
                shutil.rmtree(old, ignore_errors=True)
        self._world.barrier()

    def poll(self) -> None:
        """Give a finished checkpoint its name.

        Call it repeatedly, on every process at the same step.
        """
        if self._pending is not None and self._pending.future is not None:
            finished_count = self._world.sum(_flag(self._world, self._pending.future.done()))
            if int(finished_count) == self._world.size:
                self.finish()

    def load(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Read a checkpoint into these tensors, in place.

        Raises:
            CheckpointError: files are missing or damaged, or hold other tensors.
        """
        reader = HuggingFaceStorageReader(str(path))
        try:
            load(dict(tensors), storage_reader=reader, no_dist=self._world.size == 1)
        except (Exception, CheckpointException) as error:  # noqa: BLE001  (torch's own has no common base)
            cause = str(error).strip().splitlines()
            raise CheckpointError(
                f"{path} cannot be read into this run"
                f" ({cause[-1] if cause else type(error).__name__}). It is damaged or of another"
                " recipe: remove it to resume from the one before."
            ) from None


def read_state(path: Path) -> dict[str, Any]:
    """Read the state.json of a checkpoint.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    try:
        state = json.loads((path / STATE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path / STATE} cannot be read: {error}. Remove {path} to resume from the one before."
        ) from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise CheckpointError(
            f"{path} was written by another version of anyflow_deploy. Resume it with that version."
        )
    return state


def _flag(world: DistributedContext, value: bool) -> Tensor:
    return torch.tensor(int(value), device=world.device)
