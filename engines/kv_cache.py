"""The cache of a causal model, planned before anything runs.

AnyFlow-FAR keeps the last `full_chunk_limit - 1` finished chunks at full resolution and every older
one compressed to a fraction of its tokens (1/4 with Wan's patches). In a layer's buffer the
compressed chunks come first, in order, and the recent ones behind them:

    [ chunk 0 | chunk 1 | … | chunk k-3 ][ chunk k-2 | chunk k-1 ]   while chunk k is generated
      compressed, written once             full, written again whenever their past changes

so the cache at any moment is one contiguous piece from the start, and the graph reads it without a
copy.

A *window* limits the cache of long streams: of the compressed chunks only the first and the last
`window` are kept, so memory and time per chunk stay constant. (The first one keeps the picture
stable.) docs/how-to/streaming.md says what a window costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anyflow_deploy.errors import AnyFlowError, ShapeError
from anyflow_deploy.models import TEXT_TOKENS, Architecture


@dataclass(frozen=True)
class CachePlan:
    """The cache of one stream: which chunks it keeps, and how many tokens they take.

    Build it with `cache_plan`.

    Attributes:
        chunks: latent frames of each chunk.
        recent: how many finished chunks stay at full resolution.
        window: how many of the newest compressed chunks are kept beside the first; None for all.
        full_tokens, compressed_tokens: tokens of one latent frame, either way.
        text_tokens: of the prompt's embedding, which is cached too.
        layers, heads, channels: of the transformer; channels are those of a head.
    """

    chunks: tuple[int, ...]
    recent: int
    window: int | None
    full_tokens: int
    compressed_tokens: int
    text_tokens: int
    layers: int
    heads: int
    channels: int

    @property
    def frames(self) -> int:
        """Latent frames of the whole video."""
        return sum(self.chunks)

    def first_frame(self, chunk: int) -> int:
        """Return the absolute index of a chunk's first latent frame."""
        return sum(self.chunks[:chunk])

    def kept_chunks(self, chunk: int) -> list[int]:
        """Return the compressed chunks that chunk number `chunk` finds in the cache, in order."""
        old = list(range(max(0, chunk - self.recent)))
        return (
            old if self.window is None or len(old) <= 1 + self.window else [0, *old[-self.window :]]
        )

    def cached_tokens(self, chunk: int) -> tuple[int, int]:
        """Return the (compressed, full) tokens that chunk number `chunk` finds in the cache."""
        recent = self.chunks[max(0, chunk - self.recent) : chunk]
        return self.compressed_tokens * sum(
            self.chunks[c] for c in self.kept_chunks(chunk)
        ), self.full_tokens * sum(recent)

    @property
    def capacity(self) -> int:
        """Tokens a layer's buffer has to hold: the most that any chunk finds."""
        return max(sum(self.cached_tokens(chunk)) for chunk in range(len(self.chunks)))

    def bytes(self, element_bytes: int) -> int:
        """Return the memory of all layers' keys and values, those of the text included.

        `element_bytes` is the size of one element: 4 in fp32, 2 in fp16 and bf16.
        """
        return (
            2
            * self.layers
            * (self.capacity + self.text_tokens)
            * self.heads
            * self.channels
            * element_bytes
        )

    @property
    def encoded_tokens(self) -> int:
        """Tokens sent through the network to fill the cache, over the whole video."""
        total = 0
        for chunk in range(len(self.chunks) - 1):
            if chunk < self.recent:
                total += self.full_tokens * self.chunks[chunk]
            else:
                old = chunk - self.recent
                total += self.compressed_tokens * self.chunks[old] + self.full_tokens * sum(
                    self.chunks[old + 1 : chunk + 1]
                )
        return total


def cache_plan(
    a: Architecture,
    chunks: Sequence[int] | None,
    height: int,
    width: int,
    window: int | None = None,
    text_tokens: int = TEXT_TOKENS,
) -> CachePlan:
    """Plan the cache of a stream.

    Args:
        a: a causal architecture.
        chunks: latent frames of each chunk; None for the model's own plan.
        height, width: of the latents.
        window: how many of the newest compressed chunks to keep beside the first; None for all.
        text_tokens: of the prompt's embedding.

    Raises:
        AnyFlowError: not a causal model, a window below 1, or a plan that is empty, holds a chunk
            without frames, or is too long.
        ShapeError: height or width that do not divide into patches, or are below one coarse patch.
    """
    if a.chunk_partition is None or a.compressed_patch_size is None or a.full_chunk_limit is None:
        raise AnyFlowError(
            "this is a bidirectional model; streams need a causal one (far-…). Use sample()."
        )
    plan = tuple(a.chunk_partition if chunks is None else chunks)
    if not plan or not all(isinstance(n, int) and n > 0 for n in plan):
        raise AnyFlowError(
            f"chunk plan {list(plan)}: allowed are one or more positive whole numbers of latent"
            " frames."
        )
    if sum(plan) > a.rope_max_seq_len:
        raise AnyFlowError(
            f"the chunk plan has {sum(plan)} latent frames; the rotary table ends at"
            f" {a.rope_max_seq_len}."
        )
    if window is not None and window < 1:
        raise AnyFlowError(
            f"window is {window}; allowed are whole numbers from 1, or None to keep every chunk."
        )
    patch = a.patch_size[1]
    compressed_patch = a.compressed_patch_size[1]
    if height % patch or width % patch or height < compressed_patch or width < compressed_patch:
        raise ShapeError(
            f"latents of {height} x {width}: a causal model takes multiples of {patch}, from"
            f" {compressed_patch} on."
        )
    return CachePlan(
        chunks=plan,
        recent=a.full_chunk_limit - 1,
        window=window,
        full_tokens=(height // patch) * (width // patch),
        compressed_tokens=(height // compressed_patch) * (width // compressed_patch),
        text_tokens=text_tokens,
        layers=a.num_layers,
        heads=a.num_attention_heads,
        channels=a.attention_head_dim,
    )


def fit_chunks(chunks: Sequence[int], frames: int) -> tuple[int, ...]:
    """Return a plan like `chunks` that has `frames` latent frames.

    It is cut short, or its longest chunk is repeated.
    """
    result: list[int] = []
    for length in [*chunks, *[max(chunks)] * frames]:
        frames_left = frames - sum(result)
        if not frames_left:
            break
        result.append(min(length, frames_left))
    return tuple(result)


def check_budget(plan: CachePlan, element_bytes: int, budget_bytes: float) -> None:
    """Refuse a plan whose cache does not fit.

    Args:
        plan: from `cache_plan`.
        element_bytes: size of a key's or value's element: 4 in fp32, 2 in fp16 and bf16.
        budget_bytes: the most memory it may take.

    Raises:
        AnyFlowError: with both numbers, and what would make the cache smaller.
    """
    needed = plan.bytes(element_bytes)
    if needed > budget_bytes:
        raise AnyFlowError(
            f"the cache of {len(plan.chunks)} chunks takes {needed / 1e6:,.1f} MB"
            f" ({plan.capacity:,} tokens and {plan.text_tokens} of text in {plan.layers} layers);"
            f" {budget_bytes / 1e6:,.1f} MB are allowed. Ask for fewer or shorter chunks, smaller"
            " frames, or a window."
        )
