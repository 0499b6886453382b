"""`dataset.json`: the settings of precomputed shards, and a check that they are complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from anyflow_deploy.errors import AnyFlowError

if TYPE_CHECKING:
    from anyflow_deploy.training.data.samples import SampleShape

MARKER = "dataset.json"


class DatasetManifest(BaseModel):
    """The settings of a data set, written before its first shard.

    Attributes:
        latents: (F, C, H, W).
        tokens, width: text embeddings are (at most tokens, width).
        type: of the stored numbers.
        encoders: digest of the VAE and the text encoder.
        clips: digest of names, sizes and captions of the videos.
        count, shards, shard_samples: videos, shards, and videos of a shard.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    latents: tuple[int, int, int, int]
    tokens: int
    width: int
    type: str
    encoders: str
    clips: str
    count: int
    shards: int
    shard_samples: int

    def check(self, folder: Path, shape: SampleShape) -> None:
        """Check that all shards are there, and of the recipe's shape, or longer.

        Raises:
            AnyFlowError: with what differs.
        """
        shard_count = sum((folder / shard_name(number)).is_file() for number in range(self.shards))
        if shard_count < self.shards:
            raise AnyFlowError(
                f"{folder} has {shard_count} of {self.shards} shards: anyflow-precompute was"
                " stopped. Run it again to resume."
            )
        if self.latents[0] < shape.latents[0] or self.latents[1:] != shape.latents[1:]:
            f, _, h, w = self.latents
            raise AnyFlowError(
                f"{folder} was made with latents (F, C, H, W) {self.latents}; the recipe has"
                f" {shape.latents}. Give --frames {f} --height {h} --width {w}, or make other"
                " shards."
            )
        if self.width != shape.text[1] or self.tokens > shape.text[0]:
            raise AnyFlowError(
                f"{folder} was made with text ({self.tokens}, {self.width}) (tokens, channels); the"
                f" model takes at most {shape.text}. Give --text-tokens {self.tokens}, or make"
                " shards with the text encoder of this model."
            )


def shard_name(number: int) -> str:
    """Return the file name of a precomputed shard."""
    return f"shard-{number:06d}.tar"


def read_manifest(folder: Path) -> DatasetManifest:
    """Read the folder's dataset.json.

    Raises:
        AnyFlowError: it is damaged, or of another version.
    """
    try:
        manifest = DatasetManifest.model_validate(json.loads((folder / MARKER).read_text()))
    except (OSError, ValueError, ValidationError) as error:
        cause = str(error).splitlines()[0]
        raise AnyFlowError(
            f"{folder / MARKER} cannot be read ({cause}). Make the shards again in another folder."
        ) from None
    if manifest.version != 1:
        raise AnyFlowError(
            f"{folder / MARKER} has version {manifest.version}; this anyflow_deploy reads"
            " version 1."
        )
    return manifest
