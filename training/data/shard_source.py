"""Shards as a source: a fixed order of all samples, with any position, and broken ones replaced.

Position p of the global stream is sample `permutation(seed, p // N)[p % N]`: each epoch has an
order of its own, and every process finds its samples without asking another. A broken sample is
replaced by one that is drawn from (seed, p): the others keep their positions, on any number of
processes. It is reported once. When too many are broken, the run stops.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from anyflow_deploy.checkpoints.checkpoint import missing_parts, pipeline_folder
from anyflow_deploy.checkpoints.weights import Weights
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.training.data.manifest import MARKER, read_manifest
from anyflow_deploy.training.data.samples import (
    ENCODER_PARTS,
    BrokenSampleError,
    Encoders,
    Sample,
    SampleShape,
    is_precomputed,
    read_sample,
    video_ending,
)
from anyflow_deploy.training.data.source import Batch, DataShard
from anyflow_deploy.training.data.tar_index import SampleEntry, ShardIndex, index_shards
from anyflow_deploy.training.recipes import Recipe
from anyflow_deploy.training.timestep_sampling import seeded_generator

NEGATIVE = "negative.safetensors"
"""The empty prompt's embedding beside precomputed shards: one tensor `text` (L, D)."""

BROKEN_FREE = 3
"""Broken samples that a process may read in any case."""

BROKEN_SHARE = 0.02
"""Fraction of the samples a process reads that may be broken in addition."""

_PREFETCH = 2

_ATTEMPTS = 50
"""Samples in a row that may be broken."""


def open_source(data: str, recipe: Recipe, weights: Weights, part: DataShard) -> ShardSource:
    """Open a folder of shards.

    Args:
        data: the folder.
        recipe: decides the shape of the samples.
        weights: of the checkpoint that is trained; videos are encoded by the pipeline around it.
        part: of this process.

    Raises:
        AnyFlowError: no shards, a damaged one, or videos without a pipeline to encode them.
    """
    a = weights.architecture
    index = index_shards(Path(data))
    shape = SampleShape(
        (recipe.frames, a.in_channels, recipe.height, recipe.width),
        (recipe.text_tokens, a.text_dim),
    )
    encoders = None
    if not all(is_precomputed(entry) for entry in index.entries):
        encoders = _open_encoders(index, weights)
    return ShardSource(index, part, shape, recipe.running.seed, encoders)


class ShardSource:
    """A `DataSource` that reads a folder of shards.

    Args:
        index: of the shards.
        part: of this process.
        shape: of every sample.
        seed: of the order.
        encoders: for videos.
    """

    def __init__(
        self,
        index: ShardIndex,
        part: DataShard,
        shape: SampleShape,
        seed: int,
        encoders: Encoders | None,
    ) -> None:
        self._index = index
        self._part = part
        self._shape = shape
        self._seed = seed
        self._encoders = encoders
        self._position = 0
        self._read_count = 0
        self._broken_samples: dict[str, str] = {}
        self._new_problems: list[str] = []
        self._order = functools.lru_cache(maxsize=2)(self._permutation)
        self._negative = self._read_negative_text()

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches, read ahead by one thread (a VAE is not safe for several)."""
        stride = self._part.world * self._part.batch
        with ThreadPoolExecutor(1) as pool:
            batches: deque[Future[Batch]] = deque()
            position = self._position
            while True:
                while len(batches) < _PREFETCH:
                    batches.append(pool.submit(self._read_batch, position))
                    position += stride
                batch = batches.popleft().result()
                self._position += stride
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch, as JSON values."""
        return {"samples": self._position, "data": self._index.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the position, which may be of a run with another number of processes.

        Raises:
            AnyFlowError: the checkpoint is of other data.
        """
        position = state.get("samples")
        if state.get("data") != self._index.digest or not isinstance(position, int) or position < 0:
            raise AnyFlowError(
                f"the checkpoint is at sample {position} of other data than {self._index.folder}"
                " now has (shards were changed, added or removed). Give the same --data, or another"
                " --output."
            )
        self._position = position

    def pop_broken_samples(self) -> list[str]:
        """Return the broken samples since the last call, each with its reason."""
        problems = self._new_problems
        self._new_problems = []
        return problems

    def check(self) -> str:
        """Check all headers, the first shard's first sample and the last one's last.

        Returns:
            a line that describes the data.

        Raises:
            AnyFlowError: too many samples without a video or a caption, or a sample of another
                shape than the recipe's.
        """
        entries, folder = self._index.entries, self._index.folder
        if (folder / MARKER).is_file():
            read_manifest(folder).check(folder, self._shape)
        unusable = [
            e
            for e in entries
            if not is_precomputed(e) and (video_ending(e) is None or "txt" not in e.members)
        ]
        if len(unusable) > BROKEN_FREE + BROKEN_SHARE * len(entries):
            raise AnyFlowError(
                f"{len(unusable)} of {len(entries)} samples in {folder} have no video or no"
                f" caption, such as {unusable[0].name}"
                f" ({', '.join(sorted(unusable[0].members))}). A sample is KEY.mp4 and KEY.txt, or"
                " KEY.safetensors, and KEY has no dots."
            )
        for entry in (entries[0], entries[-1]):
            try:
                read_sample(entry, self._shape, self._encoders)
            except BrokenSampleError as error:
                raise AnyFlowError(f"{folder}: {error}. {error.advice}") from None
        kind = "videos" if self._encoders else "latents"
        return (
            f"{len(entries)} samples ({kind}) in {len({e.shard for e in entries})} shards, first"
            " and last read"
        )

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(
            len(self._index.entries), generator=seeded_generator(self._seed, "order", epoch)
        )

    def _read_batch(self, first: int) -> Batch:
        part = self._part
        places = range(first + part.rank * part.batch, first + (part.rank + 1) * part.batch)
        pairs = [self._read_usable_sample(place) for place in places]
        samples = [sample for _, sample in pairs]
        names = tuple(entry.name for entry, _ in pairs)
        latents = torch.stack([s.latents for s in samples])
        text = torch.stack([s.text for s in samples])
        return Batch(
            latents,
            text,
            self._negative,
            names,
            tuple(s.caption or n for s, n in zip(samples, names, strict=True)),
        )

    def _read_usable_sample(self, place: int) -> tuple[SampleEntry, Sample]:
        """Return the sample of a position in the stream, or its replacement."""
        entries = self._index.entries
        epoch, inside = divmod(place, len(entries))
        number = int(self._order(epoch)[inside])
        for attempt in itertools.count(1):
            self._read_count += 1
            try:
                return entries[number], read_sample(entries[number], self._shape, self._encoders)
            except BrokenSampleError as error:
                self._record_broken(entries[number], str(error))
            # In a folder of a few samples `_record_broken` does not raise even if all are broken
            if attempt > _ATTEMPTS:
                raise AnyFlowError(
                    f"{attempt} samples in a row from {self._index.folder} are broken. Repair or"
                    " replace the data."
                )
            number = int(
                torch.randint(
                    len(entries),
                    (),
                    generator=seeded_generator(self._seed, "instead", place, attempt),
                )
            )
        raise AssertionError("itertools.count ends")

    def _record_broken(self, entry: SampleEntry, reason: str) -> None:
        if entry.name not in self._broken_samples:
            self._broken_samples[entry.name] = reason
            self._new_problems.append(reason)
        if len(self._broken_samples) > BROKEN_FREE + BROKEN_SHARE * self._read_count:
            last = "; ".join(list(self._broken_samples.values())[-3:])
            raise AnyFlowError(
                f"{len(self._broken_samples)} of {self._read_count} samples read from"
                f" {self._index.folder} are broken, too many to continue: {last}. Repair or remove"
                " them."
            )

    def _read_negative_text(self) -> Tensor:
        """Return the negative prompt's embedding, float32 (1, L, D)."""
        tokens, width = self._shape.text
        path = self._index.folder / NEGATIVE
        if self._encoders is not None:
            return torch.from_numpy(self._encoders.prompts.encode_empty(tokens))
        try:
            text = safetensors.torch.load(path.read_bytes())["text"].float()
        except (OSError, KeyError, SafetensorError) as error:
            raise AnyFlowError(
                f"{path} cannot be read ({error}): precomputed shards need the empty prompt's"
                " embedding beside them, a tensor `text` (tokens, channels). anyflow-precompute"
                " writes it."
            ) from None
        if text.ndim != 2 or text.shape[1] != width or len(text) > tokens:
            raise AnyFlowError(
                f"{path} has text {tuple(text.shape)}; the model takes at most {tokens} tokens of"
                f" {width}."
            )
        padded_text = torch.zeros(1, tokens, width)
        padded_text[0, : len(text)] = text
        return padded_text


def _open_encoders(index: ShardIndex, weights: Weights) -> Encoders:
    source = weights.source
    pipeline = pipeline_folder(Path(source.location)) if source.kind == "folder" else None
    missing = missing_parts(pipeline, ENCODER_PARTS)
    if pipeline is None or missing:
        raise AnyFlowError(
            f"{index.folder} holds videos, and the checkpoint lacks {', '.join(missing)} to encode"
            " them. Start from a whole pipeline (--init DIR with model_index.json), or encode them"
            " once with anyflow-precompute."
        )
    return _shared_encoders(pipeline, "cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def _shared_encoders(pipeline: Path, device: str) -> Encoders:
    """Open the encoders, once for each pipeline and device.

    Sample grids read the data by a source of their own, and the text encoder is too large to have
    twice.
    """
    return Encoders(pipeline, device)
