"""An index of webdataset's shards: where the bytes of every sample are.

It is made from the tar headers. A shard is a tar file; members that share a name up to its first
dot are one sample (`clip-7.mp4`, `clip-7.txt`), as in the webdataset library. That library reads
shards as streams, through shuffling buffers and workers, and can resume only by reading everything
up to that position again. Here the headers are read once, 512 bytes of each member, and then any
sample is one seek away: an order is a permutation, a position a number, and both are exact on any
number of processes. Samples are megabytes, so seeking costs little on a disk. The price is that
shards have to be files: no pipes, no URLs, no compressed tars.

Nothing is decoded here; only bytes at an offset are read.
"""

from __future__ import annotations

import hashlib
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from anyflow_deploy.errors import AnyFlowError

_THREADS = 8
_MAX_NAMES = 3


@dataclass(frozen=True)
class TarMember:
    """One file in a shard: the offset of its bytes, and their number."""

    offset: int
    size: int


@dataclass(frozen=True)
class SampleEntry:
    """One sample.

    Attributes:
        shard: the tar file.
        key: the sample's name in it.
        members: its files by ending, in lower case, without the dot.
    """

    shard: Path
    key: str
    members: dict[str, TarMember]

    @property
    def name(self) -> str:
        """Name of the sample in messages."""
        return f"{self.shard.name}/{self.key}"

    def read(self, ending: str) -> bytes:
        """Return the bytes of one member.

        Raises:
            ValueError: the shard is shorter than it was.
            OSError: it cannot be read.
        """
        member = self.members[ending]
        with self.shard.open("rb") as file:
            file.seek(member.offset)
            data = file.read(member.size)
        if len(data) != member.size:
            raise ValueError(f"{ending} has {len(data)} of {member.size} bytes")
        return data


@dataclass(frozen=True)
class ShardIndex:
    """All samples of a folder of shards, in the order of names and of the files.

    Attributes:
        folder: of the shards.
        entries: the samples.
        digest: of all names and offsets, which tells data sets apart.
    """

    folder: Path
    entries: list[SampleEntry]
    digest: str


def index_shards(folder: Path) -> ShardIndex:
    """Read the headers of all shards of a folder, and return the index.

    Raises:
        AnyFlowError: no folder, no shards, no samples, or a shard that is damaged or compressed.
    """
    if not folder.is_dir():
        raise AnyFlowError(
            f"--data is '{folder}', which is not a folder. Give 'synthetic', or a folder of shards"
            " (*.tar)."
        )
    shards = sorted(p for p in folder.glob("*.tar") if not p.name.startswith("."))
    compressed_names = sorted(
        p.name
        for pattern in ("*.tgz", "*.tar.*")
        for p in folder.glob(pattern)
        if not p.name.startswith(".")
    )
    if compressed_names:
        raise AnyFlowError(
            f"{folder} holds {compressed_names[0]}: compressed shards cannot be read at a position."
            " Unpack them to .tar."
        )
    if not shards:
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:_MAX_NAMES]) or "nothing"
        raise AnyFlowError(
            f"{folder} holds no shards (*.tar) but {names}. Make shards of videos with:"
            f" anyflow-precompute {folder} --output DIR"
        )
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = [entry for samples in pool.map(_index_shard, shards) for entry in samples]
    if not entries:
        raise AnyFlowError(
            f"{folder} has {len(shards)} shards and no sample in them. Give other data."
        )
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(
            repr(
                (entry.name, sorted((k, m.offset, m.size) for k, m in entry.members.items()))
            ).encode()
        )
    return ShardIndex(folder, entries, digest.hexdigest()[:32])


def _index_shard(shard: Path) -> list[SampleEntry]:
    """Return the samples of one shard.

    A key that comes back after another one is refused.
    """
    samples: dict[str, SampleEntry] = {}
    last = None
    try:
        with tarfile.open(shard, "r:") as file:
            for info in file:
                file.members = []  # type: ignore[attr-defined]  # it would keep every header
                key, ending = _split(info.name)
                if not info.isreg() or info.sparse is not None or not key or key.startswith("__"):
                    continue
                if (key in samples and last != key) or (
                    key in samples and ending in samples[key].members
                ):
                    raise AnyFlowError(
                        f"{shard} has {info.name} twice, or apart from its sample's other files."
                        " Make the shard again."
                    )
                samples.setdefault(key, SampleEntry(shard, key, {})).members[ending] = TarMember(
                    info.offset_data, info.size
                )
                last = key
    except (tarfile.TarError, OSError, ValueError) as error:
        raise AnyFlowError(
            f"{shard} is damaged ({error}). Copy or make it again, or take it out of the folder."
        ) from None
    ends = [m.offset + m.size for entry in samples.values() for m in entry.members.values()]
    if max(ends, default=0) > shard.stat().st_size:
        raise AnyFlowError(
            f"{shard} is damaged (it ends within a file). Copy or make it again, or take it out of"
            " the folder."
        )
    return list(samples.values())


def _split(name: str) -> tuple[str, str]:
    """Split `a/b.c.txt` into `a/b` and `c.txt`, as webdataset does."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    key, _, ending = file.partition(".")
    return (folder + slash + key if key and ending else ""), ending.lower()
