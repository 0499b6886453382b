"""The flags of commands that start from a checkpoint: they choose the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import Field, field_validator, model_validator

from anyflow_deploy.cli.options import Options
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.hub import parse_hub_id
from anyflow_deploy.models import MODELS, get_model

if TYPE_CHECKING:  # it needs torch, and --help does not
    from anyflow_deploy.checkpoints.weights import Weights


class WeightOptions(Options):
    """Flags that choose weights: --checkpoint, the Hub (--model), or a seed.

    A seed is for --model with --random-weights.
    """

    model: str | None = Field(
        None, description=f"one of {', '.join(MODELS)}; not needed with --checkpoint"
    )
    checkpoint: str | None = Field(
        None,
        description="a diffusers pipeline folder, its transformer/, a .safetensors file, or Hub id",
    )
    variant: str | None = Field(
        None, description="which weights of --checkpoint, as fp16 for *.fp16.safetensors"
    )
    random_weights: bool = Field(
        False, description="use seeded random weights; nothing is downloaded"
    )
    seed: int = Field(0, ge=0, description="seed of --random-weights")

    @field_validator("model")
    @classmethod
    def _check_model(cls, name: str | None) -> str | None:
        return name if name is None else check_name(get_model, name)

    @model_validator(mode="after")
    def _check_source(self) -> WeightOptions:
        if self.model is None and self.checkpoint is None:
            raise ValueError(
                "nothing to start from: give --checkpoint DIR, --model NAME, or --model NAME"
                " --random-weights."
            )
        if self.random_weights and (self.model is None or self.checkpoint is not None):
            raise ValueError(
                "--random-weights takes the architecture from --model NAME, and no --checkpoint."
            )
        if self.variant is not None and (self.checkpoint is None or "." in self.variant):
            raise ValueError("--variant is a word such as fp16, and chooses files of --checkpoint.")
        return self

    def weights(self) -> Weights:
        """Open the weights.

        Raises:
            CheckpointError: they are not there, or not AnyFlow's.
            AnyFlowError: --checkpoint is not a --model.
        """
        from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
        from anyflow_deploy.checkpoints.hub import (
            TRANSFORMER_FILES,
            fetch_checkpoint,
            pipeline_from_model,
        )
        from anyflow_deploy.checkpoints.random_weights import RandomWeights

        if self.random_weights:
            model = get_model(str(self.model))
            return RandomWeights(model.architecture, model.name, self.seed)
        if self.checkpoint is None:
            return open_checkpoint(
                *pipeline_from_model(get_model(str(self.model)), TRANSFORMER_FILES)
            )
        hub_id = parse_hub_id(self.checkpoint)
        if hub_id is None:
            weights = open_checkpoint(self.checkpoint, variant=self.variant)
        else:
            path, source = fetch_checkpoint(*hub_id)
            source = source.model_copy(update={"variant": self.variant})
            weights = open_checkpoint(path, source, self.variant)
        if self.model is not None and weights.architecture != get_model(self.model).architecture:
            raise AnyFlowError(
                f"{self.checkpoint} is not a {self.model}: its config.json differs. Leave --model"
                " out."
            )
        return weights


def check_name(lookup: Callable[[str], object], name: str) -> str:
    """Check that a table has a row of this name; raise a ValueError for pydantic if not."""
    try:
        lookup(name)
    except AnyFlowError as error:
        raise ValueError(str(error)) from None
    return name
