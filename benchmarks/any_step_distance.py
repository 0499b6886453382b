"""Two distances between sets of latents with captions: generated samples and data.

**Fréchet** distance over fixed random features: two layers of convolutions with random weights,
averaged over the frame, with a random projection of the caption's embedding beside them, all in
units of their standard deviation over the data. So it is a distance of videos *and* captions
together: a model that ignores the caption is far away however good its videos look. Zero for equal
distributions, and above zero for two finite sets of the same one: that floor is measured, too.

**Sliced Wasserstein** distance of the latents as they are, captions aside: root mean square over
random directions of the distance between the sorted projections.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow_deploy.training.timestep_sampling import seeded_normal

CHANNELS = (48, 64)
"""Of the two layers of random features."""

WORDS = 16
"""Numbers that stand for the caption."""

SLICES = 256


@dataclass(frozen=True)
class VideoSet:
    """Some videos.

    Attributes:
        latents: float32 (N, F, C, H, W).
        text: embeddings of their captions, float32 (N, L, D).
    """

    latents: Tensor
    text: Tensor


def distances(generated: VideoSet, data: VideoSet) -> dict[str, float]:
    """Return both distances by name; the sets have the same size."""
    generated_features, reference = features(generated), features(data)
    unit = reference.std(0)
    # A channel that hardly fires must not decide.
    unit = unit.clamp(min=float(unit[: CHANNELS[1]].median()) / 4)
    return {
        "frechet": frechet(generated_features / unit, reference / unit),
        "sliced_wasserstein": sliced_wasserstein(generated.latents, data.latents),
    }


@torch.no_grad()
def features(videos: VideoSet) -> Tensor:
    """Return random features, float64 (N, 80), the same ones in every run."""
    frames, channels = videos.latents.shape[1:3]
    first = (
        seeded_normal((CHANNELS[0], frames * channels, 3, 3), 0, "features", 1)
        / (9 * frames * channels) ** 0.5
    )
    second = (
        seeded_normal((CHANNELS[1], CHANNELS[0], 3, 3), 0, "features", 2)
        / (9 * CHANNELS[0] / 2) ** 0.5
    )
    bias = seeded_normal((CHANNELS[0],), 0, "features", "bias") / 2
    # The scenes live on a torus
    x = F.pad(videos.latents.flatten(1, 2), (1, 1, 1, 1), mode="circular")
    x = F.pad(F.relu(F.conv2d(x, first, bias)), (1, 1, 1, 1), mode="circular")
    x = F.relu(F.conv2d(x, second)).mean((2, 3))
    words = videos.text.flatten(1) @ seeded_normal(
        (videos.text[0].numel(), WORDS), 0, "features", "words"
    )
    return torch.cat([x, words], 1).double()


def frechet(first: Tensor, second: Tensor) -> float:
    """Return the distance of two normal distributions with the moments of two sets (N, K)."""
    means, covariances = zip(*((x.mean(0), torch.cov(x.T)) for x in (first, second)), strict=True)
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    return float(
        (means[0] - means[1]).square().sum()
        + covariances[0].trace()
        + covariances[1].trace()
        - 2 * cross
    )


def sliced_wasserstein(first: Tensor, second: Tensor) -> float:
    """Return the distance between two sets of latents of the same size."""
    directions = F.normalize(seeded_normal((first[0].numel(), SLICES), 0, "slices"), dim=0)
    a, b = ((x.flatten(1) @ directions).sort(0).values for x in (first, second))
    return float((a - b).square().mean().sqrt())
