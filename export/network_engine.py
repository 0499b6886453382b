"""Stand-in until main's own arrives: our bidirectional network behind the `Engine` protocol."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import nn

from anyflow_deploy.engines.engine import checked_inputs
from anyflow_deploy.export.reference import TorchRun
from anyflow_deploy.export.transformer import FlowMapTransformer, constants
from anyflow_deploy.export.weights import Weights
from anyflow_deploy.ranges import Ranges, widest


class NetworkEngine:
    """See the module's text."""

    def __init__(self, weights: Weights, device: str = "cpu") -> None:
        self.architecture = weights.architecture
        network = FlowMapTransformer(self.architecture)
        network.load_state_dict({name: weights.read(name).float() for name in weights.shapes()}, assign=True)
        for name, value in constants(self.architecture).items():
            network.get_buffer(name).copy_(value)
        self.network: nn.Module = network.to(device).eval()
        self._device = device

    @property
    def description(self) -> str:
        """See `Engine`."""
        return "PyTorch"

    @property
    def ranges(self) -> Ranges:
        """See `Engine`."""
        return widest(self.architecture)

    def start(self, latents: ArrayLike, text: ArrayLike) -> TorchRun:
        """See `Engine`."""
        z, words = checked_inputs(self.ranges, self.architecture.in_channels, self.architecture.text_dim, latents, text)

        def model(z: Any, t: Any, r: Any, text: Any, return_dict: bool) -> Any:
            with torch.no_grad():
                return (self.network(z, t, r, text)[1],)

        return TorchRun(model, self._device, z, words)

    def close(self) -> None:
        """See `Engine`."""
