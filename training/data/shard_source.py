"""Shards as a source: a fixed order of all samples, any position in it, broken ones replaced.

Position p of the global stream is sample `permutation(seed, p // N)[p % N]`: each epoch is an order
of its own, and every process finds its samples without asking another. A broken sample's place is
taken by one that is drawn from (seed, p): the others keep their places, on any number of processes.
It is named once; when too many are broken, the data is not what the user thinks it is, and the run
stops.
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

BROKEN_FREE, BROKEN_SHARE = 3, 0.02
"""A process may meet this many broken samples, and beyond them this share of what it reads."""

_PREFETCH = 2

_ATTEMPTS = 50
"""Samples in a row that may be broken."""


def open_source(data: str, recipe: Recipe, weights: Weights, part: DataShard) -> ShardSource:
    """A folder of shards.

    Args:
        data: the folder.
        recipe: says which shape samples have.
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
    """See the module's text.

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
        self._broken: dict[str, str] = {}
        self._unreported: list[str] = []
        self._order = functools.lru_cache(maxsize=2)(self._permutation)
        self._negative = self._read_negative_text()

    def __iter__(self) -> Iterator[Batch]:
        """Batches, read ahead by one thread (a VAE is not safe for several)."""
        stride = self._part.world * self._part.batch
        with ThreadPoolExecutor(1) as pool:
            waiting: deque[Future[Batch]] = deque()
            ahead = self._position
            while True:
                while len(waiting) < _PREFETCH:
                    waiting.append(pool.submit(self._read_batch, ahead))
                    ahead += stride
                batch = waiting.popleft().result()
                self._position += stride
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """See `DataSource`."""
        return {"samples": self._position, "data": self._index.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `DataSource`.

        Raises:
            AnyFlowError: the checkpoint is of other data.
        """
        position = state.get("samples")
        if state.get("data") != self._index.digest or not isinstance(position, int) or position < 0:
            raise AnyFlowError(
                f"the checkpoint stands at sample {position} of other data than"
                f" {self._index.folder} now is (shards were changed, added or removed). Give the"
                " same --data, or another --output."
            )
        self._position = position

    def skipped(self) -> list[str]:
        """See `DataSource`."""
        reported, self._unreported = self._unreported, []
        return reported

    def check(self) -> str:
        """See `DataSource`: everything the headers tell, then the first shard's first sample and
        the last one's last."""
        entries, folder = self._index.entries, self._index.folder
        if (folder / MARKER).is_file():
            read_manifest(folder).check(folder, self._shape)
        useless = [
            e
            for e in entries
            if not is_precomputed(e) and (video_ending(e) is None or "txt" not in e.members)
        ]
        if len(useless) > BROKEN_FREE + BROKEN_SHARE * len(entries):
            raise AnyFlowError(
                f"{len(useless)} of {len(entries)} samples in {folder} have no video or no caption,"
                f" as {useless[0].name} ({', '.join(sorted(useless[0].members))}). A sample is"
                " KEY.mp4 and KEY.txt, or KEY.safetensors."
            )
        for entry in (entries[0], entries[-1]):
            try:
                read_sample(entry, self._shape, self._encoders)
            except BrokenSampleError as error:
                raise AnyFlowError(
                    f"{folder}: {error}. Give the --frames, --height, --width and --text-tokens"
                    " that the data was made for, or other data."
                ) from None
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
        found = [self._read_usable_sample(place) for place in places]
        samples = [sample for _, sample in found]
        names = tuple(entry.name for entry, _ in found)
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
        """The sample of a place in the stream, or what takes its place."""
        entries = self._index.entries
        epoch, inside = divmod(place, len(entries))
        number = int(self._order(epoch)[inside])
        for attempt in itertools.count(1):
            self._read_count += 1
            try:
                return entries[number], read_sample(entries[number], self._shape, self._encoders)
            except BrokenSampleError as error:
                self._record_broken(entries[number], str(error))
            # A folder of a few samples, all broken: too few names to be too many
            if attempt > _ATTEMPTS:
                raise AnyFlowError(
                    f"{attempt} samples in a row from {self._index.folder} are broken. Mend or"
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
        if entry.name not in self._broken:
            self._broken[entry.name] = reason
            self._unreported.append(reason)
        if len(self._broken) > BROKEN_FREE + BROKEN_SHARE * self._read_count:
            last = "; ".join(list(self._broken.values())[-3:])
            raise AnyFlowError(
                f"{len(self._broken)} of {self._read_count} samples read from {self._index.folder}"
                f" are broken, too many to go on: {last}. Mend or remove them."
            )

    def _read_negative_text(self) -> Tensor:
        """(1, L, D)."""
        tokens, width = self._shape.text
        path = self._index.folder / NEGATIVE
        if self._encoders is not None:
            return torch.from_numpy(self._encoders.prompts.nothing(tokens))
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
        padded = torch.zeros(1, tokens, width)
        padded[0, : len(text)] = text
        return padded


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
    """Sample sheets read the data by a source of their own, and the text encoder is too large to
    have twice."""
    return Encoders(pipeline, device)
