"""What a causal stream does, and in which order, whatever the backend.

A backend lends a `Cache`: buffers of keys and values per layer, and the graphs that read and write
them. `CacheStream` knows what belongs where in them (`CachePlan`) and when it has to be written:

- a finished chunk enters in full, behind everything else;
- once there are more than `recent` full ones, the oldest is compressed for good, and what stood
  behind it is written again, since it now follows something else;
- chunks outside the window are forgotten, and what stood behind them moves up.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from anyflow_deploy.engines.engine import Array, Run
from anyflow_deploy.engines.kv_cache import CachePlan
from anyflow_deploy.errors import AnyFlowError

Positions = NDArray[np.int64]


class Cache(Protocol):
    """A backend's buffers of one stream, counted in tokens from the start, and its graphs on
    them."""

    def run(self, latents: Array, positions: Positions, past: int) -> Run:
        """A run of graph `chunk` that sees the first `past` tokens.

        Args:
            latents: noise of the chunk, float32 (1, F, C, H, W).
            positions: absolute indices of its frames, (F).
            past: tokens.
        """
        ...

    def write(
        self, graph: str, latents: Array, positions: Positions, past: int, tokens: int
    ) -> None:
        """Run `chunk` (at t = r = 0) or `compress` on the first `past` tokens, and put its own
        `tokens` behind them."""
        ...

    def move(self, to: int, start: int, tokens: int) -> None:
        """Move tokens within every buffer; the places may overlap."""
        ...

    def grow(self, capacity: int) -> None:
        """Make room for more tokens, keeping what is there."""
        ...

    def close(self) -> None:
        """Release the buffers."""
        ...


class CacheStream:
    """See `engine.Stream`.

    Args:
        cache: with room for `plan.capacity` tokens.
        plan: what is kept, and where.
    """

    def __init__(self, cache: Cache, plan: CachePlan) -> None:
        self._cache: Cache | None = cache
        self._plan = plan
        self._capacity = plan.capacity
        self._chunk = self._compressed = 0
        self._recent: deque[tuple[int, Array]] = deque()
        self._kept_compressed: list[int] = []

    def start(self, latents: Array) -> Run:
        """See `Stream`."""
        cache = self._check_next_chunk(latents)
        # A copy: a run works in the array it is given (ONNX Runtime does not copy on the CPU), and
        # noise may be asked for again.
        return cache.run(
            latents.copy(), self._positions(self._chunk), sum(self._plan.cached_tokens(self._chunk))
        )

    def append(self, latents: Array) -> None:
        """See `Stream`."""
        cache = self._check_next_chunk(latents)
        if self._chunk + 1 == len(self._plan.chunks):  # no room was planned for it
            raise AnyFlowError(
                f"chunk {self._chunk} is the last of the plan and nothing would see it; extend()"
                " the plan first."
            )
        self._recent.append((self._chunk, latents))
        to_write = [self._recent[-1]]
        if len(self._recent) > self._plan.recent:
            self._compress(cache, *self._recent.popleft())
            to_write = list(self._recent)  # what precedes them has changed
        filled = self._compressed + sum(
            self._full_tokens(chunk) for chunk, _ in list(self._recent)[: -len(to_write)]
        )
        for chunk, clean in to_write:
            cache.write("chunk", clean, self._positions(chunk), filled, self._full_tokens(chunk))
            filled += self._full_tokens(chunk)
        self._chunk += 1

    def extend(self, plan: CachePlan) -> None:
        """See `Stream`."""
        cache = self._require_open()
        if plan.chunks[: self._chunk] != self._plan.chunks[: self._chunk]:
            raise AnyFlowError(
                f"the plan {list(plan.chunks)} changes chunks that are made already:"
                f" {list(self._plan.chunks)}."
            )
        if plan.capacity > self._capacity:
            cache.grow(plan.capacity)
            self._capacity = plan.capacity
        self._plan = plan

    def close(self) -> None:
        """See `Stream`."""
        if self._cache is not None:
            self._cache.close()
        self._cache = None
        self._recent.clear()

    def _compress(self, cache: Cache, chunk: int, clean: Array) -> None:
        """Append an old chunk to the compressed part, for good; what the window lets go of makes
        room first."""
        self._evict(cache, set(self._plan.kept_chunks(chunk + 1 + self._plan.recent)))
        self._kept_compressed.append(chunk)
        tokens = self._compressed_tokens(chunk)
        cache.write("compress", clean, self._positions(chunk), self._compressed, tokens)
        self._compressed += tokens

    def _evict(self, cache: Cache, kept: set[int]) -> None:
        """Close the gaps of compressed chunks outside the window. Their order does not matter, but
        their place does."""
        for chunk in [c for c in self._kept_compressed if c not in kept]:
            tokens_before = sum(
                self._compressed_tokens(c)
                for c in self._kept_compressed[: self._kept_compressed.index(chunk)]
            )
            gap = self._compressed_tokens(chunk)
            cache.move(tokens_before, tokens_before + gap, self._compressed - tokens_before - gap)
            self._kept_compressed.remove(chunk)
            self._compressed -= gap

    def _positions(self, chunk: int) -> Positions:
        first = self._plan.first_frame(chunk)
        return np.arange(first, first + self._plan.chunks[chunk], dtype=np.int64)

    def _compressed_tokens(self, chunk: int) -> int:
        return self._plan.chunks[chunk] * self._plan.compressed_tokens

    def _full_tokens(self, chunk: int) -> int:
        return self._plan.chunks[chunk] * self._plan.full_tokens

    def _require_open(self) -> Cache:
        if self._cache is None:
            raise AnyFlowError("this stream is closed; open another.")
        return self._cache

    def _check_next_chunk(self, latents: Array) -> Cache:
        """The cache, if these latents may be the next chunk's."""
        cache = self._require_open()
        if self._chunk >= len(self._plan.chunks):
            raise AnyFlowError(
                f"all {len(self._plan.chunks)} chunks of the plan are made; open another stream."
            )
        frames = self._plan.chunks[self._chunk]
        if latents.shape[1] != frames:
            raise AnyFlowError(
                f"chunk {self._chunk} has {frames} latent frames in the plan; {latents.shape[1]}"
                " were given."
            )
        return cache


def cache_tensor_names(layers: int) -> list[str]:
    """What the graphs call a cached tensor: `key.0`, `value.0`, `key.1`, …"""
    return [f"{part}.{layer}" for layer in range(layers) for part in ("key", "value")]
