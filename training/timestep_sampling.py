"""Random draws: the times that are trained, and their weights.

Every draw is a function of (seed, purpose, step, sample): it depends neither on earlier draws nor
on the process. So there is no state of a random generator to save, a run that was killed resumes
with the same numbers, and a sample gets the same noise on one GPU and on eight.

All times are float32 timesteps, 0 (clean) to 1000 (noise); s = t / 1000.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from anyflow_deploy.schedule import TRAIN_TIMESTEPS

DIFFUSION_SHARE = 0.5
"""Fraction of the global batch with r = t: plain flow matching."""

CLEAN_SHARE = 0.25
"""Fraction of the global batch with r = 0: transitions to the clean sample."""


def seeded_generator(seed: int, *keys: object) -> torch.Generator:
    """Return a generator whose seed is a hash of the seed and the keys."""
    digest = hashlib.sha256("/".join(map(str, (seed, *keys))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def seeded_normal(shape: Sequence[int], seed: int, *keys: object) -> Tensor:
    """Return standard normal numbers, float32, from a generator of the seed and the keys."""
    return torch.randn(tuple(shape), generator=seeded_generator(seed, *keys))


def shift_times(s: Tensor, shift: float) -> Tensor:
    """Shift times s, 0 to 1, like `schedule.shift_sigmas` does for arrays."""
    return shift * s / (shift * s + (1 - s))


def sample_flow_map_times(count: int, shift: float, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Return t and r of every sample of the global batch of one optimizer step.

    t and r are the larger and smaller of two uniforms, shifted; then half of the samples get r = t
    and a quarter r = 0. The fractions are drawn systematically: one random offset, then equal
    strides. So they are exact on average for any size (a global batch of 2 has an r = 0 sample
    every other step), and nearly exact in each step for large ones.

    The r = t samples come first, because the loss of the others is scaled to their mean loss.

    Returns:
        float32 (count) twice, in timesteps.
    """
    random = seeded_generator(seed, "flow-map", step)
    offset = torch.rand((), generator=random, dtype=torch.float64)
    place = (torch.arange(count, dtype=torch.float64) + offset) / count
    pair = torch.rand(count, 2, generator=random, dtype=torch.float64)
    t = shift_times(pair.amax(1), shift)
    r = shift_times(pair.amin(1), shift)
    r = torch.where(place < DIFFUSION_SHARE, t, r)
    r = torch.where(
        (place >= DIFFUSION_SHARE) & (place < DIFFUSION_SHARE + CLEAN_SHARE), torch.zeros_like(r), r
    )
    return (TRAIN_TIMESTEPS * t).float(), (TRAIN_TIMESTEPS * r).float()


def sample_uniform_times(count: int, shift: float, seed: int, step: int) -> Tensor:
    """Return shifted uniform t, float32 (count), at which DMD compares the two scores."""
    s = torch.rand(count, generator=seeded_generator(seed, "uniform", step), dtype=torch.float64)
    return (TRAIN_TIMESTEPS * shift_times(s, shift)).float()


def sample_logit_normal_times(
    count: int, shift: float, seed: int, purpose: str, step: int
) -> Tensor:
    """Return shifted logit-normal t, float32 (count).

    They are for flow matching of the teacher and of the fake score.
    """
    s = torch.randn(
        count, generator=seeded_generator(seed, purpose, step), dtype=torch.float64
    ).sigmoid()
    return (TRAIN_TIMESTEPS * shift_times(s, shift)).float()


@functools.cache
def _weights(shift: float) -> tuple[Tensor, Tensor]:
    """Return the 1001 shifted times from 0 to 1, and the weight of each.

    The weight is s sqrt(1 - s), and all of them sum to 1000.
    """
    grid = shift_times(torch.linspace(0, 1, 1001, dtype=torch.float64), shift)
    weight = grid * (1 - grid).clamp(min=0).sqrt()
    return grid, weight * (TRAIN_TIMESTEPS / weight.sum())


def time_weight(t: Tensor, shift: float) -> Tensor:
    """Return w(t) of the flow-map loss, float32 like `t` (timesteps).

    It is the weight of the nearest point of the shifted grid.
    """
    grid, weight = _weights(shift)
    s = t.detach().double().cpu() / TRAIN_TIMESTEPS
    upper = torch.searchsorted(grid, s).clamp(1, len(grid) - 1)
    nearest = torch.where(s - grid[upper - 1] <= grid[upper] - s, upper - 1, upper)
    return weight[nearest].float().to(t.device)
