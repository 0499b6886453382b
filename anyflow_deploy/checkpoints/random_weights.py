"""Weights from a seed, for an architecture without a checkpoint.

`--random-weights` measures, profiles and tests everything but the picture. Values are drawn per
parameter from a generator seeded with the seed and the parameter's name, so any one of them can be
made without the others, twice.
"""

from __future__ import annotations

import hashlib
import math

import torch

from anyflow_deploy.bundle.manifest import WeightsSource
from anyflow_deploy.checkpoints.weights import WeightsBase
from anyflow_deploy.memory.parameter_shapes import parameter_shapes
from anyflow_deploy.models import Architecture


class RandomWeights(WeightsBase):
    """Seeded random weights in the place of a `Checkpoint`.

    Attributes:
        architecture: of the network.
        source: says that the weights are random.
    """

    def __init__(self, architecture: Architecture, name: str, seed: int = 0) -> None:
        self.architecture = architecture
        self.source = WeightsSource(kind="random", location=name, seed=seed)
        self._shapes = parameter_shapes(architecture)
        self._seed = seed

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return parameter name -> shape."""
        return dict(self._shapes)

    def read(self, name: str) -> torch.Tensor:
        """Draw one parameter, float32, on the CPU."""
        return random_parameter(name, self._shapes[name], self._seed)


def random_parameter(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Draw a parameter from a seed and its name: a float32 tensor of this shape.

    Norms are ones with a little noise; matrices are 1/sqrt(inputs) normals, so that activations
    neither vanish nor explode.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    values = torch.empty(shape, dtype=torch.float32).normal_(generator=generator)
    if "norm" in name and name.endswith("weight"):
        return 1.0 + 0.1 * values
    if len(shape) == 1:
        return 0.02 * values
    return values / math.sqrt(math.prod(shape[1:]) if "table" not in name else shape[-1])
