"""The state of a network in training: its optimizer, and the moving average of its weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from anyflow_deploy.training.config import OptimizerConfig
from anyflow_deploy.training.model.model_factory import gather_tensor, trained_parameters
from anyflow_deploy.training.model.network import TrainingTransformer


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Return the learning rate of a step, from 0: a warm-up, then a cosine to the final rate."""
    warm_up = min(1.0, (step + 1) / max(1, config.warm_up))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.steps)))
    return config.learning_rate * warm_up * (config.final_rate + (1 - config.final_rate) * cosine)


class OptimizerState:
    """A network in training, its optimizer, and the moving average of its weights.

    Args:
        network: from `model_factory.build_trained_network`.
        config: rates, clipping, averaging.
        use_average: keep a moving average.

    Attributes:
        network: the module.
        parameters: the trained ones, by name.
        average: their moving average; empty without one.
        steps: number of updates.
    """

    def __init__(
        self, network: TrainingTransformer, config: OptimizerConfig, use_average: bool = True
    ) -> None:
        self.network = network
        self.config = config
        self.parameters = trained_parameters(network)
        self.average = (
            {name: p.detach().clone() for name, p in self.parameters.items()} if use_average else {}
        )
        self.steps = 0
        self._optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )
        for parameter in self.parameters.values():  # a checkpoint is loaded into these tensors
            self._optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def clip_gradients(self) -> float:
        """Clip all gradients together to the recipe's largest norm, and return their norm.

        Every process has to call it.
        """
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.clip)
        return float(gather_tensor(norm))

    def update(self) -> None:
        """Run one step of the optimizer and of the moving average, and clear the gradients."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.steps)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        if self.average:
            with torch.no_grad():
                decay = self.config.ema if self.steps > self.config.ema_start else 0.0
                for name, parameter in self.parameters.items():
                    self.average[name].lerp_(parameter.detach(), 1.0 - decay)

    def clear_gradients(self) -> None:
        """Drop the accumulated gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor of a checkpoint, by name; loading writes into the same tensors."""
        result: dict[str, Tensor] = {
            f"average.{name}": value for name, value in self.average.items()
        }
        for name, parameter in self.parameters.items():
            state = self._optimizer.state[parameter]
            result |= {
                f"weight.{name}": parameter.detach(),
                f"exp_avg.{name}": cast(Tensor, state["exp_avg"]),
                f"exp_avg_sq.{name}": cast(Tensor, state["exp_avg_sq"]),
            }
        return result

    def state(self) -> dict[str, object]:
        """Return the counts of a checkpoint, as JSON values.

        A parameter that had no gradient in some step has fewer updates.
        """
        counts = [
            int(self._optimizer.state[parameter]["step"]) for parameter in self.parameters.values()
        ]
        return {"steps": self.steps, "updates": counts}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the counts, after the tensors were loaded."""
        self.steps = int(state["steps"])
        for parameter, count in zip(self.parameters.values(), state["updates"], strict=True):
            self._optimizer.state[parameter]["step"] = torch.tensor(float(count))

    @contextlib.contextmanager
    @torch.no_grad()
    def use_average(self) -> Iterator[None]:
        """Put the moving average into the network until the block ends."""
        backup = (
            {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
            if self.average
            else {}
        )
        for name, value in self.average.items():
            self.parameters[name].copy_(value)
        try:
            yield
        finally:
            for name, value in backup.items():
                self.parameters[name].copy_(value)
