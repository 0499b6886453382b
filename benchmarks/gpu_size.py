"""What `gpu.py` runs: the released 1.3B models at 480p, or toys."""

from __future__ import annotations

import dataclasses

from anyflow_deploy import MODELS, Architecture


@dataclasses.dataclass(frozen=True)
class Size:
    """What is run.

    Attributes:
        model, causal: rows of the model table.
        latents, causal_latents: (1, F, C, H, W).
        text: (1, L, D).
        peak: side of the large product, elements of the copy.
    """

    model: Architecture
    causal: Architecture
    latents: tuple[int, ...]
    causal_latents: tuple[int, ...]
    text: tuple[int, ...]
    peak: tuple[int, int]

    @property
    def tokens(self) -> int:
        """Video tokens of `latents`, in patches of 2 by 2."""
        return self.latents[1] * (self.latents[3] // 2) * (self.latents[4] // 2)


def sizes(tiny: bool, layers: int | None) -> Size:
    """The released 1.3B at 480p, or toys."""
    if tiny:
        model = MODELS["tiny"].architecture
        causal = MODELS["far-tiny"].architecture
        frames = sum(causal.chunk_partition or ())
        video = (1, 3, 16, 8, 12)
        clip = (1, frames, 16, 8, 16)
        words = 32
        peak = (256, 1 << 20)
    else:
        model = MODELS["1.3b"].architecture
        causal = MODELS["far-1.3b"].architecture
        video = (1, 21, 16, 60, 104)
        clip = (1, 21, 16, 60, 104)
        words = 512
        peak = (8192, 1 << 29)
    if layers is not None:
        model, causal = (dataclasses.replace(a, num_layers=layers) for a in (model, causal))
    return Size(model, causal, video, clip, (1, words, model.text_dim), peak)
