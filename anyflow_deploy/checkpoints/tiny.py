"""A complete, small AnyFlow pipeline, bidirectional or causal, made on this machine from a seed.

Transformer, UMT5 text encoder, tokenizer, Wan VAE and scheduler, each the real class with small
numbers and random weights, saved exactly as diffusers saves a pipeline. Everything this project
does can be tried and tested on it without a download, and `AnyFlowPipeline.from_pretrained` (of
`far-tiny`: `AnyFlowFARPipeline.from_pretrained`) loads it. The two differ in nothing but the
transformer. Their pictures are noise.

    python -m anyflow_deploy.checkpoints.tiny FOLDER [tiny | far-tiny]
"""

from __future__ import annotations

import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anyflow_deploy.bundle.atomic_io import atomic_folder
from anyflow_deploy.checkpoints.random_weights import random_parameter
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.models import MODELS, Model, get_model

TINY_SEED = 2605
TINY_MODELS = tuple(
    name for name, row in MODELS.items() if row.hub_id is None and row.asset is None
)
_REVISION = 1
"""Raised when the tiny pipeline changes, so that cached ones are made anew."""

_WORDS = [
    "a", "an", "the", "of", "in", "on", "at", "and", "with", "red", "green", "blue", "cat", "dog",
    "fox", "sea", "city", "rain", "snow", "walks", "runs", "flies", "slowly", "video",
]  # fmt: skip


def get_tiny_pipeline(model: Model, cache: Path) -> Path:
    """Return the tiny pipeline in the cache; make it first where it is missing."""
    folder = cache / f"{model.name}-{_REVISION}"
    if not (folder / "model_index.json").is_file():
        save_tiny_pipeline(model, folder)
    return folder


def save_tiny_pipeline(model: Model, folder: Path) -> None:
    """Make a tiny pipeline and save it, whole or not at all.

    Args:
        model: the row `tiny` or `far-tiny` of the table.
        folder: to create.

    Raises:
        AnyFlowError: the folder is not empty, or the model is not a tiny one.
    """
    if model.name not in TINY_MODELS:
        raise AnyFlowError(
            f"{model.name} cannot be made here; allowed are {' and '.join(map(repr, TINY_MODELS))}."
        )
    if folder.exists() and any(folder.iterdir()):
        raise AnyFlowError(f"{folder} is not empty. Choose another folder.")
    pipeline = _build_pipeline(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder, replace=False) as partial:
        pipeline.save_pretrained(partial, safe_serialization=True)


def _build_pipeline(model: Model) -> Any:
    import diffusers

    causal = model.architecture.causal
    transformer = (
        diffusers.AnyFlowFARTransformer3DModel if causal else diffusers.AnyFlowTransformer3DModel
    )
    pipeline = diffusers.AnyFlowFARPipeline if causal else diffusers.AnyFlowPipeline
    tokenizer = build_tokenizer(_WORDS)
    return pipeline(
        tokenizer=tokenizer,
        text_encoder=_build_text_encoder(len(tokenizer), model.architecture.text_dim),
        transformer=_seed_parameters(transformer(**_config(model))),
        vae=_build_vae(),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=model.shift),
    )


def _config(model: Model) -> dict[str, object]:
    return {k: v for k, v in model.architecture.as_config().items() if not k.startswith("_")}


def _seed_parameters(module: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter its own seeded value, whatever torch's global generator did before."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(random_parameter(name, tuple(parameter.shape), TINY_SEED))
    return module.eval()


def build_tokenizer(words: Sequence[str]) -> Any:
    """Build a unigram tokenizer of words and single characters, in the class that Wan uses."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in words]
    pieces += [
        (letter, -8.0) for letter in string.ascii_letters + string.digits + string.punctuation
    ]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def _build_text_encoder(vocabulary: int, width: int) -> torch.nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=16,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return _seed_parameters(UMT5EncoderModel(config))


def _build_vae() -> torch.nn.Module:
    from diffusers import AutoencoderKLWan

    return _seed_parameters(
        AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    )


def main() -> None:
    """Make a tiny pipeline in the folder named on the command line."""
    arguments = sys.argv[1:]
    if len(arguments) not in (1, 2) or any(argument.startswith("-") for argument in arguments):
        sys.exit(
            f"usage: python -m anyflow_deploy.checkpoints.tiny FOLDER [{' | '.join(TINY_MODELS)}]"
        )
    try:
        model = get_model(arguments[1] if len(arguments) == 2 else "tiny")
        save_tiny_pipeline(model, Path(arguments[0]))
    except AnyFlowError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{model.name} AnyFlow pipeline: {arguments[0]}\n")


if __name__ == "__main__":
    main()
