"""The causal cache in TensorRT: one buffer per layer for keys and one for values, written in place.

As in ONNX Runtime, the past is the piece from a buffer's start, and a chunk's own keys and values
are written right behind it, by address. TensorRT has two wishes more. Every output needs a place,
also while a chunk is being denoised and nobody wants its keys: they go to the same free place,
where `append` will write the good ones. And addresses are multiples of 256 bytes: where a token's
bytes are not (no released model), results go beside and are copied.

The `chunk` and `compress` plans each hold the weights they share: TensorRT cannot share them
between engines.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Protocol

import numpy as np

from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.kv_cache import CachePlan
from anyflow_deploy.engines.streaming import Positions, cache_tensor_names
from anyflow_deploy.engines.tensorrt.build.optimization_profiles import select_profile
from anyflow_deploy.engines.tensorrt.cuda import ALIGNMENT, DeviceBuffer
from anyflow_deploy.engines.tensorrt.execution import ExecutionSlot
from anyflow_deploy.engines.tensorrt.plan import BYTES, LoadedPlan
from anyflow_deploy.engines.tensorrt.run import Inputs, TensorRTRun, run_plan, upload_array
from anyflow_deploy.errors import ShapeError


class SlotPool(Protocol):
    """Who lends slots: the engine."""

    def acquire_slot(self, key: Hashable) -> ExecutionSlot:
        """One for work of these shapes."""
        ...

    def release_slot(self, key: Hashable, slot: ExecutionSlot) -> None:
        """Hand it back."""
        ...


class TensorRTCache:
    """See `streaming.Cache`. For one thread at a time.

    Args:
        slots: the engine.
        plans: its plans, by graph.
        text: prompt embeddings, float32 (1, L, D).
        plan: how much has to fit.

    Raises:
        ShapeError: no profile holds this length of text.
        OutOfMemoryError: the cache does not fit.
    """

    def __init__(
        self, pool: SlotPool, plans: Mapping[str, LoadedPlan], text: Array, plan: CachePlan
    ) -> None:
        self._pool, self._plans = pool, plans
        self._names = cache_tensor_names(plan.layers)
        self._heads = (plan.heads, plan.channels)
        self._token_bytes = plan.heads * plan.channels * BYTES[self._plan("chunk").types["key.0"]]
        self._full_tokens = plan.full_tokens
        self._longest = max(plan.chunks) * plan.full_tokens
        select_profile(self._plan("text").profiles, {"text": text.shape}, "text")
        self._key = (text.shape, plan)
        self._slot: ExecutionSlot = pool.acquire_slot(self._key)
        try:
            self._capacity = plan.capacity + self._longest
            self._buffers = {
                name: self._slot.acquire(self._capacity * self._token_bytes) for name in self._names
            }
            self._text_kv = self._encode_text(text)
            self._text_shape = (
                1,
                text.shape[1],
                *self._heads,
            )
        except BaseException:
            self._slot.close()
            raise
        self._open, self._runs = True, 0

    def run(self, latents: Array, positions: Positions, past: int) -> TensorRTRun:
        """See `Cache`."""
        plan = self._plan("chunk")
        tokens = latents.shape[1] * self._full_tokens
        self._check_profile(plan, latents, past)
        self._reserve(past + tokens)
        positions_buffer = upload_array(self._slot, positions)
        staging = self._staging_buffers(past, tokens)

        def tensors() -> tuple[Inputs, dict[str, int]]:
            return {
                "positions": (positions.shape, positions_buffer.address),
                **self._cache_inputs(past),
            }, self._output_addresses(past, staging)

        def on_close() -> None:
            self._slot.release(positions_buffer, *staging)
            self._release_if_unused()

        self._runs += 1
        return TensorRTRun(self._slot, plan, latents, tensors, on_close)

    def write(
        self, graph: str, latents: Array, positions: Positions, past: int, tokens: int
    ) -> None:
        """See `Cache`."""
        plan, slot = self._plan(graph), self._slot
        self._check_profile(plan, latents, past)
        self._reserve(past + tokens)
        times = latents.shape[:2]
        uploaded = [
            upload_array(slot, array) for array in (latents, positions, np.zeros(times, np.float32))
        ]
        scratch = [slot.acquire(latents.nbytes) for _ in ("z_r", "velocity")]
        z, positions_buffer, zero_times = (buffer.address for buffer in uploaded)
        inputs: Inputs = {
            "latents": (latents.shape, z),
            "positions": (positions.shape, positions_buffer),
            "t": (times, zero_times),
            "r": (times, zero_times),
            **self._cache_inputs(past),
        }
        staging = self._staging_buffers(past, tokens)
        outputs = self._output_addresses(past, staging) | {
            "z_r": scratch[0].address,
            "velocity": scratch[1].address,
        }
        run_plan(slot, plan, inputs, outputs)
        for name, buffer in zip(self._names, staging, strict=False):
            slot.stream.copy(
                self._buffers[name].address + past * self._token_bytes,
                buffer.address,
                tokens * self._token_bytes,
            )
        slot.stream.synchronize()
        slot.release(*uploaded, *scratch, *staging)

    def move(self, to: int, start: int, tokens: int) -> None:
        """See `Cache`."""
        for buffer in self._buffers.values():
            base, size = buffer.address, tokens * self._token_bytes
            self._slot.stream.copy(
                base + to * self._token_bytes, base + start * self._token_bytes, size
            )

    def grow(self, capacity: int) -> None:
        """See `Cache`."""
        self._reserve(capacity + self._longest)

    def close(self) -> None:
        """See `Cache`. The slot goes back once the runs on it are closed, too."""
        if self._open:
            self._open = False
            self._release_if_unused(0)

    def _release_if_unused(self, runs: int = 1) -> None:
        self._runs -= runs
        if not self._open and not self._runs and self._buffers:
            self._slot.stream.synchronize()
            self._slot.release(*self._buffers.values(), *self._text_kv.values())
            self._buffers, self._text_kv = {}, {}
            self._pool.release_slot(self._key, self._slot)

    def _plan(self, graph: str) -> LoadedPlan:
        if graph not in self._plans:
            raise ShapeError(
                f"this engine was built without {graph!r}, which the video sizes it was built for"
                " do not need. Build one with --shapes HEIGHTxWIDTHxFRAMES for longer videos."
            )
        return self._plans[graph]

    def _check_profile(self, plan: LoadedPlan, latents: Array, past: int) -> None:
        """Refuse what no profile holds, before anything is reserved."""
        cache_shapes = {name: shape for name, (shape, _) in self._cache_inputs(past).items()}
        frames = latents.shape[1]
        shapes = {
            "latents": latents.shape,
            "t": (1, frames),
            "r": (1, frames),
            "positions": (frames,),
            **cache_shapes,
        }
        select_profile(plan.profiles, {name: shapes[name] for name in plan.inputs}, plan.name)

    def _cache_inputs(self, past: int) -> Inputs:
        """The text's keys and values, and the past's."""
        shape = (1, past, *self._heads)
        text_kv: Inputs = {
            f"text_{name}": (self._text_shape, self._text_kv[name].address) for name in self._names
        }
        return text_kv | {
            f"past_{name}": (shape, self._buffers[name].address) for name in self._names
        }

    def _staging_buffers(self, past: int, tokens: int) -> list[DeviceBuffer]:
        """Buffers for a chunk's keys and values where the place behind the past is not aligned."""
        return (
            [self._slot.acquire(tokens * self._token_bytes) for _ in self._names]
            if past * self._token_bytes % ALIGNMENT
            else []
        )

    def _output_addresses(self, past: int, staging: list[DeviceBuffer]) -> dict[str, int]:
        """Where a chunk's keys and values are written."""
        if staging:
            return {name: buffer.address for name, buffer in zip(self._names, staging, strict=True)}
        return {
            name: self._buffers[name].address + past * self._token_bytes for name in self._names
        }

    def _reserve(self, capacity: int) -> None:
        """Room for so many tokens, keeping what is there."""
        if capacity <= self._capacity:
            return
        for name, old in self._buffers.items():
            larger = self._slot.acquire(capacity * self._token_bytes)
            self._slot.stream.copy(larger.address, old.address, self._capacity * self._token_bytes)
            self._buffers[name] = larger
            self._slot.stream.synchronize()
            old.close()  # not given back: nothing will ask for this size again
        self._capacity = capacity

    def _encode_text(self, text: Array) -> dict[str, DeviceBuffer]:
        """The text's keys and values in every layer."""
        uploaded = upload_array(self._slot, text)
        text_kv = {
            name: self._slot.acquire(text.shape[1] * self._token_bytes) for name in self._names
        }
        outputs = {f"text_{name}": buffer.address for name, buffer in text_kv.items()}
        run_plan(self._slot, self._plan("text"), {"text": (text.shape, uploaded.address)}, outputs)
        self._slot.stream.synchronize()
        self._slot.release(uploaded)
        return text_kv
