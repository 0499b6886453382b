"""Rotary position embedding over frames, rows and columns, in real float32.

Wan splits a head's channels into three parts, for frame, row and column, and rotates neighbouring pairs of channels by
an angle that grows with the position (diffusers' AnyFlowRotaryPosEmbed). diffusers multiplies complex128 numbers, which
no inference runtime takes; cosine and sine tables computed in double precision and stored in float32 give the same
result to 2e-7.

Legend: P positions in the table, F frames, h rows, w columns of tokens, N = F h w, A heads, E channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anyflow_deploy.models import Architecture

AXES = ("frames", "rows", "columns")
_THETA = 10000.0


def axis_channels(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's channels turn with the frame, the row and the column."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotary_tables(architecture: Architecture) -> dict[str, Tensor]:
    """The constants `cos_frames`, `sin_frames`, … of `Rotary`: each float32 (P, channels of the axis / 2)."""
    positions = torch.arange(architecture.rope_max_seq_len, dtype=torch.float64)
    tables = {}
    for axis, channels in zip(AXES, axis_channels(architecture.attention_head_dim), strict=True):
        frequencies = 1.0 / _THETA ** (torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        angles = torch.outer(positions, frequencies)
        tables[f"cos_{axis}"] = angles.cos().float()
        tables[f"sin_{axis}"] = angles.sin().float()
    return tables


class Rotary(nn.Module):
    """Looks up the rotation of every token of a grid."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        channels = axis_channels(architecture.attention_head_dim)
        for axis, count in zip(AXES, channels, strict=True):
            for part in ("cos", "sin"):
                table = torch.empty(architecture.rope_max_seq_len, count // 2)
                self.register_buffer(f"{part}_{axis}", table, persistent=False)

    def forward(self, frames: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a grid of tokens, each float32 (N, 1, E/2): the 1 is for the heads."""
        return self._grid("cos", frames, rows, columns), self._grid("sin", frames, rows, columns)

    def _grid(self, part: str, frames: int, rows: int, columns: int) -> Tensor:
        f, h, w = (self.get_buffer(f"{part}_{axis}") for axis in AXES)
        grid = (
            f[:frames].view(frames, 1, 1, -1).expand(-1, rows, columns, -1),
            h[:rows].view(1, rows, 1, -1).expand(frames, -1, columns, -1),
            w[:columns].view(1, 1, columns, -1).expand(frames, rows, -1, -1),
        )
        return torch.cat(grid, dim=-1).flatten(0, 2).unsqueeze(1)


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate each pair of channels of `x` (B, N, A, E)."""
    even, odd = x.view(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cosines - odd * sines, even * sines + odd * cosines), dim=-1).flatten(-2)
