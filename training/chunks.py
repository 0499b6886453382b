"""Bidirectional and causal as one thing: a plan of chunks, and what a chunk sees.

A causal model trains on noisy chunks that see clean copies of earlier ones:

    [ chunk 0 | chunk 1 ][ chunk 2 | chunk 3 | chunk 4 ]     five chunks, full_chunk_limit 3
      old: clean,          the window: noisy; chunk 4 sees the old ones,
      compressed           clean copies of 2 and 3, and itself

A bidirectional model is the plan with one chunk: nothing old, no copies, everything sees
everything. So losses and roll-outs below know chunks only.

What is clean does not change with the noise, so its keys and values are made once
(`encode_context`) and shared by every forward of a loss, those of the finite difference included;
their gradient flows through one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.models import Architecture
from anyflow_deploy.training.model.network import KVCache, Span, TokenRange, TrainingTransformer


@dataclass(frozen=True)
class ChunkPlan:
    """Latent frames of each chunk, and how many of the last chunks are seen at full resolution.

    Attributes:
        chunks: latent frames of each.
        limit: chunks of the window (`full_chunk_limit`).
    """

    chunks: tuple[int, ...]
    limit: int = 1

    @property
    def frames(self) -> int:
        """Of all chunks."""
        return sum(self.chunks)

    @property
    def first(self) -> int:
        """Number of the window's first chunk."""
        return max(0, len(self.chunks) - self.limit)

    def frame_range(self, chunk: int) -> TokenRange:
        """Frames of a chunk: first, and one past the last."""
        start = sum(self.chunks[:chunk])
        return start, start + self.chunks[chunk]

    @property
    def window(self) -> TokenRange:
        """Frames of the window."""
        return sum(self.chunks[: self.first]), self.frames

    def head(self, count: int) -> ChunkPlan:
        """The first `count` chunks alone."""
        return ChunkPlan(self.chunks[:count], self.limit)


def chunk_plan(a: Architecture, frames: int, chunks: Sequence[int] | None = None) -> ChunkPlan:
    """The plan of an architecture for videos of so many latent frames.

    Args:
        chunks: instead of the model's own (causal only); cut or repeated to the frames by the
            caller.

    Raises:
        AnyFlowError: chunks that do not sum to the frames.
    """
    if a.full_chunk_limit is None or a.chunk_partition is None:
        return ChunkPlan((frames,))
    plan = ChunkPlan(tuple(chunks or a.chunk_partition), a.full_chunk_limit)
    if plan.frames != frames:
        raise AnyFlowError(
            f"the chunks {list(plan.chunks)} sum to {plan.frames} latent frames and the data has"
            f" {frames}. Give --chunks that sum to it, or other data."
        )
    return plan


@dataclass(frozen=True)
class Context:
    """What the noisy chunks of a window see besides themselves.

    Attributes:
        memory: keys and values of the old chunks and of the window's clean copies, layer by layer;
            empty when there are none.
        old: tokens of the old ones among them.
    """

    memory: KVCache
    old: int

    def detach(self) -> Context:
        """The same without gradient."""
        return Context([(key.detach(), value.detach()) for key, value in self.memory], self.old)

    def rows(self, indices: Tensor) -> Context:
        """The same for some samples of the batch, int64 or bool."""
        return Context([(key[indices], value[indices]) for key, value in self.memory], self.old)


EMPTY_CONTEXT = Context([], 0)


def encode_context(
    network: TrainingTransformer, clean: Tensor, text: Tensor, plan: ChunkPlan
) -> Context:
    """Encode the clean chunks of a plan that its noisy ones look at: the old ones, and all of the
    window but the last.

    Args:
        clean: latents (B, F, C, H, W); those of the last chunk are not looked at and may be
            missing.
        text: prompt embeddings (B, L, D).
    """
    if len(plan.chunks) == 1:
        return EMPTY_CONTEXT
    old = compress_chunks(network, clean, text, plan, range(plan.first), [])
    memory = encode_recent(network, clean, text, plan, old)
    return Context(memory, _cached_tokens(old))


def compress_chunks(
    network: TrainingTransformer,
    clean: Tensor,
    text: Tensor,
    plan: ChunkPlan,
    chunks: range,
    before: KVCache,
) -> KVCache:
    """Compress some chunks that follow each other; each sees those before it. What is `before`
    stays as it is.

    Returns:
        `before`, and the new ones behind it, in new tensors.
    """
    if not chunks:
        return before
    patch = network.compressed_patch
    size = (clean.shape[3] // patch) * (clean.shape[4] // patch)
    return _encode_chunks(network, clean, text, plan, chunks, before, size, compressed=True)


def encode_recent(
    network: TrainingTransformer, clean: Tensor, text: Tensor, plan: ChunkPlan, old: KVCache
) -> KVCache:
    """The old ones' memory, and that of the window's clean chunks behind it, without the last
    chunk's."""
    chunks = range(plan.first, len(plan.chunks) - 1)
    if not chunks:
        return old
    return _encode_chunks(
        network, clean, text, plan, chunks, old, _frame_tokens(network, clean), compressed=False
    )


def _encode_chunks(
    network: TrainingTransformer,
    clean: Tensor,
    text: Tensor,
    plan: ChunkPlan,
    chunks: range,
    before: KVCache,
    size: int,
    compressed: bool,
) -> KVCache:
    """Run clean chunks at t = r = 0, each seeing what is before, earlier ones and itself; `size`
    tokens a frame."""
    start = plan.frame_range(chunks[0])[0]
    stop = plan.frame_range(chunks[-1])[1]
    ends = [(plan.frame_range(c)[0] - start, plan.frame_range(c)[1] - start) for c in chunks]
    known = _cached_tokens(before)
    spans = [((a * size, b * size), ((0, known + b * size),)) for a, b in ends]
    zero_times = clean.new_zeros(clean.shape[0], stop - start)
    positions = torch.arange(start, stop, device=clean.device)
    own = network(
        clean[:, start:stop],
        zero_times,
        zero_times,
        text,
        positions,
        before,
        spans if len(spans) > 1 else None,
        memory=True,
        compressed=compressed,
    )
    if not before:
        return list(own)
    return [
        (torch.cat((a, c), 1), torch.cat((b, d), 1))
        for (a, b), (c, d) in zip(before, own, strict=True)
    ]


def velocity(
    network: TrainingTransformer,
    z: Tensor,
    t: Tensor,
    r: Tensor,
    text: Tensor,
    plan: ChunkPlan,
    context: Context,
) -> Tensor:
    """u(z, t, r) of a plan's window.

    Args:
        z: noisy latents of the window (B, F, C, H, W).
        t, r: one time for each sample, float32 (B), in timesteps.
        text: prompt embeddings (B, L, D).
        context: from `encode_context`.
    """
    start, stop = plan.window
    positions = torch.arange(start, stop, device=z.device)
    times = [s[:, None].expand(-1, stop - start) for s in (t, r)]
    spans = (
        _window_spans(plan, _frame_tokens(network, z), context)
        if plan.first + 1 < len(plan.chunks)
        else None
    )
    result: Tensor = network(z, *times, text, positions, context.memory, spans)
    return result


def _window_spans(plan: ChunkPlan, size: int, context: Context) -> list[Span]:
    """A noisy chunk sees the old ones, the clean copies of the window's earlier ones, and
    itself."""
    start = plan.window[0]
    known = _cached_tokens(context.memory)
    spans: list[Span] = []
    for chunk in range(plan.first, len(plan.chunks)):
        a, b = ((frame - start) * size for frame in plan.frame_range(chunk))
        spans.append(((a, b), ((0, context.old + a), (known + a, known + b))))
    return spans


def _cached_tokens(memory: KVCache) -> int:
    return memory[0][0].shape[1] if memory else 0


def _frame_tokens(network: TrainingTransformer, latents: Tensor) -> int:
    return (latents.shape[3] // network.patch) * (latents.shape[4] // network.patch)
