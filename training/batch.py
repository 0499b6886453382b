"""What training asks of data: batches of clean latents with their text, in an order that can be taken up anywhere.

A source stands at a position in one global stream of samples, the same for all processes. With W processes of batch b, each
step takes W b samples, and process k gets those from k b on. So a run with the same global batch sees the same samples in
the same order on any number of processes, and a checkpoint stores one position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.training.times import generator, normal


@dataclass(frozen=True)
class Batch:
    """Some samples.

    Attributes:
        latents: clean, float32 (B, F, C, H, W), scaled as the VAE's `latents_mean` and `latents_std` ask.
        text: prompt embeddings, (B, L, D).
        negative_text: embeddings of the empty (or negative) prompt, (1, L, D) or (B, L, D).
        names: of the samples, for error messages.
    """

    latents: Tensor
    text: Tensor
    negative_text: Tensor
    names: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """On a device, in float32, with a negative text for every sample."""
        text = self.text.to(device, torch.float32)
        negative = self.negative_text.to(device, torch.float32).expand_as(text)
        return Batch(self.latents.to(device, torch.float32), text, negative, self.names)


class Source(Protocol):
    """An endless stream of batches, see the module's text."""

    def __iter__(self) -> Iterator[Batch]:
        """This process's batches, from the position on."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position behind the batch that was given last; JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position, maybe of a run with another number of processes."""
        ...

    def check(self) -> str:
        """Look at the first and the last of the data; a line that describes it.

        Raises:
            AnyFlowError: something is missing, broken, or of another shape than the recipe's.
        """
        ...


@dataclass(frozen=True)
class Part:
    """Which part of each step's samples this process takes."""

    rank: int
    world: int
    batch: int


OpenSource = Callable[[Part], Source]


class SyntheticLatents:
    """Smooth blobs that wander through latent space, one kind for each of a few prompts: nothing to download or decode.

    For tests and for trying a setup. Sample i is a function of (seed, i).

    Args:
        part: of this process.
        shape: (F, C, H, W) of the latents.
        text: (L, D) of the prompt embeddings.
        seed: of everything.
        prompts: how many kinds there are.
    """

    def __init__(
        self, part: Part, shape: tuple[int, int, int, int], text: tuple[int, int], seed: int = 0, prompts: int = 8
    ) -> None:
        self._part, self._shape, self._text, self._seed, self._prompts = part, shape, text, seed, prompts
        self._position = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            part = self._part
            first = self._position + part.rank * part.batch
            samples = [self._sample(first + i) for i in range(part.batch)]
            self._position += part.world * part.batch
            latents, texts, names = zip(*samples, strict=True)
            yield Batch(torch.stack(latents), torch.stack(texts), torch.zeros(1, *self._text), tuple(names))

    def state_dict(self) -> dict[str, Any]:
        """See `Source`."""
        return {"samples": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Source`."""
        position = state.get("samples")
        if not isinstance(position, int) or position < 0:
            raise AnyFlowError(f"the checkpoint's data position is {state}; synthetic data has {{'samples': number}}.")
        self._position = position

    def check(self) -> str:
        """See `Source`."""
        return f"synthetic latents {self._shape}, {self._prompts} prompts"

    def _sample(self, index: int) -> tuple[Tensor, Tensor, str]:
        frames, channels, height, width = self._shape
        kind = index % self._prompts
        random = generator(self._seed, "synthetic", index)
        start, speed = torch.rand(2, generator=random), 0.1 * torch.randn(2, generator=random)
        where = (start + torch.arange(frames)[:, None] * speed) % 1.0
        rows, columns = torch.linspace(0, 1, height), torch.linspace(0, 1, width)
        far = (rows[:, None] - where[:, :1, None]).square() + (columns - where[:, 1:, None]).square()
        blob = torch.exp(-far / 0.05)[:, None]
        colour = normal((channels, 1, 1), self._seed, "colour", kind)
        return 1.5 * blob * colour - 0.3 * colour, normal(self._text, self._seed, "text", kind), f"synthetic-{index}"
