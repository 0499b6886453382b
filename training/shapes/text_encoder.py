"""Trains the text encoder of the `shapes` models: UMT5's architecture, small, on captions.

It learns by answering questions about a caption: which colour the first shape has, which way it
moves, what is behind what. A few attention queries read the answers out of its output, so every
answer has to stand in some token of it. Afterwards the queries are thrown away, the encoder is
frozen, and the transformers learn from its output, as Wan's did from UMT5's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyflow_deploy.checkpoints.tiny import build_tokenizer
from anyflow_deploy.progress import Progress
from anyflow_deploy.training.data.moving_shapes import COLOURS, DIRECTIONS, SHAPES, SPEEDS
from anyflow_deploy.training.shapes.module_trainer import ModuleRun, train_module
from anyflow_deploy.training.shapes.scenes import GROUNDS, NOUNS, VERBS, Scene, Thing, make_scene

WIDTH = 64
"""Channels of an embedding (`text_dim` of the transformers)."""

_BATCH = 64
_NONE = "none"

QUESTIONS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "direction": (_NONE, *DIRECTIONS),
    "speed": (_NONE, *SPEEDS),
    "other colour": (_NONE, *COLOURS),
    "other shape": (_NONE, *SHAPES),
    "relation": (_NONE, "behind", "in front of", "and"),
    "ground": (_NONE, *GROUNDS),
    "camera": (_NONE, "pan", "zoom"),
    "camera direction": (_NONE, *DIRECTIONS, "in", "out"),
    "camera speed": (_NONE, *SPEEDS),
}
"""What is asked about a caption, and the answers. The first shape is the one that moves, or the
first that is named."""


def caption_words() -> list[str]:
    """Return every word of the captions, sorted."""
    words = {"a", "and", "the", "camera", "pans", "zooms", "in", "out", "front", "of", "behind"}
    words |= {"on", "ground", *COLOURS, *DIRECTIONS, *SPEEDS, *GROUNDS}
    for names in (*NOUNS.values(), *VERBS.values()):
        words |= set(names)
    return sorted(words)


def build_caption_tokenizer() -> Any:
    """Build a tokenizer with a token for every word of the captions."""
    return build_tokenizer(caption_words())


def build_text_encoder(vocabulary: int, seed: int) -> Any:
    """Build an untrained `UMT5EncoderModel` with 0.1 million parameters."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=WIDTH,
        d_kv=16,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UMT5EncoderModel(config)


def answer(scene: Scene) -> dict[str, str]:
    """Return the right answer to every question about a scene's caption."""
    first, other = scene.subject, scene.other
    camera = scene.camera
    words = scene.caption.replace(",", "").split()
    return {
        "colour": first.colour,
        "shape": first.shape,
        "direction": first.direction or _NONE,
        "speed": _named(first.speed, words, first),
        "other colour": other.colour if other else _NONE,
        "other shape": other.shape if other else _NONE,
        "relation": scene.relation or _NONE,
        "ground": scene.ground_name or _NONE,
        "camera": camera.move if camera else _NONE,
        "camera direction": camera.direction if camera else _NONE,
        "camera speed": (camera.speed if camera else None) or _NONE,
    }


def _named(speed: str | None, words: Sequence[str], thing: Thing) -> str:
    """Return the speed, where the caption has it."""
    return speed if speed is not None and thing.direction and speed in words else _NONE


class CaptionReader(nn.Module):
    """An encoder, and the queries that read answers out of its output.

    Args:
        encoder: from `build_text_encoder`.
        tokenizer: from `build_caption_tokenizer`.
    """

    def __init__(self, encoder: Any, tokenizer: Any, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenizer = tokenizer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.queries = nn.Parameter(torch.randn(len(QUESTIONS), WIDTH))
            self.heads = nn.ModuleList(nn.Linear(WIDTH, len(a)) for a in QUESTIONS.values())

    def forward(self, captions: Sequence[str]) -> list[Tensor]:
        """Return the logits of each question's answers, float32 (captions, answers)."""
        batch = self.tokenizer(list(captions), padding=True, return_tensors="pt")
        mask = batch.attention_mask
        tokens = self.encoder(batch.input_ids, attention_mask=mask).last_hidden_state
        scores = torch.einsum("qd,bld->bql", self.queries, tokens) / WIDTH**0.5
        weights = scores.masked_fill(mask[:, None] == 0, -torch.inf).softmax(-1)
        read = weights @ tokens
        return [head(read[:, number]) for number, head in enumerate(self.heads)]


def train_text_encoder(
    reader: CaptionReader, folder: Path, seed: int, steps: int, progress: Progress
) -> None:
    """Train an encoder, and the queries that read it, in place."""

    def loss_of_step(step: int) -> Tensor:
        scenes = [make_scene(seed, _BATCH * step + i) for i in range(_BATCH)]
        return _loss(reader, scenes)

    run = ModuleRun("text encoder", steps, 2e-3, folder / "text_encoder.safetensors")
    train_module(reader, run, loss_of_step, progress)


def _loss(reader: CaptionReader, scenes: Sequence[Scene]) -> Tensor:
    logits: list[Tensor] = reader([scene.caption for scene in scenes])
    losses = [F.cross_entropy(v, t) for v, t in zip(logits, _targets(scenes), strict=True)]
    return torch.stack(losses).mean()


def _targets(scenes: Sequence[Scene]) -> list[Tensor]:
    """Return the number of the right answer to each question, int64 (scenes)."""
    answers = [answer(scene) for scene in scenes]
    return [
        torch.tensor([choices.index(a[question]) for a in answers])
        for question, choices in QUESTIONS.items()
    ]


@torch.no_grad()
def measure_text_encoder(reader: CaptionReader, seed: int, count: int = 512) -> float:
    """Return the share of held-out captions of which every question is answered right."""
    scenes = [make_scene(seed, i, held_out=True) for i in range(count)]
    logits = reader([scene.caption for scene in scenes])
    right = torch.stack(
        [values.argmax(1) == t for values, t in zip(logits, _targets(scenes), strict=True)]
    )
    return float(right.all(0).float().mean())
