"""The tests' C++ backend "toy" (engines/cpp/tests/toy_backend.cpp) once more, in numpy, for
Python's own sampler and stream.

Every operation is a single float32 one in the same order, so both give the same bits; the clock is
a number that each transition moves on; and the cache writes down what it was told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from anyflow_deploy.engines.engine import Array, frame_times, prepare_inputs
from anyflow_deploy.engines.kv_cache import CachePlan
from anyflow_deploy.engines.streaming import CacheStream, Positions
from anyflow_deploy.models import Architecture
from anyflow_deploy.shape_ranges import ShapeRanges

F = np.float32


@dataclass
class ToyState:
    """See toy_backend.hpp."""

    costs: list[float]
    now: float = 0.0
    transitions: int = 0
    calls: list[str] = field(default_factory=list)

    def spend(self) -> None:
        if self.costs:
            self.now += self.costs[self.transitions % len(self.costs)]
        self.transitions += 1


class ToyRun:
    def __init__(self, state: ToyState, latents: Array, bias: Any) -> None:
        self._state = state
        self._z = latents.copy()
        self._bias = bias

    def step(self, t: ArrayLike, r: ArrayLike) -> None:
        self._state.spend()
        times = frame_times(t, r, self._z.shape)
        source, target = (time[:, :, None, None, None] for time in times)
        self._z = self._z - (source - target) / F(1000) * self._at(source, target)

    def velocity(self, t: ArrayLike, r: ArrayLike) -> Array:
        self._state.spend()
        source, target = (time[:, :, None, None, None] for time in frame_times(t, r, self._z.shape))
        return self._at(source, target)

    def _at(self, t: Array, r: Array) -> Array:
        return np.asarray(self._z * F(0.5) + t * F(2**-10) + r * F(2**-12) + self._bias, F)

    def read(self) -> Array:
        return self._z.copy()

    def close(self) -> None: ...

    def __enter__(self) -> ToyRun:
        return self

    def __exit__(self, *_: object) -> None: ...


class ToyCache:
    def __init__(self, state: ToyState, text: Any, plan: CachePlan) -> None:
        self._state = state
        self._text = text
        self._tokens = [0] * plan.capacity

    def run(self, latents: Array, positions: Positions, past: int) -> ToyRun:
        self._state.calls.append(f"run {positions[0]} {len(positions)} {past}")
        total = sum(token * (i + 1) for i, token in enumerate(self._tokens[:past])) % 65536
        return ToyRun(self._state, latents, F(total) / F(65536) + self._text)

    def write(
        self, graph: str, latents: Array, positions: Positions, past: int, tokens: int
    ) -> None:
        first = int(positions[0])
        self._state.calls.append(f"write {graph} {first} {len(positions)} {past} {tokens}")
        content = math.floor(F(latents.flat[0]) * F(64))
        for i in range(tokens):
            self._tokens[past + i] = (
                first * 31 + (17 if graph == "compress" else 0) + past * 7 + i + content
            ) % 1000
        assert len(self._tokens) >= past + tokens

    def move(self, to: int, start: int, tokens: int) -> None:
        self._state.calls.append(f"move {to} {start} {tokens}")
        self._tokens[to : to + tokens] = self._tokens[start : start + tokens]

    def grow(self, capacity: int) -> None:
        raise NotImplementedError

    def close(self) -> None: ...


class ToyEngine:
    """See `Engine`."""

    def __init__(self, architecture: Architecture, ranges: ShapeRanges, state: ToyState) -> None:
        self.architecture = architecture
        self.ranges = ranges
        self.state = state
        self.description = "toy"

    def start(self, latents: ArrayLike, text: ArrayLike) -> ToyRun:
        a = self.architecture
        z, words = prepare_inputs(self.ranges, a.in_channels, a.text_dim, latents, text)
        return ToyRun(self.state, z, words[0, 0, 0])

    def open_stream(self, text: ArrayLike, plan: CachePlan) -> CacheStream:
        return CacheStream(ToyCache(self.state, np.asarray(text)[0, 0, 0], plan), plan)

    def close(self) -> None: ...
