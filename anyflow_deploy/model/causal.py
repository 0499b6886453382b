"""The causal (FAR) model as three traceable modules, without a mask.

AnyFlow-FAR makes video chunk by chunk; a chunk attends to a cache of what came before, and
everything in the cache is visible to it, so no mask is needed. Three graphs share one set of
weights:

- `TextKVEncoder`: the prompt's keys and values in every layer. They depend on nothing else, so a
  video needs them once; with them inside the other graphs, 512 text tokens were half the work of a
  small chunk.
- `ChunkTransition`: one chunk at times (t, r) on cached keys and values. Denoising is this; at t =
  r = 0 on a clean chunk, its keys and values are what the cache keeps of a recent chunk.
- `ChunkCompressor`: a clean chunk through the coarser patch embedding at t = r = 0: what the cache
  keeps of an old chunk. Only keys and values come out, so the last layer computes nothing else.

A compressed chunk sees only older compressed chunks, so its entries never change once written;
recent chunks can be run one after the other, each on what precedes it. Both are exact (measured
against the authors' code: see tests). Rotation by absolute frame position is applied before
caching.

Legend: see `transformer`; M cached tokens.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from anyflow_deploy.model.rotary import COMPRESSED
from anyflow_deploy.model.transformer import Block, FlowMapTransformer, KeyValue
from anyflow_deploy.models import Architecture


def make_compressed_embedding(a: Architecture) -> nn.Conv3d:
    """Make the coarser patch embedding, which old chunks go through."""
    assert a.compressed_patch_size is not None
    size = a.compressed_patch_size
    return nn.Conv3d(a.in_channels, a.inner_dim, size, size)


class ChunkTransition(FlowMapTransformer):
    """One transition of one chunk on cached keys and values."""

    def __init__(
        self, a: Architecture, compute_type: torch.dtype = torch.float32, fused: bool = True
    ) -> None:
        super().__init__(a, compute_type, fused)
        assert a.compressed_patch_size is not None
        self.compressed_patch = a.compressed_patch_size[1]
        self.far_patch_embedding = make_compressed_embedding(a)

    def forward(  # type: ignore[override]  # another graph, other inputs
        self, latents: Tensor, t: Tensor, r: Tensor, positions: Tensor, *memory: Tensor
    ) -> tuple[Tensor, ...]:
        """Move one chunk from t to r.

        Args:
            latents, t, r: as in `FlowMapTransformer`, for the chunk alone.
            positions: int64 (F), absolute latent frame indices.
            memory: key and value of the text (B, L, A, E) in layer 0, in layer 1, …; then the same
                (B, M, A, E) of the past.

        Returns:
            z_r, the velocity, then key and value (B, N, A, E) of each layer.
        """
        _, frames, _, height, width = latents.shape
        rotation = self.rope(frames, height // self.patch, width // self.patch, positions)
        pairs = _group_pairs(memory)
        text_kv = pairs[: len(self.blocks)]
        past = pairs[len(self.blocks) :]
        z_r, velocity, present = self.transition(latents, t, r, text_kv, rotation, past)
        return z_r, velocity, *_flatten_pairs(present)


class ChunkCompressor(ChunkTransition):
    """Computes the keys and values that the cache keeps of an old chunk."""

    def forward(self, latents: Tensor, positions: Tensor, *memory: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Compress one clean chunk.

        Args:
            latents: (B, F, C, H, W). Rows and columns beyond the last whole coarse patch are left
                out, as in training.
            positions: int64 (F), absolute latent frame indices.
            memory: as in `ChunkTransition`, the past being older compressed chunks, for all layers
                but the last.

        Returns:
            key and value (B, N, A, E) of each layer.
        """
        _, frames, _, height, width = latents.shape
        rotation = self.rope(
            frames,
            height // self.compressed_patch,
            width // self.compressed_patch,
            positions,
            COMPRESSED,
        )
        x = self.tokens(self.far_patch_embedding, latents)
        clean = latents.new_zeros(latents.shape[:2])
        _, modulation = self.embed_conditions(clean, clean)
        ones = self.get_buffer("ones")
        pairs = _group_pairs(memory)
        present = []
        layers = self.blocks[:-1]
        for block, text_kv, past in zip(
            layers, pairs[: len(layers)], pairs[len(layers) :], strict=True
        ):
            x, present_kv = block(x, text_kv, modulation, rotation, ones, past)
            present.append(present_kv)
        present.append(cast(Block, self.blocks[-1]).key_value(x, modulation, rotation, ones))
        return _flatten_pairs(present)


class TextKVEncoder(ChunkTransition):
    """Computes the prompt's keys and values in every layer."""

    def forward(self, text: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Turn prompt embeddings (B, L, text_dim) into (B, L, A, E) keys and values by layer."""
        return _flatten_pairs(list(self.text_key_values(text)))


def _flatten_pairs(pairs: list[KeyValue]) -> tuple[Tensor, ...]:
    return tuple(tensor for pair in pairs for tensor in pair)


def _group_pairs(tensors: tuple[Tensor, ...]) -> list[KeyValue]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))
