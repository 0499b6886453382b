"""The order of operations in a causal stream, the same for every backend.

A backend provides a `Cache`: buffers of keys and values per layer, and the graphs that read and
write them. `CacheStream` decides what is written where (`CachePlan`), and when:

- a finished chunk is written in full, behind everything else;
- once there are more than `recent` full chunks, the oldest is compressed for good, and the chunks
  behind it are written again, since their past has changed;
- chunks outside the window are removed, and the chunks behind them move up.
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
    """A backend's cache buffers of one stream, and the graphs that use them.

    Positions in a buffer are counted in tokens from its start.
    """

    def run(self, latents: Array, positions: Positions, past: int) -> Run:
        """Open a run of the graph `chunk` that sees the first `past` tokens.

        Args:
            latents: noise of the chunk, float32 (1, F, C, H, W).
            positions: absolute indices of its frames, (F).
            past: tokens.
        """
        ...

    def write(
        self, graph: str, latents: Array, positions: Positions, past: int, tokens: int
    ) -> None:
        """Run `chunk` (at t = r = 0) or `compress`, and store the keys and values it returns.

        The graph sees the first `past` tokens. Its own `tokens` are written right behind them.
        """
        ...

    def move(self, to: int, start: int, tokens: int) -> None:
        """Move tokens within every buffer; source and destination may overlap."""
        ...

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens, and keep the contents."""
        ...

    def close(self) -> None:
        """Release the buffers."""
        ...


class CacheStream:
    """A `Stream` over a backend's `Cache`: it decides what is written where, and when.

    Args:
        cache: with room for `plan.capacity` tokens.
        plan: decides which chunks are kept, and where.
    """

    def __init__(self, cache: Cache, plan: CachePlan) -> None:
        self._cache: Cache | None = cache
        self._plan = plan
        self._capacity = plan.capacity
        self._chunk = 0
        self._compressed_end = 0  # in tokens
        self._recent_chunks: deque[tuple[int, Array]] = deque()
        self._compressed_chunks: list[int] = []

    def start(self, latents: Array) -> Run:
        """Open a run of the next chunk, on the cache as it is.

        Args:
            latents: noise of the chunk, float32 (1, F, C, H, W); left as it is.

        Raises:
            AnyFlowError: the stream is closed, the plan has no further chunk, or its chunk has
                another number of frames.
        """
        cache = self._check_next_chunk(latents)
        # A copy: a run works in its array (ONNX Runtime does not copy on the CPU), and a policy may
        # start from the same noise again.
        return cache.run(
            latents.copy(), self._positions(self._chunk), sum(self._plan.cached_tokens(self._chunk))
        )

    def append(self, latents: Array) -> None:
        """Encode the next chunk into the cache; the chunk after it becomes the next.

        Args:
            latents: clean, float32 (1, F, C, H, W).

        Raises:
            AnyFlowError: as for `start`, or it is the last chunk of the plan.
        """
        cache = self._check_next_chunk(latents)
        if self._chunk + 1 == len(self._plan.chunks):  # no room was planned for it
            raise AnyFlowError(
                f"chunk {self._chunk} is the last of the plan, so no chunk would read its cache;"
                " extend() the plan first."
            )
        self._recent_chunks.append((self._chunk, latents))
        to_write = [self._recent_chunks[-1]]
        if len(self._recent_chunks) > self._plan.recent:
            self._compress(cache, *self._recent_chunks.popleft())
            to_write = list(self._recent_chunks)  # what precedes them has changed
        end = self._compressed_end + sum(
            self._full_tokens(chunk) for chunk, _ in list(self._recent_chunks)[: -len(to_write)]
        )
        for chunk, clean in to_write:
            cache.write("chunk", clean, self._positions(chunk), end, self._full_tokens(chunk))
            end += self._full_tokens(chunk)
        self._chunk += 1

    def extend(self, plan: CachePlan) -> None:
        """Replace the plan by one that agrees on the finished chunks.

        The cache grows where it has to.

        Raises:
            AnyFlowError: the stream is closed, or the plan changes a finished chunk.
        """
        cache = self._require_open()
        if plan.chunks[: self._chunk] != self._plan.chunks[: self._chunk]:
            raise AnyFlowError(
                f"the plan {list(plan.chunks)} changes chunks that are finished already:"
                f" {list(self._plan.chunks)}."
            )
        if plan.capacity > self._capacity:
            cache.grow(plan.capacity)
            self._capacity = plan.capacity
        self._plan = plan

    def close(self) -> None:
        """Release the cache."""
        if self._cache is not None:
            self._cache.close()
        self._cache = None
        self._recent_chunks.clear()

    def _compress(self, cache: Cache, chunk: int, clean: Array) -> None:
        """Append an old chunk to the compressed part, after evicting what the window drops."""
        self._evict(cache, set(self._plan.kept_chunks(chunk + 1 + self._plan.recent)))
        self._compressed_chunks.append(chunk)
        tokens = self._compressed_tokens(chunk)
        cache.write("compress", clean, self._positions(chunk), self._compressed_end, tokens)
        self._compressed_end += tokens

    def _evict(self, cache: Cache, keep: set[int]) -> None:
        """Close the gaps of compressed chunks outside the window.

        The order of the remaining chunks does not matter, but their position does.
        """
        for chunk in [c for c in self._compressed_chunks if c not in keep]:
            tokens_before = sum(
                self._compressed_tokens(c)
                for c in self._compressed_chunks[: self._compressed_chunks.index(chunk)]
            )
            gap = self._compressed_tokens(chunk)
            cache.move(
                tokens_before, tokens_before + gap, self._compressed_end - tokens_before - gap
            )
            self._compressed_chunks.remove(chunk)
            self._compressed_end -= gap

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
        """Return the cache if these latents may be the next chunk's."""
        cache = self._require_open()
        if self._chunk >= len(self._plan.chunks):
            raise AnyFlowError(
                f"all {len(self._plan.chunks)} chunks of the plan are finished; open another"
                " stream."
            )
        frames = self._plan.chunks[self._chunk]
        if latents.shape[1] != frames:
            raise AnyFlowError(
                f"chunk {self._chunk} has {frames} latent frames in the plan; {latents.shape[1]}"
                " were given."
            )
        return cache


def cache_tensor_names(layers: int) -> list[str]:
    """Return the graphs' names of the cached tensors: `key.0`, `value.0`, `key.1`, …"""
    return [f"{part}.{layer}" for layer in range(layers) for part in ("key", "value")]
