"""Trains one small module to its last step, and resumes from its last checkpoint.

The loop for a VAE or a text encoder: AdamW, warm-up and a cosine to zero, one checkpoint. The
transformers have the trainer of this project.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from anyflow_deploy.bundle.atomic_io import write_bytes_atomically
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.progress import Progress
from anyflow_deploy.training.config import OptimizerConfig
from anyflow_deploy.training.optimizer import learning_rate

_WARM_UP = 50


@dataclass(frozen=True)
class ModuleRun:
    """The settings of one run.

    Attributes:
        name: for the progress display and messages.
        steps: of the optimizer.
        learning_rate: at its highest.
        checkpoint: file that the run is saved to, and resumed from.
        checkpoint_every: steps between two.
        ema: decay of the moving average of the weights, which is the result.
    """

    name: str
    steps: int
    learning_rate: float
    checkpoint: Path
    checkpoint_every: int = 200
    ema: float = 0.995


def train_module(
    module: nn.Module, run: ModuleRun, loss_of_step: Callable[[int], Tensor], progress: Progress
) -> list[float]:
    """Train a module in place; afterwards it has the moving average of its weights.

    Args:
        module: with its initial weights.
        run: the settings.
        loss_of_step: computes the loss of a step, from 0; a function of the step alone.
        progress: shows the steps.

    Returns:
        The losses of this call's steps.

    Raises:
        AnyFlowError: the loss is not finite, or the checkpoint belongs to another module.
    """
    names, parameters = (list(part) for part in zip(*module.named_parameters(), strict=True))
    optimizer = torch.optim.AdamW(
        parameters, lr=run.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    for parameter in parameters:  # a checkpoint is loaded into these tensors
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        parameter.grad = torch.zeros_like(parameter)  # every parameter has every step
    average = [parameter.detach().clone() for parameter in parameters]
    tensors = {f"weight.{n}": p.detach() for n, p in zip(names, parameters, strict=True)}
    tensors |= {f"average.{n}": a for n, a in zip(names, average, strict=True)}
    for name, parameter in zip(names, parameters, strict=True):
        state = optimizer.state[parameter]
        tensors |= {f"{key}.{name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    start = _load(run, tensors)
    for parameter in parameters:
        optimizer.state[parameter]["step"].fill_(start)
    schedule = OptimizerConfig(
        run.steps, batch=1, learning_rate=run.learning_rate, warm_up=_WARM_UP, final_rate=0.0
    )
    losses: list[float] = []
    with progress.stage(run.name, run.steps) as advance:
        advance(start)
        for step in range(start, run.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(schedule, step)
            loss = loss_of_step(step)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise AnyFlowError(
                    f"{run.name}: the loss of step {step} is {losses[-1]}. Lower the learning rate"
                    f" ({run.learning_rate}); {run.checkpoint} is as it was."
                )
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            decay = min(run.ema, (1 + step) / (10 + step))
            for value, parameter in zip(average, parameters, strict=True):
                value.lerp_(parameter.detach(), 1.0 - decay)
            if (step + 1) % run.checkpoint_every == 0 or step + 1 == run.steps:
                _save(run, tensors, step + 1)
            advance(1)
    with torch.no_grad():
        for value, parameter in zip(average, parameters, strict=True):
            parameter.copy_(value)
    return losses


def _save(run: ModuleRun, tensors: dict[str, Tensor], step: int) -> None:
    run.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    content = safetensors.torch.save(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        metadata={"run": json.dumps({"step": step, "steps": run.steps})},
    )
    write_bytes_atomically(run.checkpoint, content)


def _load(run: ModuleRun, tensors: dict[str, Tensor]) -> int:
    """Load the checkpoint, if there is one, and return the number of steps it has."""
    if not run.checkpoint.is_file():
        return 0
    with safe_open(run.checkpoint, "pt") as file:
        state = json.loads((file.metadata() or {}).get("run", "{}"))
        if set(file.keys()) != set(tensors) or state.get("steps") != run.steps:
            raise AnyFlowError(
                f"{run.checkpoint} belongs to another run. Remove it, or choose another folder."
            )
        for name, tensor in tensors.items():
            tensor.copy_(file.get_tensor(name))
    return int(state["step"])
