"""The plan of chunks that bidirectional and causal training share, and what each chunk sees.

A causal model trains on noisy chunks that see clean copies of earlier ones:

    [ chunk 0 | chunk 1 ][ chunk 2 | chunk 3 | chunk 4 ]     five chunks, full_chunk_limit 3
      old: clean,          the window: noisy; chunk 4 sees the old ones,
      compressed           clean copies of 2 and 3, and itself

A bidirectional model has a plan with one chunk: no old chunks, no copies, and every token sees
every other. So losses and roll-outs handle chunks only.

Clean chunks do not change with the noise, so their keys and values are computed once
(`encode_context`) and shared by every forward of a loss, those of the finite difference included;
their gradient flows through one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow_deploy.engines.kv_cache import fit_chunks
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
        """Latent frames of all chunks."""
        return sum(self.chunks)

    @property
    def first(self) -> int:
        """Number of the window's first chunk."""
        return max(0, len(self.chunks) - self.limit)

    def frame_range(self, chunk: int) -> TokenRange:
        """Return the frames of a chunk: the first, and one past the last."""
        start = sum(self.chunks[:chunk])
        return start, start + self.chunks[chunk]

    @property
    def window(self) -> TokenRange:
        """Frames of the window."""
        return sum(self.chunks[: self.first]), self.frames

    def head(self, count: int) -> ChunkPlan:
        """Return the plan of the first `count` chunks."""
        return ChunkPlan(self.chunks[:count], self.limit)


def chunk_plan(a: Architecture, frames: int, chunks: Sequence[int] | None = None) -> ChunkPlan:
    """Return the plan of an architecture for videos of so many latent frames.

    Args:
        chunks: latent frames of each chunk, in place of the model's own (causal only).

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


def fit_chunk_plan(a: Architecture, frames: int) -> ChunkPlan:
    """Return an architecture's plan for any number of latent frames, cut short or lengthened."""
    chunks = fit_chunks(a.chunk_partition, frames) if a.chunk_partition else None
    return chunk_plan(a, frames, chunks)


@dataclass(frozen=True)
class Context:
    """The keys and values that the noisy chunks of a window see besides their own.

    Attributes:
        memory: keys and values of the old chunks and of the window's clean copies, layer by layer;
            empty when there are none.
        old_tokens: how many of these tokens belong to old chunks.
    """

    memory: KVCache
    old_tokens: int

    def detach(self) -> Context:
        """Return the same context without gradient."""
        memory = [(key.detach(), value.detach()) for key, value in self.memory]
        return Context(memory, self.old_tokens)

    def rows(self, indices: Tensor) -> Context:
        """Return the context of some samples of the batch; `indices` are int64 or bool."""
        memory = [(key[indices], value[indices]) for key, value in self.memory]
        return Context(memory, self.old_tokens)


EMPTY_CONTEXT = Context([], 0)


def encode_context(
    network: TrainingTransformer, clean: Tensor, text: Tensor, plan: ChunkPlan
) -> Context:
    """Encode the clean chunks of a plan that its noisy ones see.

    They are the old ones, and all of the window but the last.

    Args:
        clean: latents (B, F, C, H, W); those of the last chunk are not used and may be missing.
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
    past: KVCache,
) -> KVCache:
    """Compress some consecutive chunks; each sees those before it.

    The tensors of `past` stay as they are.

    Returns:
        Keys and values of `past` and of the new chunks behind it, in new tensors.
    """
    if not chunks:
        return past
    patch = network.compressed_patch
    size = (clean.shape[3] // patch) * (clean.shape[4] // patch)
    return _encode_chunks(network, clean, text, plan, chunks, past, size, compressed=True)


def encode_recent(
    network: TrainingTransformer, clean: Tensor, text: Tensor, plan: ChunkPlan, old: KVCache
) -> KVCache:
    """Encode the window's clean chunks, without the last, and append them to the old memory."""
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
    past: KVCache,
    size: int,
    compressed: bool,
) -> KVCache:
    """Run clean chunks at t = r = 0, each seeing the past, earlier ones and itself.

    `size` is the number of tokens a frame.
    """
    start = plan.frame_range(chunks[0])[0]
    stop = plan.frame_range(chunks[-1])[1]
    ends = [(plan.frame_range(c)[0] - start, plan.frame_range(c)[1] - start) for c in chunks]
    past_tokens = _cached_tokens(past)
    spans = [((a * size, b * size), ((0, past_tokens + b * size),)) for a, b in ends]
    zero_times = clean.new_zeros(clean.shape[0], stop - start)
    positions = torch.arange(start, stop, device=clean.device)
    new_kv = network(
        clean[:, start:stop],
        zero_times,
        zero_times,
        text,
        positions,
        past,
        spans if len(spans) > 1 else None,
        memory=True,
        compressed=compressed,
    )
    if not past:
        return list(new_kv)
    return [
        (torch.cat((a, c), 1), torch.cat((b, d), 1))
        for (a, b), (c, d) in zip(past, new_kv, strict=True)
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
    """Return u(z, t, r) of a plan's window, (B, F, C, H, W).

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
    """Return the spans of a window.

    A noisy chunk sees the old ones, the clean copies of the window's earlier ones, and itself.
    """
    start = plan.window[0]
    past_tokens = _cached_tokens(context.memory)
    spans: list[Span] = []
    for chunk in range(plan.first, len(plan.chunks)):
        a, b = ((frame - start) * size for frame in plan.frame_range(chunk))
        spans.append(((a, b), ((0, context.old_tokens + a), (past_tokens + a, past_tokens + b))))
    return spans


def _cached_tokens(memory: KVCache) -> int:
    return memory[0][0].shape[1] if memory else 0


def _frame_tokens(network: TrainingTransformer, latents: Tensor) -> int:
    return (latents.shape[3] // network.patch) * (latents.shape[4] // network.patch)
