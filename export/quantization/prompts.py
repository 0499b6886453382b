"""Calibration prompts and their embeddings.

Where the checkpoint is a pipeline, its own text encoder embeds the prompts. Where there is none
(random weights, a bare transformer folder), seeded standard-normal numbers replace it, in the
layout that the network knows: words first, zeros behind. Activations of real text differ from
those, so a calibration records which of the two it used.

The zeros are most of a text's 512 rows, and all alike: `collapse_padding` leaves one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from anyflow_deploy.checkpoints.checkpoint import pipeline_folder
from anyflow_deploy.checkpoints.hub import PIPELINE_FILES, download
from anyflow_deploy.checkpoints.weights import Weights
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.sampler import noise
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.models import TEXT_TOKENS
from anyflow_deploy.pipelines.prompt_file import read_prompts as read_prompts

PROMPTS = (
    "a red fox trots through fresh snow at dawn",
    "waves break on black rocks, seen from a drone",
    "close-up of an old fisherman laughing, handheld camera",
    "neon signs mirrored in a wet street, people with umbrellas",
    "a cartoon robot waters tomatoes on a balcony",
    "ink drops unfold in clear water, slow motion, white background",
    "a crowded market in bright sun, the camera pans left",
    "the night sky turns above a lone tree",
)
"""Animals, people, cities, drawings, textures; bright and dark, still and moving. Ranges depend
little on the prompts."""

_PARTS = ("tokenizer", "text_encoder")
_RANDOM_WORDS = 32


@dataclass(frozen=True)
class CalibrationPrompts:
    """Prompts and their embeddings.

    Attributes:
        prompts: the texts.
        prompt_embeds: float32 (prompts, L, D).
        source: "encoder", or "random" where there was no text encoder.
    """

    prompts: tuple[str, ...]
    prompt_embeds: Array
    source: Literal["encoder", "random"]


def embed_prompts(
    weights: Weights, prompts: tuple[str, ...] = PROMPTS, tokens: int = TEXT_TOKENS
) -> CalibrationPrompts:
    """Embed prompts with the weights' text encoder, or with random numbers where there is none.

    Raises:
        AnyFlowError: no prompt, an empty one, or one that is too long.
        CheckpointError: the Hub does not give the text encoder.
    """
    from anyflow_deploy.pipelines.text_encoder import encode_prompts

    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise AnyFlowError(
            "there is an empty prompt, or none at all; describe each video in a sentence."
        )
    folder = _find_text_encoder(weights)
    if folder is not None:
        return CalibrationPrompts(prompts, encode_prompts(folder, list(prompts), tokens), "encoder")
    return random_prompt_embeds(weights, prompts, tokens)


def random_prompt_embeds(
    weights: Weights, prompts: tuple[str, ...], tokens: int = TEXT_TOKENS
) -> CalibrationPrompts:
    """Return seeded standard-normal embeddings, float32 (prompts, L, D).

    They do not depend on the prompts' words.
    """
    prompt_embeds = np.zeros((len(prompts), tokens, weights.architecture.text_dim), np.float32)
    for index in range(len(prompts)):
        token_embeds = noise(
            (min(tokens, _RANDOM_WORDS), weights.architecture.text_dim), seed=index
        )
        prompt_embeds[index, : len(token_embeds)] = token_embeds
    return CalibrationPrompts(prompts, prompt_embeds, "random")


def collapse_padding(prompt_embeds: Array) -> tuple[Array, int]:
    """Cut the zeros behind the longest prompt down to one row.

    Equal rows have equal keys and values, so one row can stand for all of them in an attention
    (`observers.insert_observers`).

    Args:
        prompt_embeds: float32 (prompts, L, D).

    Returns:
        The shorter embeddings, and how many rows the last one stands for: 1 where nothing was cut.
    """
    rows = prompt_embeds.shape[1]
    used = np.flatnonzero(prompt_embeds.any(axis=(0, 2)))
    words = int(used[-1]) + 1 if len(used) else 1
    if words >= rows - 1:
        return prompt_embeds, 1
    return prompt_embeds[:, : words + 1], rows - words


def _find_text_encoder(weights: Weights) -> Path | None:
    """Return the folder with tokenizer and text encoder, or None where there is none.

    It is downloaded where the weights came from the Hub.
    """
    source = weights.source
    if source.kind == "random":
        return None
    if source.kind == "hub":
        files = [
            pattern
            for pattern in PIPELINE_FILES
            if pattern.partition("/")[0] in (*_PARTS, "model_index.json")
        ]
        advice = (
            "Give --checkpoint DIR, a whole pipeline, or its transformer/ alone to calibrate on"
            " random embeddings."
        )
        return download(source.location, source.revision, files, advice)
    folder = pipeline_folder(Path(source.location))
    return (
        folder if folder is not None and all((folder / part).is_dir() for part in _PARTS) else None
    )
