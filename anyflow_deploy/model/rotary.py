"""Rotary position embedding over frames, rows and columns, in real float32.

Wan splits a head's channels into three parts, for frame, row and column, and rotates neighbouring
pairs of channels by an angle that grows with the position (diffusers' AnyFlowRotaryPosEmbed).
diffusers multiplies complex128 numbers, which no inference runtime takes; cosine and sine tables
computed in double precision and stored in float32 give the same result to 2e-7.

Legend: P positions in the table, F frames, h rows, w columns of tokens, N = F h w, A heads, E
channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anyflow_deploy.models import Architecture

AXES = ("frames", "rows", "columns")
COMPRESSED = "_compressed"
_THETA = 10000.0


def axis_channels(head_dim: int) -> tuple[int, int, int]:
    """Split a head's channels into those that turn with frame, row and column."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotary_tables(architecture: Architecture) -> dict[str, Tensor]:
    """Compute `cos_frames`, `sin_frames`, … of `Rotary`: float32 (P, channels of axis / 2).

    Causal models have a second set for the rows and columns of compressed chunks: the mean
    direction of the positions that one coarse token covers (diffusers' `avg_pool_complex`).
    """
    positions = torch.arange(architecture.rope_max_seq_len, dtype=torch.float64)
    tables: dict[str, Tensor] = {}
    for axis, channels in zip(AXES, axis_channels(architecture.attention_head_dim), strict=True):
        frequencies = 1.0 / _THETA ** (torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        angles = torch.outer(positions, frequencies)
        directions = torch.polar(torch.ones_like(angles), angles)
        tables |= _cos_sin_tables(axis, directions)
        if architecture.compressed_patch_size is not None and axis != "frames":
            tokens_per_patch = architecture.compressed_patch_size[1] // architecture.patch_size[1]
            patches = len(directions) // tokens_per_patch
            means = (
                directions[: patches * tokens_per_patch].view(patches, tokens_per_patch, -1).mean(1)
            )
            tables |= _cos_sin_tables(f"{axis}{COMPRESSED}", means / means.abs())
    return tables


def _cos_sin_tables(name: str, directions: Tensor) -> dict[str, Tensor]:
    return {f"cos_{name}": directions.real.float(), f"sin_{name}": directions.imag.float()}


class Rotary(nn.Module):
    """Looks up the rotation of every token of a grid."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        for name, table in rotary_tables(architecture).items():
            self.register_buffer(name, torch.empty(table.shape), persistent=False)

    def forward(
        self,
        frames: int,
        rows: int,
        columns: int,
        positions: Tensor | None = None,
        suffix: str = "",
    ) -> tuple[Tensor, Tensor]:
        """Look up cosines and sines of a grid of tokens: float32 (N, 1, E/2) each.

        The 1 is for the heads.

        Args:
            frames, rows, columns: size of the grid, in tokens.
            positions: absolute indices of the frames, int64 (F); None for 0, 1, 2, …
            suffix: `COMPRESSED` for the coarser grid of old chunks.
        """
        cosines, sines = (
            self._grid(part, suffix, frames, rows, columns, positions) for part in ("cos", "sin")
        )
        return cosines, sines

    def _grid(
        self, part: str, suffix: str, frames: int, rows: int, columns: int, positions: Tensor | None
    ) -> Tensor:
        f, h, w = (
            self.get_buffer(f"{part}_{axis}{suffix if axis != 'frames' else ''}") for axis in AXES
        )
        f = f[:frames] if positions is None else f.index_select(0, positions)
        grid = (
            f.view(frames, 1, 1, -1).expand(-1, rows, columns, -1),
            h[:rows].view(1, rows, 1, -1).expand(frames, -1, columns, -1),
            w[:columns].view(1, 1, columns, -1).expand(frames, rows, -1, -1),
        )
        return torch.cat(grid, dim=-1).flatten(0, 2).unsqueeze(1)


def apply_rotary(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate each pair of channels of `x` (B, N, A, E)."""
    even, odd = x.view(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack(
        (even * cosines - odd * sines, even * sines + odd * cosines), dim=-1
    ).flatten(-2)
