"""What an unfinished calibration has seen: maxima, and the names of the rollouts they come from.

A safetensors file beside the output, written anew after each rollout and renamed into place, so
that a calibration which is killed at any moment loses at most one rollout. Its header holds the
settings; a file of other settings is put aside.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from anyflow_deploy.bundle.atomic_io import atomic_file

Maxima = dict[str, torch.Tensor]
"""Tensor name -> largest absolute values, float32: one, or one for each channel."""


class CalibrationCheckpoint:
    """The file of one calibration; without a path nothing is kept.

    Attributes:
        maxima: what the finished rollouts saw.
        done: their names.
        note: what was found on disk and could not be used, in words; "" when there is nothing to
            say.
    """

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self._path = path
        self._key = json.dumps(key, sort_keys=True)
        self.maxima: Maxima = {}
        self.done: set[str] = set()
        self.note = ""
        if path is not None and path.exists():
            self._read(path)

    def save(self, rollout: str, maxima: Maxima) -> None:
        """Enter a finished rollout."""
        self.maxima = maxima
        self.done.add(rollout)
        if self._path is None:
            return
        with atomic_file(self._path) as partial:
            save_file(maxima, partial, {"key": self._key, "done": json.dumps(sorted(self.done))})

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self._key:
                    self.note = (
                        f"{path} is of other weights, prompts or sizes, and was not used; it will"
                        " be replaced."
                    )
                    return
                # Read this first: without it, nothing of the file counts.
                done = set(json.loads(metadata["done"]))
                self.maxima = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                self.done = done
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            self.note = f"{path} cannot be read ({error}), and was not used; it will be replaced."
