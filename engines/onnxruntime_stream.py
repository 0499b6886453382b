"""The causal cache in ONNX Runtime: one buffer per layer for keys and one for values, written in place.

The graphs take the cache as inputs of any length and give a chunk's own keys and values as outputs. Both are bound to
the same buffers by address: inputs to the piece from the start, outputs to the piece right behind it. Nothing is copied,
nothing grows, and the memory of a stream is known before it starts (`CachePlan.bytes`).
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from anyflow_deploy.engines.cache import CachePlan
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.onnxruntime_engine import Device, OnnxRuntimeRun
from anyflow_deploy.errors import AnyFlowError, BackendError
from anyflow_deploy.manifest import Manifest

_TYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16)}


class OnnxRuntimeStream:
    """See `Stream`.

    Args:
        device: where the buffers lie.
        sessions: of the graphs `chunk` and `compress`.
        manifest: of the bundle.
        text: prompt embeddings, float32 (1, L, D).
        plan: what is kept, and where.
    """

    def __init__(self, device: Device, sessions: dict[str, Any], manifest: Manifest, text: Array, plan: CachePlan) -> None:
        stored = {tensor.name: tensor.dtype for tensor in manifest.graphs["chunk"].outputs}["key.0"]
        if stored not in _TYPES:
            raise BackendError(f"this backend keeps its cache in {' or '.join(_TYPES)}, not in {stored}. Export in fp16.")
        self._device, self._sessions, self._plan = device, sessions, plan
        self._type = _TYPES[stored]
        self._token = plan.heads * plan.channels * self._type.itemsize  # bytes of one token in a buffer
        self._names = [f"{part}.{layer}" for layer in range(plan.layers) for part in ("key", "value")]
        self._buffers, self._capacity = self._allocated(plan), plan.capacity
        self._text = device.holding(text)
        self._chunk = self._compressed = 0
        self._recent: deque[tuple[int, Array]] = deque()
        self._kept: list[int] = []

    def start(self, latents: Array) -> OnnxRuntimeRun:
        """See `Stream`."""
        self._check(latents)
        tokens = sum(self._plan.cached_tokens(self._chunk))
        return OnnxRuntimeRun(
            self._device,
            self._sessions["chunk"],
            latents,
            {"text": self._text, "positions": self._positions(self._chunk)},
            lambda binding: self._bind_past(binding, self._names, tokens),
        )

    def remember(self, latents: Array) -> None:
        """See `Stream`."""
        self._check(latents)
        self._recent.append((self._chunk, latents))
        pending = [self._recent[-1]]
        if len(self._recent) > self._plan.recent:
            self._compress(*self._recent.popleft())
            pending = list(self._recent)  # what precedes them has changed
        filled = self._compressed + sum(self._full_tokens(chunk) for chunk, _ in list(self._recent)[: -len(pending)])
        for chunk, clean in pending:
            still = self._device.holding(np.zeros(clean.shape[:2], np.float32))
            inputs = {"latents": self._device.holding(clean), "t": still, "r": still}
            self._write("chunk", chunk, inputs, self._names, filled, self._full_tokens(chunk))
            filled += self._full_tokens(chunk)
        self._chunk += 1

    def extend(self, plan: CachePlan) -> None:
        """See `Stream`."""
        if plan.chunks[: self._chunk] != self._plan.chunks[: self._chunk]:
            raise AnyFlowError(f"the plan {list(plan.chunks)} changes chunks that are made already: {list(self._plan.chunks)}.")
        if plan.capacity > self._capacity:
            larger = self._allocated(plan)
            for name, buffer in self._buffers.items():
                self._device.move(larger[name], 0, buffer, 0, self._capacity * self._token)
            self._buffers, self._capacity = larger, plan.capacity
        self._plan = plan

    def _allocated(self, plan: CachePlan) -> dict[str, Any]:
        shape = (1, plan.capacity, plan.heads, plan.channels)
        return {name: self._device.empty(shape, self._type) for name in self._names} if plan.capacity else {}

    def close(self) -> None:
        """See `Stream`."""
        self._buffers, self._text = {}, None
        self._recent.clear()

    def _compress(self, chunk: int, clean: Array) -> None:
        """Append an old chunk to the compressed part, for good; what the window lets go of makes room first."""
        self._forget(set(self._plan.kept(chunk + 1 + self._plan.recent)))
        self._kept.append(chunk)
        tokens = self._compressed_tokens(chunk)
        past = self._names[:-2]  # the last layer only makes its own
        self._write("compress", chunk, {"latents": self._device.holding(clean)}, past, self._compressed, tokens)
        self._compressed += tokens

    def _forget(self, kept: set[int]) -> None:
        """Close the gaps of compressed chunks outside the window. Their order does not matter, but their place does."""
        for chunk in [c for c in self._kept if c not in kept]:
            before = sum(self._compressed_tokens(c) for c in self._kept[: self._kept.index(chunk)])
            gap = self._compressed_tokens(chunk)
            for name in self._names:
                behind = self._compressed - before - gap
                buffer = self._buffers[name]
                self._device.move(buffer, before * self._token, buffer, (before + gap) * self._token, behind * self._token)
            self._kept.remove(chunk)
            self._compressed -= gap

    def _compressed_tokens(self, chunk: int) -> int:
        return self._plan.chunks[chunk] * self._plan.compressed_tokens

    def _write(self, graph: str, chunk: int, inputs: dict[str, Any], past: list[str], filled: int, tokens: int) -> None:
        """Run a graph on the first `filled` tokens and put its keys and values right behind them."""
        binding = self._sessions[graph].io_binding()
        for name, value in {**inputs, "text": self._text, "positions": self._positions(chunk)}.items():
            binding.bind_ortvalue_input(name, value)
        self._bind_past(binding, past, filled)
        shape = (1, tokens, self._plan.heads, self._plan.channels)
        for name in self._names:
            address = self._buffers[name].data_ptr() + filled * self._token
            binding.bind_output(name, self._device.name, 0, self._type, shape, address)
        self._sessions[graph].run_with_iobinding(binding)

    def _bind_past(self, binding: Any, names: list[str], tokens: int) -> None:
        if not tokens:
            nothing = self._device.empty((1, 0, self._plan.heads, self._plan.channels), self._type)
            for name in names:
                binding.bind_ortvalue_input(f"past_{name}", nothing)
            return
        shape = (1, tokens, self._plan.heads, self._plan.channels)
        for name in names:
            binding.bind_input(f"past_{name}", self._device.name, 0, self._type, shape, self._buffers[name].data_ptr())

    def _positions(self, chunk: int) -> Any:
        first = self._plan.first_frame(chunk)
        return self._device.holding(np.arange(first, first + self._plan.chunks[chunk], dtype=np.int64))

    def _full_tokens(self, chunk: int) -> int:
        return self._plan.chunks[chunk] * self._plan.full_tokens

    def _check(self, latents: Array) -> None:
        if self._text is None:
            raise AnyFlowError("this stream is closed; open another.")
        if self._chunk >= len(self._plan.chunks):
            raise AnyFlowError(f"all {len(self._plan.chunks)} chunks of the plan are made; open another stream.")
        frames = self._plan.chunks[self._chunk]
        if latents.shape[1] != frames:
            raise AnyFlowError(f"chunk {self._chunk} has {frames} latent frames in the plan; {latents.shape[1]} were given.")
