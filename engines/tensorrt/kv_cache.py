"""The causal cache in TensorRT: one buffer per layer for keys and one for values, written in place.

As in ONNX Runtime, the past is the piece from a buffer's start, and a chunk's own keys and values are written right
behind it, by address. TensorRT has two wishes more. Every output needs a place, also while a chunk is being denoised and
nobody wants its keys: they go to the same free place, where `remember` will write the good ones. And addresses are
multiples of 256 bytes: where a token's bytes are not (no released model), results go beside and are copied.

The `chunk` and `compress` plans each hold the weights they share: TensorRT cannot share them between engines.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Protocol

import numpy as np

from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.kv_cache import CachePlan
from anyflow_deploy.engines.streaming import Positions, memory_names
from anyflow_deploy.engines.tensorrt.build.optimization_profiles import chosen
from anyflow_deploy.engines.tensorrt.cuda import ALIGNMENT, Buffer
from anyflow_deploy.engines.tensorrt.execution import Lane
from anyflow_deploy.engines.tensorrt.plan import BYTES, Plan
from anyflow_deploy.engines.tensorrt.run import Inputs, TensorRTRun, run_plan, uploaded
from anyflow_deploy.errors import ShapeError


class Lanes(Protocol):
    """Who lends lanes: the engine."""

    def lane(self, key: Hashable) -> Lane:
        """One for work of these shapes."""
        ...

    def leave(self, key: Hashable, lane: Lane) -> None:
        """Hand it back."""
        ...


class TensorRTCache:
    """See `streaming.Cache`. For one thread at a time.

    Args:
        lanes: the engine.
        plans: its plans, by graph.
        text: prompt embeddings, float32 (1, L, D).
        plan: how much has to fit.

    Raises:
        ShapeError: no profile holds this length of text.
        OutOfMemoryError: the cache does not fit.
    """

    def __init__(self, lanes: Lanes, plans: Mapping[str, Plan], text: Array, plan: CachePlan) -> None:
        self._lanes, self._plans = lanes, plans
        self._names = memory_names(plan.layers)
        self._heads = (plan.heads, plan.channels)
        self._token = plan.heads * plan.channels * BYTES[self._plan("chunk").types["key.0"]]
        self._full = plan.full_tokens
        self._longest = max(plan.chunks) * plan.full_tokens
        chosen(self._plan("text").profiles, {"text": text.shape}, "text")
        self._key = (text.shape, plan)
        self._lane: Lane = lanes.lane(self._key)
        try:
            self._capacity = plan.capacity + self._longest
            self._buffers = {name: self._lane.take(self._capacity * self._token) for name in self._names}
            self._words, self._text_shape = self._of_text(text), (1, text.shape[1], *self._heads)
        except BaseException:
            self._lane.close()
            raise
        self._open, self._runs = True, 0

    def run(self, latents: Array, positions: Positions, past: int) -> TensorRTRun:
        """See `Cache`."""
        plan = self._plan("chunk")
        tokens = latents.shape[1] * self._full
        self._check(plan, latents, past)
        self._reserve(past + tokens)
        where, aside = uploaded(self._lane, positions), self._aside(past, tokens)

        def tensors() -> tuple[Inputs, dict[str, int]]:
            return {"positions": (positions.shape, where.address), **self._memory(past)}, self._places(past, aside)

        def closed() -> None:
            self._lane.give(where, *aside)
            self._ended()

        self._runs += 1
        return TensorRTRun(self._lane, plan, latents, tensors, closed)

    def write(self, graph: str, latents: Array, positions: Positions, past: int, tokens: int) -> None:
        """See `Cache`."""
        plan, lane = self._plan(graph), self._lane
        self._check(plan, latents, past)
        self._reserve(past + tokens)
        times = latents.shape[:2]
        held = [uploaded(lane, array) for array in (latents, positions, np.zeros(times, np.float32))]
        spare = [lane.take(latents.nbytes) for _ in ("z_r", "velocity")]
        z, where, still = (buffer.address for buffer in held)
        inputs: Inputs = {
            "latents": (latents.shape, z), "positions": (positions.shape, where), "t": (times, still), "r": (times, still),
            **self._memory(past),
        }  # fmt: skip
        aside = self._aside(past, tokens)
        outputs = self._places(past, aside) | {"z_r": spare[0].address, "velocity": spare[1].address}
        run_plan(lane, plan, inputs, outputs)
        for name, buffer in zip(self._names, aside, strict=False):
            lane.queue.copy(self._buffers[name].address + past * self._token, buffer.address, tokens * self._token)
        lane.queue.wait()
        lane.give(*held, *spare, *aside)

    def move(self, to: int, start: int, tokens: int) -> None:
        """See `Cache`."""
        for buffer in self._buffers.values():
            base, size = buffer.address, tokens * self._token
            self._lane.queue.copy(base + to * self._token, base + start * self._token, size)

    def grow(self, capacity: int) -> None:
        """See `Cache`."""
        self._reserve(capacity + self._longest)

    def close(self) -> None:
        """See `Cache`. The lane goes back once the runs on it are closed, too."""
        if self._open:
            self._open = False
            self._ended(0)

    def _ended(self, runs: int = 1) -> None:
        self._runs -= runs
        if not self._open and not self._runs and self._buffers:
            self._lane.queue.wait()
            self._lane.give(*self._buffers.values(), *self._words.values())
            self._buffers, self._words = {}, {}
            self._lanes.leave(self._key, self._lane)

    def _plan(self, graph: str) -> Plan:
        if graph not in self._plans:
            raise ShapeError(
                f"this engine was built without {graph!r}, which the video sizes it was built for do not need. "
                "Build one with --shapes HEIGHTxWIDTHxFRAMES for longer videos."
            )
        return self._plans[graph]

    def _check(self, plan: Plan, latents: Array, past: int) -> None:
        """Refuse what no profile holds, before anything is reserved."""
        memory = {name: shape for name, (shape, _) in self._memory(past).items()}
        frames = latents.shape[1]
        shapes = {"latents": latents.shape, "t": (1, frames), "r": (1, frames), "positions": (frames,), **memory}
        chosen(plan.profiles, {name: shapes[name] for name in plan.inputs}, plan.name)

    def _memory(self, past: int) -> Inputs:
        """The text's keys and values, and the past's."""
        shape = (1, past, *self._heads)
        words: Inputs = {f"text_{name}": (self._text_shape, self._words[name].address) for name in self._names}
        return words | {f"past_{name}": (shape, self._buffers[name].address) for name in self._names}

    def _aside(self, past: int, tokens: int) -> list[Buffer]:
        """Buffers for a chunk's keys and values where the place behind the past is not aligned."""
        return [self._lane.take(tokens * self._token) for _ in self._names] if past * self._token % ALIGNMENT else []

    def _places(self, past: int, aside: list[Buffer]) -> dict[str, int]:
        """Where a chunk's keys and values are written."""
        if aside:
            return {name: buffer.address for name, buffer in zip(self._names, aside, strict=True)}
        return {name: self._buffers[name].address + past * self._token for name in self._names}

    def _reserve(self, capacity: int) -> None:
        """Room for so many tokens, keeping what is there."""
        if capacity <= self._capacity:
            return
        for name, old in self._buffers.items():
            larger = self._lane.take(capacity * self._token)
            self._lane.queue.copy(larger.address, old.address, self._capacity * self._token)
            self._buffers[name] = larger
            self._lane.queue.wait()
            old.close()  # not given back: nothing will ask for this size again
        self._capacity = capacity

    def _of_text(self, text: Array) -> dict[str, Buffer]:
        """The text's keys and values in every layer."""
        held = uploaded(self._lane, text)
        words = {name: self._lane.take(text.shape[1] * self._token) for name in self._names}
        outputs = {f"text_{name}": buffer.address for name, buffer in words.items()}
        run_plan(self._lane, self._plan("text"), {"text": (text.shape, held.address)}, outputs)
        self._lane.queue.wait()
        self._lane.give(held)
        return words
