"""Logs a run: a line of progress, `losses.jsonl`, TensorBoard, and wandb if requested.

`losses.jsonl` has one line a step, with full precision. It is cut back to the checkpoint when a run
resumes, so it has one line for each step that counts, however often the run was killed.
"""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from anyflow_deploy.bundle.atomic_io import write_text_atomically


class MetricsLogger:
    """The logs of a run; only the first process writes any.

    Args:
        output: the run's folder.
        name: of the recipe.
        first_step, steps: of the run: the current step, and the last.
        enabled: False for the other processes.
        wandb: name of a wandb project; None for none.
        settings: of the run, for wandb.
    """

    def __init__(
        self,
        output: Path,
        name: str,
        first_step: int,
        steps: int,
        enabled: bool,
        wandb: str | None,
        settings: dict[str, Any],
    ) -> None:
        self._enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        self._wandb = _wandb_run(wandb, output, name, settings) if wandb else None
        self._board = SummaryWriter(str(output / "tensorboard"), purge_step=first_step + 1)
        path = output / "losses.jsonl"
        lines = (
            [
                line
                for line in path.read_text().splitlines(keepends=True)
                if _step_of(line) <= first_step
            ]
            if path.exists()
            else []
        )
        write_text_atomically(path, "".join(lines))
        self._file = path.open("a")
        columns = (
            TextColumn("{task.description}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task(name, total=steps, completed=first_step, state="")
        self._progress.start()

    def step(self, step: int, values: dict[str, float], samples: int, seconds: float) -> None:
        """Log one optimizer step."""
        if not self._enabled:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        speed = samples / max(seconds, 1e-9)
        memory = peak_memory() / 2**30
        for key, value in {**values, "samples_per_second": speed, "memory_gib": memory}.items():
            self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(
                {**values, "samples_per_second": speed, "memory_gib": memory}, step=step
            )
        state = f"loss {values['loss']:.4g}  {speed:.3g} samples/s  {memory:.1f} GiB"
        self._progress.update(self._task, completed=step, state=state)

    def log_image(self, step: int, path: Path) -> None:
        """Log a sample grid."""
        if not self._enabled:
            return
        from matplotlib import pyplot

        self._board.add_image("samples", pyplot.imread(path)[..., :3], step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({"samples": wandb.Image(str(path))}, step=step)

    def log(self, text: str) -> None:
        """Print a line above the progress."""
        if self._enabled:
            self._progress.console.print(text)

    def close(self) -> None:
        """Stop the progress, and write buffered data."""
        if not self._enabled:
            return
        self._progress.stop()
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def peak_memory() -> int:
    """Return this process's peak memory in bytes: the GPU's if there is one, else main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if os.uname().sysname == "Darwin" else 1024
    )


def clock() -> float:
    """Return a time in seconds, for differences."""
    return time.perf_counter()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the last line of a run that was killed
        return float("inf")


def _wandb_run(project: str, output: Path, name: str, settings: dict[str, Any]) -> Any:
    import wandb

    return wandb.init(project=project, name=name, dir=str(output), config=settings, resume="allow")
