"""The causal cache in ONNX Runtime: one buffer of keys and one of values per layer.

The graphs take the cache as inputs of any length and give a chunk's own keys and values as outputs.
Both are bound to the same buffers by address: inputs to the piece from the start, outputs to the
piece right behind it. Nothing is copied, nothing grows, and the memory of a stream is known before
it starts (`CachePlan.bytes`). The text's keys and values are computed once, when the stream opens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.kv_cache import CachePlan
from anyflow_deploy.engines.onnxruntime.device import OrtDevice
from anyflow_deploy.engines.onnxruntime.run import OnnxRuntimeRun
from anyflow_deploy.engines.streaming import Positions, cache_tensor_names
from anyflow_deploy.errors import BackendError

_TYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
}


class OnnxRuntimeCache:
    """The `Cache` of one stream in ONNX Runtime's buffers.

    Args:
        device: of the buffers.
        sessions: of the graphs `text`, `chunk` and `compress`.
        manifest: of the bundle.
        text: prompt embeddings, float32 (1, L, D).
        plan: decides the size of the buffers.

    Raises:
        BackendError: the bundle's keys and values are of a type that ONNX Runtime's Python
            interface has no buffers for.
    """

    def __init__(
        self,
        device: OrtDevice,
        sessions: dict[str, Any],
        manifest: Manifest,
        text: Array,
        plan: CachePlan,
    ) -> None:
        dtype = {tensor.name: tensor.dtype for tensor in manifest.graphs["chunk"].outputs}["key.0"]
        if dtype not in _TYPES:
            raise BackendError(
                f"this backend keeps its cache in {' or '.join(_TYPES)}, not in {dtype}. Export in"
                " fp16."
            )
        self._device, self._sessions = device, sessions
        self._type = _TYPES[dtype]
        self._heads = (plan.heads, plan.channels)
        # Bytes of one token in a buffer
        self._token_bytes = plan.heads * plan.channels * self._type.itemsize
        self._names = cache_tensor_names(plan.layers)
        self._text_kv = self._encode_text(text)
        self._capacity = plan.capacity
        self._buffers = {name: self._allocate(plan.capacity) for name in self._names}
        self._empty = self._allocate(0)

    def run(self, latents: Array, positions: Positions, past: int) -> OnnxRuntimeRun:
        """Open a run of the graph `chunk` that sees the first `past` tokens."""
        inputs = {**self._text_kv, "positions": self._device.upload(positions)}
        bind = lambda binding: self._bind_past(binding, self._names, past)  # noqa: E731 - one call, handed on
        return OnnxRuntimeRun(self._device, self._sessions["chunk"], latents, inputs, bind)

    def write(
        self, graph: str, latents: Array, positions: Positions, past: int, tokens: int
    ) -> None:
        """Run `chunk` or `compress`, and store its keys and values behind `past` tokens."""
        inputs = {
            "latents": self._device.upload(latents),
            "positions": self._device.upload(positions),
        }
        if graph == "chunk":
            zero_times = self._device.upload(np.zeros(latents.shape[:2], np.float32))
            inputs |= {"t": zero_times, "r": zero_times}
        # The last layer of compress attends to nothing
        past_names = self._names if graph == "chunk" else self._names[:-2]
        binding = self._sessions[graph].io_binding()
        for name, value in {
            **inputs,
            **{f"text_{n}": self._text_kv[f"text_{n}"] for n in past_names},
        }.items():
            binding.bind_ortvalue_input(name, value)
        self._bind_past(binding, past_names, past)
        for name in self._names:
            address = self._buffers[name].data_ptr() + past * self._token_bytes
            binding.bind_output(
                name,
                self._device.name,
                self._device.index,
                self._type,
                (1, tokens, *self._heads),
                address,
            )
        self._sessions[graph].run_with_iobinding(binding)

    def move(self, to: int, start: int, tokens: int) -> None:
        """Move tokens within every buffer; source and destination may overlap."""
        for buffer in self._buffers.values():
            self._device.move(
                buffer,
                to * self._token_bytes,
                buffer,
                start * self._token_bytes,
                tokens * self._token_bytes,
            )

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens, and keep the contents."""
        for name, old in self._buffers.items():
            larger = self._allocate(capacity)
            self._device.move(larger, 0, old, 0, self._capacity * self._token_bytes)
            self._buffers[name] = larger
        self._capacity = capacity

    def close(self) -> None:
        """Release the buffers."""
        self._buffers = {}
        self._text_kv = {}

    def _encode_text(self, text: Array) -> dict[str, Any]:
        """Compute the text's keys and values in every layer."""
        names = [f"text_{name}" for name in self._names]
        binding = self._sessions["text"].io_binding()
        binding.bind_ortvalue_input("text", self._device.upload(text))
        for name in names:
            binding.bind_output(name, self._device.name, self._device.index)
        self._sessions["text"].run_with_iobinding(binding)
        return dict(zip(names, binding.get_outputs(), strict=True))

    def _allocate(self, tokens: int) -> Any:
        return self._device.empty((1, tokens, *self._heads), self._type)

    def _bind_past(self, binding: Any, names: list[str], tokens: int) -> None:
        shape = (1, tokens, *self._heads)
        for name in names:
            if tokens:
                address = self._buffers[name].data_ptr()
                binding.bind_input(
                    f"past_{name}",
                    self._device.name,
                    self._device.index,
                    self._type,
                    shape,
                    address,
                )
            else:
                binding.bind_ortvalue_input(f"past_{name}", self._empty)
