"""The built-in data: moving shapes as latents, with embeddings of their captions.

It needs neither VAE nor text encoder.

A fixed linear map takes the place of Wan's VAE. A latent frame is the scene at the middle of the
video frames it stands for. Each of its cells is drawn as 2 x 2 pixels; their mean and their
differences down, across and both (a Haar transform), each in three colours, are the first twelve
channels, and further ones are fixed mixtures of these. They are scaled to about unit spread, as the
VAE's latents are.

A caption's embedding has one row for each word, the same for every seed, and zeros behind. Where
there are fewer rows than words, several words are added up in one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.models import TEMPORAL_FACTOR
from anyflow_deploy.training.data.moving_shapes import make_scene, render_scene
from anyflow_deploy.training.data.source import Batch, DataShard
from anyflow_deploy.training.timestep_sampling import seeded_normal

_HAAR = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 4
_MEAN = (0.13, 0.0, 0.0, 0.0)
_SPREAD = (0.18, 0.046, 0.046, 0.02)
"""Mean and spread of the four Haar bands over many scenes on 8 x 12 cells, rounded."""

_WORD_SEED = 0
"""Seed of words and mixtures. It is not the run's: a flow map with seed 1 has to use the same words
as a teacher with seed 0."""


def scene_latents(seed: int, index: int, shape: tuple[int, int, int, int]) -> Tensor:
    """Return the latents of scene `index`, float32 (F, C, H, W) = `shape`."""
    frames, channels, height, width = shape
    # The first latent frame stands for one video frame only
    times = (torch.arange(frames) * TEMPORAL_FACTOR - (TEMPORAL_FACTOR - 1) / 2).clamp(min=0)
    fine = render_scene(make_scene(seed, index), times, 2 * height, 2 * width)
    cells = (
        fine.view(frames, height, 2, width, 2, 3)
        .permute(0, 2, 4, 5, 1, 3)
        .reshape(frames, 4, 3, height, width)
    )
    bands = torch.einsum("bp,fpchw->fbchw", _HAAR, cells)
    mean, spread = (torch.tensor(numbers)[:, None, None, None] for numbers in (_MEAN, _SPREAD))
    first = ((bands - mean) / spread).reshape(frames, 12, height, width)
    if channels <= 12:
        return first[:, :channels].contiguous()
    mixing = seeded_normal((channels - 12, 12), _WORD_SEED, "mixing") / 12**0.5
    return torch.cat([first, torch.einsum("mk,fkhw->fmhw", mixing, first)], 1)


def caption_embedding(caption: str, text: tuple[int, int]) -> Tensor:
    """Return the embedding of a caption, float32 (L, D) = `text`."""
    result = torch.zeros(text)
    for number, word in enumerate(caption.split()):
        result[number % text[0]] += seeded_normal(text[1:], _WORD_SEED, "word", word)
    return result


class SyntheticLatents:
    """The synthetic data set as a `DataSource` without end; sample i is a function of (seed, i).

    Args:
        part: of this process.
        shape: (F, C, H, W) of the latents.
        text: (L, D) of the prompt embeddings.
        seed: of the scenes.
    """

    def __init__(
        self,
        part: DataShard,
        shape: tuple[int, int, int, int],
        text: tuple[int, int],
        seed: int = 0,
    ) -> None:
        self._part = part
        self._shape = shape
        self._text = text
        self._seed = seed
        self._position = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            part = self._part
            first = self._position + part.rank * part.batch
            numbers = range(first, first + part.batch)
            self._position += part.world * part.batch
            yield self.batch(list(numbers))

    def batch(self, indices: list[int]) -> Batch:
        """Return the samples of these indices."""
        captions = [make_scene(self._seed, i).caption for i in indices]
        latents = torch.stack([scene_latents(self._seed, i, self._shape) for i in indices])
        text = torch.stack([caption_embedding(caption, self._text) for caption in captions])
        return Batch(
            latents,
            text,
            torch.zeros(1, *self._text),
            tuple(f"synthetic-{i}" for i in indices),
            tuple(captions),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch, as JSON values."""
        return {"samples": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the position, which may be of a run with another number of processes.

        Raises:
            AnyFlowError: the position is not one of synthetic data.
        """
        position = state.get("samples")
        if not isinstance(position, int) or position < 0:
            raise AnyFlowError(
                f"the checkpoint's data position is {state}; synthetic data has {{'samples':"
                " number}."
            )
        self._position = position

    def pop_broken_samples(self) -> list[str]:
        """Return an empty list: no sample is broken."""
        return []

    def check(self) -> str:
        """Return a line that describes the data."""
        return f"moving shapes, latents {self._shape}"
