"""The causal (FAR) model as two traceable modules, without a mask.

AnyFlow-FAR makes video chunk by chunk; a chunk attends to a cache of what came before, and everything in the cache is
visible to it, so no mask is needed. Two graphs share one set of weights:

- `ChunkTransition`: one chunk at times (t, r) on cached keys and values. Denoising is this; at t = r = 0 on a clean chunk,
  its keys and values are what the cache keeps of a recent chunk.
- `Compression`: a clean chunk through the coarser patch embedding at t = r = 0: what the cache keeps of an old chunk. Only
  keys and values come out, so the last layer computes nothing else.

A compressed chunk sees only older compressed chunks, so its entries never change once written; recent chunks can be run
one after the other, each on what precedes it. Both are exact (measured against the authors' code: see tests).
Rotation by absolute frame position is applied before caching.

Legend: see `transformer`; M cached tokens.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from anyflow_deploy.export.rotary import COMPRESSED
from anyflow_deploy.export.transformer import Block, FlowMapTransformer, KeyValue
from anyflow_deploy.models import Architecture


class ChunkTransition(FlowMapTransformer):
    """One transition of one chunk, see the module's text."""

    def __init__(self, a: Architecture, compute_type: torch.dtype = torch.float32, fused: bool = True) -> None:
        super().__init__(a, compute_type, fused)
        assert a.compressed_patch_size is not None
        self.far_patch = a.compressed_patch_size[1]
        self.far_patch_embedding = nn.Conv3d(a.in_channels, a.inner_dim, a.compressed_patch_size, a.compressed_patch_size)

    def forward(  # type: ignore[override]  # another graph, other inputs
        self, latents: Tensor, t: Tensor, r: Tensor, text: Tensor, positions: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """One transition.

        Args:
            latents, t, r, text: as in `FlowMapTransformer`, for the chunk alone.
            positions: int64 (F), absolute latent frame indices.
            past: key and value (B, M, A, E) of layer 0, of layer 1, …

        Returns:
            z_r, the velocity, then key and value (B, N, A, E) of each layer.
        """
        _, frames, _, height, width = latents.shape
        rotation = self.rope(frames, height // self.patch, width // self.patch, positions)
        z_r, velocity, present = self.transition(latents, t, r, text, rotation, _pairs(past))
        return z_r, velocity, *(tensor for pair in present for tensor in pair)


class Compression(ChunkTransition):
    """Keys and values of an old chunk, see the module's text."""

    def forward(self, latents: Tensor, text: Tensor, positions: Tensor, *past: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Compress one clean chunk.

        Args:
            latents: (B, F, C, H, W).
            text: (B, L, text_dim).
            positions: int64 (F), absolute latent frame indices.
            past: key and value (B, M, A, E) of the older compressed chunks, for all layers but the last.

        Returns:
            key and value (B, N, A, E) of each layer.
        """
        _, frames, _, height, width = latents.shape
        rotation = self.rope(frames, height // self.far_patch, width // self.far_patch, positions, COMPRESSED)
        x = self.tokens(self.far_patch_embedding, latents)
        clean = latents.new_zeros(latents.shape[:2])
        _, modulation, words = self.conditions(clean, clean, text)
        ones, pairs, present = self.get_buffer("ones"), _pairs(past), []
        for index, block in enumerate(self.blocks[:-1]):
            x, own = block(x, words, modulation, rotation, ones, pairs[index])
            present.append(own)
        present.append(cast(Block, self.blocks[-1]).key_value(x, modulation, rotation, ones))
        return tuple(tensor for pair in present for tensor in pair)


def _pairs(tensors: tuple[Tensor, ...]) -> list[KeyValue]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))
