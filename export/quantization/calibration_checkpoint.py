"""The checkpoint of a calibration: maxima, and the rollouts they come from.

It is a safetensors file beside the output, replaced atomically after each rollout, so a calibration
that is killed at any moment loses at most one rollout. Its header holds the settings; a file of
other settings is not used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from anyflow_deploy.bundle.atomic_io import write_bytes_atomically

Maxima = dict[str, torch.Tensor]
"""Tensor name -> largest absolute values, float32: one, or one for each channel."""


class CalibrationCheckpoint:
    """The checkpoint file of one calibration; without a path nothing is written.

    Attributes:
        maxima: of the finished rollouts.
        finished_rollouts: their names.
        history: after each finished batch of rollouts, the largest value of every tensor so far.
        note: why a file on disk could not be used; "" where there is none.
    """

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self._path = path
        self._key = json.dumps(key, sort_keys=True)
        self.maxima: Maxima = {}
        self.finished_rollouts: set[str] = set()
        self.history: list[dict[str, float]] = []
        self.note = ""
        if path is not None and path.exists():
            self._read(path)

    def save(self, rollout: str, maxima: Maxima, ends_batch: bool) -> None:
        """Add a finished rollout, and write the file."""
        self.maxima = maxima
        self.finished_rollouts.add(rollout)
        if ends_batch:
            self.history.append({name: float(values.max()) for name, values in maxima.items()})
        if self._path is None:
            return
        done = json.dumps(sorted(self.finished_rollouts))
        header = {"key": self._key, "done": done, "history": json.dumps(self.history)}
        write_bytes_atomically(self._path, save(maxima, header))

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
                # Read first: without it the rest of the file is not used
                finished_rollouts = set(json.loads(metadata["done"]))
                history = json.loads(metadata["history"])
                self.maxima = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                self.finished_rollouts = finished_rollouts
                self.history = history
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            self.note = f"{path} cannot be read ({error}), and was not used; it will be replaced."
