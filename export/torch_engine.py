"""Our own torch module as an engine, in eager PyTorch and float32.

It is the reference for causal models, and the network that calibration and sensitivity run. For
bidirectional models validation uses diffusers' class instead (`diffusers_engine`), so that a
mistake in our module shows. For causal ones diffusers' class is wrong by percents, and this module
is tested against the authors' own results (tests/golden/causal).
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from anyflow_deploy.checkpoints.weights import Weights
from anyflow_deploy.engines.engine import Array, prepare_inputs, prepare_text
from anyflow_deploy.engines.kv_cache import CachePlan
from anyflow_deploy.engines.streaming import CacheStream, Positions, cache_tensor_names
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.export.torch_run import TorchRun, move_to_device
from anyflow_deploy.model.causal import ChunkCompressor, ChunkTransition, TextKVEncoder
from anyflow_deploy.model.transformer import FlowMapTransformer, constants
from anyflow_deploy.models import Architecture
from anyflow_deploy.shape_ranges import ShapeRanges, widest_ranges


def network_from_weights(weights: Weights) -> FlowMapTransformer:
    """Build the torch module of a model with its weights, float32.

    It is a `ChunkTransition` for a causal model, else a `FlowMapTransformer`.
    """
    with torch.device("meta"):
        network = (ChunkTransition if weights.architecture.causal else FlowMapTransformer)(
            weights.architecture
        )
    network.load_state_dict(
        {name: weights.read(name).float() for name in weights.shapes()}, assign=True
    )
    for name, value in constants(weights.architecture).items():
        module, _, buffer = name.rpartition(".")
        setattr(network.get_submodule(module), buffer, value)
    return network.requires_grad_(False)


class TorchEngine:
    """An `Engine` that runs our torch module, float32.

    Args:
        weights: a checkpoint, or random weights.
        device: torch device.

    Attributes:
        network: the module. A change of its weights in place changes the engine's results.

    Raises:
        BackendError: torch cannot use the device.
    """

    def __init__(self, weights: Weights, device: str = "cpu") -> None:
        self.architecture: Architecture = weights.architecture
        self._device = device
        self.network = move_to_device(network_from_weights(weights), device)

    @property
    def description(self) -> str:
        """torch's version and the device, for people and reports."""
        return f"PyTorch {torch.__version__.split('+')[0]}, {self._device}, float32"

    @property
    def ranges(self) -> ShapeRanges:
        """The shapes it accepts: all that the network allows."""
        return widest_ranges(self.architecture)

    def start(self, latents: ArrayLike, text: ArrayLike) -> TorchRun:
        """Open a run at latents (B, F, C, H, W) for text (B, L, D)."""
        if self.architecture.causal:
            raise AnyFlowError(
                "this is a causal model, which generates chunk by chunk: use stream(), not"
                " sample()."
            )
        z, prompt_embeds = prepare_inputs(
            self.ranges, self.architecture.in_channels, self.architecture.text_dim, latents, text
        )
        network = self.network
        prompt_tensor = torch.from_numpy(prompt_embeds).to(self._device)
        return TorchRun(lambda state, t, r: network(state, t, r, prompt_tensor)[1], z, self._device)

    def open_stream(self, text: ArrayLike, plan: CachePlan) -> CacheStream:
        """Open a stream for text (1, L, D), with room for `plan.capacity` tokens."""
        return self.open_streams(prepare_text(self.ranges, self.architecture.text_dim, text), plan)

    def open_streams(self, text: Array, plan: CachePlan) -> CacheStream:
        """Open streams that advance together, one for each text of (B, L, D), float32.

        Latents are then (B, F, C, H, W), and the cache takes B times as much memory.
        """
        if not isinstance(self.network, ChunkTransition):
            raise AnyFlowError("this is a bidirectional model: use sample(), not stream().")
        return CacheStream(TorchKVCache(self.network, self._device, text, plan), plan)

    def close(self) -> None:
        """Release the network."""
        self.network.to("meta")


class TorchKVCache:
    """The `Cache` of a stream, or of several that advance together, in torch tensors.

    One network serves as all three modules, since they differ in nothing but `forward`.
    """

    def __init__(self, network: ChunkTransition, device: str, text: Array, plan: CachePlan) -> None:
        self._network = network
        self._device = device
        with torch.no_grad():
            prompt_embeds = torch.from_numpy(text).to(device)
            self._text_keys_values = TextKVEncoder.forward(network, prompt_embeds)  # type: ignore[arg-type]
        self._shape = (plan.heads, plan.channels)
        self._buffers = [
            torch.zeros(len(text), plan.capacity, *self._shape, device=device)
            for _ in cache_tensor_names(plan.layers)
        ]

    def run(self, latents: Array, positions: Positions, past: int) -> TorchRun:
        """Open a run of the chunk's graph that sees the first `past` tokens."""
        network = self._network
        position_ids = torch.from_numpy(positions).to(self._device)
        return TorchRun(
            lambda z, t, r: network(z, t, r, position_ids, *self._cached_inputs(past))[1],
            latents,
            self._device,
        )

    @torch.no_grad()
    def write(
        self, graph: str, latents: Array, positions: Positions, past: int, tokens: int
    ) -> None:
        """Run `chunk` or `compress`, and store its keys and values behind `past` tokens."""
        z = torch.from_numpy(latents).to(self._device)
        position_ids = torch.from_numpy(positions).to(self._device)
        if graph == "chunk":
            zero_times = z.new_zeros(z.shape[:2])
            kv_inputs = self._cached_inputs(past)
            new_kv = self._network(z, zero_times, zero_times, position_ids, *kv_inputs)[2:]
        else:  # its last layer attends to nothing
            network: Any = self._network  # not a ChunkCompressor, but has all that forward uses
            text = self._text_keys_values[:-2]
            past_kv = [buffer[:, :past] for buffer in self._buffers[:-2]]
            new_kv = ChunkCompressor.forward(network, z, position_ids, *text, *past_kv)
        for buffer, values in zip(self._buffers, new_kv, strict=True):
            buffer[:, past : past + tokens] = values

    def move(self, to: int, start: int, tokens: int) -> None:
        """Move tokens within every buffer; source and destination may overlap."""
        for buffer in self._buffers:
            buffer[:, to : to + tokens] = buffer[:, start : start + tokens].clone()

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens, and keep the contents."""
        extra = capacity - self._buffers[0].shape[1]
        self._buffers = [
            torch.cat((b, b.new_zeros(len(b), extra, *self._shape)), 1) for b in self._buffers
        ]

    def close(self) -> None:
        """Release the buffers."""
        self._buffers.clear()
        self._text_keys_values = ()

    def _cached_inputs(self, past: int) -> tuple[Tensor, ...]:
        return (*self._text_keys_values, *(buffer[:, :past] for buffer in self._buffers))
