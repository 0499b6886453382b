"""The interface of training data: batches of clean latents with their text, in a fixed order.

A source has a position in one global stream of samples, the same for all processes. With W
processes of batch b, each step takes W b samples, and process k gets those from k b on. So a run
with the same global batch sees the same samples in the same order on any number of processes, and a
checkpoint stores one position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Some samples.

    Attributes:
        latents: clean, float32 (B, F, C, H, W), scaled as the VAE's `latents_mean` and
            `latents_std` ask.
        text: prompt embeddings, (B, L, D).
        negative_text: embeddings of the empty (or negative) prompt, (1, L, D) or (B, L, D).
        names: of the samples, for error messages.
        captions: of the samples, for sample grids; may be missing.
    """

    latents: Tensor
    text: Tensor
    negative_text: Tensor
    names: tuple[str, ...]
    captions: tuple[str, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device, in float32, with a negative text for every sample."""
        text = self.text.to(device, torch.float32)
        negative = self.negative_text.to(device, torch.float32).expand_as(text)
        return Batch(
            self.latents.to(device, torch.float32), text, negative, self.names, self.captions
        )


class DataSource(Protocol):
    """An endless stream of batches with a position."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield this process's batches, from the position on."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch, as JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the position, which may be of a run with another number of processes."""
        ...

    def pop_broken_samples(self) -> list[str]:
        """Return the broken samples since the last call, each with its reason."""
        ...

    def check(self) -> str:
        """Check the first and the last of the data, and return a line that describes it.

        Raises:
            AnyFlowError: something is missing, broken, or of another shape than the recipe's.
        """
        ...


@dataclass(frozen=True)
class DataShard:
    """The part of each step's samples that this process takes."""

    rank: int
    world: int
    batch: int


OpenSource = Callable[[DataShard], DataSource]
