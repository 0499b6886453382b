"""Flow-map backward simulation: samples of any number of steps in at most three forwards.

One index g of the N-step schedule is drawn. A flow map can skip times, so the roll-out runs

    s_0 -> s_g,   s_g -> s_{g+1},   s_{g+1} -> 0

(empty transitions are skipped), all of them with gradient. So the errors of all N-step trajectories
are covered, at a cost that does not grow with N, and the result is a clean sample, never a
half-denoised one. A causal model generates every chunk this way, one after the other; a finished
chunk is encoded for later ones without gradient, into tensors that are never overwritten.

Checked against the authors' code: `shortcut_bcthw_N_g` of the causal golden vectors.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from anyflow_deploy.schedule import TRAIN_TIMESTEPS, Schedule
from anyflow_deploy.training.chunks import ChunkPlan, compress_chunks, encode_recent
from anyflow_deploy.training.model.network import KVCache, TrainingTransformer
from anyflow_deploy.training.timestep_sampling import seeded_generator

Transition = tuple[float, float]


def shortcut(steps: int, index: int, shift: float) -> list[Transition]:
    """Return the pairs (t, r), in timesteps, of the roll-out to step `index` of `steps`."""
    times = Schedule.uniform(steps, shift).timesteps
    stops = (times[0], times[index], times[index + 1], times[-1])
    return [(t, r) for t, r in itertools.pairwise(stops) if t > r]


def sample_shortcut(
    choices: tuple[int, ...], shift: float, seed: int, step: int | str
) -> list[Transition]:
    """Draw steps and index, and return their `shortcut`: the same on all processes."""
    random = seeded_generator(seed, "shortcut", step)
    steps = choices[int(torch.randint(len(choices), (), generator=random))]
    return shortcut(steps, int(torch.randint(steps, (), generator=random)), shift)


def rollout(
    network: TrainingTransformer,
    noise: Tensor,
    text: Tensor,
    plan: ChunkPlan,
    transitions: list[Transition],
) -> Tensor:
    """Generate samples from noise.

    Args:
        noise: of all frames, float32 (B, F, C, H, W).
        text: prompt embeddings (B, L, D).
        plan: the chunks, which are generated in order.
        transitions: of every chunk; from `shortcut`, or `Schedule.transitions` to sample with all
            steps.

    Returns:
        Clean latents, float32 (B, F, C, H, W), with gradient where the caller has it switched on.
    """
    clean_chunks: list[Tensor] = []
    compressed: KVCache = []
    memory: KVCache = []
    for chunk in range(len(plan.chunks)):
        start, stop = plan.frame_range(chunk)
        if chunk:
            head = plan.head(chunk + 1)
            with torch.no_grad():
                clean = torch.cat(clean_chunks, dim=1)
                compressed = compress_chunks(
                    network,
                    clean,
                    text,
                    plan,
                    range(plan.head(chunk).first, head.first),
                    compressed,
                )
                memory = encode_recent(network, clean, text, head, compressed)
        positions = torch.arange(start, stop, device=noise.device)
        clean_chunks.append(
            _denoise_chunk(network, noise[:, start:stop], text, transitions, positions, memory)
        )
    return torch.cat(clean_chunks, dim=1)


def _denoise_chunk(
    network: TrainingTransformer,
    z: Tensor,
    text: Tensor,
    transitions: list[Transition],
    positions: Tensor,
    memory: KVCache,
) -> Tensor:
    """Take one chunk from noise to clean."""
    for t, r in transitions:
        times = (torch.full(z.shape[:2], s, dtype=torch.float32, device=z.device) for s in (t, r))
        z = z - (t - r) / TRAIN_TIMESTEPS * network(z, *times, text, positions, memory)
    return z
