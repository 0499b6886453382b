"""The causal cache for compiled torch graphs: one buffer of keys and one of values per layer.

Graphs read the piece from the start, without a copy, and a finished chunk's own keys and values are
written right behind it. The text's are computed once, when the stream opens. Everything stays on
the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from anyflow_deploy.engines.aotinductor.compiled_graph import CompiledGraph
from anyflow_deploy.engines.aotinductor.run import AotInductorRun, disable_tf32
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.kv_cache import CachePlan
from anyflow_deploy.engines.streaming import Positions, cache_tensor_names

if TYPE_CHECKING:
    from torch import Tensor


class AotInductorCache:
    """The `Cache` of one stream in torch tensors.

    Args:
        torch: the module.
        graphs: `text`, `chunk` and `compress`.
        device: torch's name of it.
        text: prompt embeddings, float32 (1, L, D).
        plan: decides the size of the buffers.
    """

    def __init__(
        self,
        torch: Any,
        graphs: Mapping[str, CompiledGraph],
        device: str,
        text: Array,
        plan: CachePlan,
    ) -> None:
        self._torch = torch
        self._graphs = graphs
        self._device = device
        self._shape = (plan.heads, plan.channels)
        self._text_kv = self._run("text", torch.from_numpy(text))
        self._buffers = [self._allocate(plan.capacity) for _ in cache_tensor_names(plan.layers)]

    def run(self, latents: Array, positions: Positions, past: int) -> AotInductorRun:
        """Open a run of the graph `chunk` that sees the first `past` tokens."""
        chunk = self._graphs["chunk"]
        past_kv = (
            self._to_device(positions),
            *self._text_kv,
            *self._past(past),
        )
        return AotInductorRun(
            self._torch, lambda z, t, r: chunk(z, t, r, *past_kv), latents, self._device
        )

    def write(
        self, graph: str, latents: Array, positions: Positions, past: int, tokens: int
    ) -> None:
        """Run `chunk` or `compress`, and store its keys and values behind `past` tokens."""
        z = self._to_device(latents)
        frame_positions = self._to_device(positions)
        past_kv = self._past(past)
        if graph == "chunk":
            zero_times = z.new_zeros(z.shape[:2])
            new_kv = self._run(
                graph, z, zero_times, zero_times, frame_positions, *self._text_kv, *past_kv
            )[2:]
        else:  # its last layer attends to nothing
            new_kv = self._run(graph, z, frame_positions, *self._text_kv[:-2], *past_kv[:-2])
        for buffer, values in zip(self._buffers, new_kv, strict=True):
            buffer[:, past : past + tokens].copy_(values)

    def move(self, to: int, start: int, tokens: int) -> None:
        """Move tokens within every buffer.

        Source and destination may overlap, so each piece is copied aside first.
        """
        for buffer in self._buffers:
            buffer[:, to : to + tokens].copy_(buffer[:, start : start + tokens].clone())

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens, and keep the contents."""
        for index, old in enumerate(self._buffers):
            larger = self._allocate(capacity)
            larger[:, : old.shape[1]].copy_(old)
            self._buffers[index] = larger

    def close(self) -> None:
        """Release the buffers."""
        self._buffers = []
        self._text_kv = []

    def _run(self, graph: str, *inputs: Tensor) -> Sequence[Tensor]:
        with disable_tf32(self._torch, self._device):
            return self._graphs[graph](*(tensor.to(self._device) for tensor in inputs))

    def _to_device(self, array: Any) -> Tensor:
        tensor: Tensor = self._torch.from_numpy(array).to(self._device)
        return tensor

    def _allocate(self, tokens: int) -> Tensor:
        buffer: Tensor = self._text_kv[0].new_zeros((1, tokens, *self._shape))
        return buffer

    def _past(self, tokens: int) -> list[Tensor]:
        """Return a view of the first tokens of each buffer."""
        heads, channels = self._shape
        return [
            buffer.view(-1)[: tokens * heads * channels].view(1, tokens, heads, channels)
            for buffer in self._buffers
        ]
