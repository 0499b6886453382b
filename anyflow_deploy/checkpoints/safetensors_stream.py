"""Read and write .safetensors one tensor at a time, in bounded memory.

The safetensors library maps whole files into memory, so that every page it touches counts as
resident, and it can save only a dictionary that is all in memory. A 14B checkpoint passes through
here on a small machine, so both directions are done with plain reads and writes. The format (8
bytes of little-endian header length, a JSON header, then the tensors without gaps) is documented by
the library and is small enough to be checked completely here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow_deploy.dtypes import SAFETENSORS
from anyflow_deploy.errors import CheckpointError, unreadable

TYPE_BYTES = {name: row.bytes for name, row in SAFETENSORS.items()}
_LARGEST_HEADER = 100_000_000  # the library's own limit


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        type: as in the header, "F32", "BF16", …
        shape: dimensions.
        offset: first byte, counted from the start of the file.
    """

    type: str
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * TYPE_BYTES[self.type]


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read which tensors a .safetensors file holds, by name, without their data.

    Raises:
        CheckpointError: no such file, one that may not be read, not a safetensors file, a truncated
            one, or entries that lie outside the file.
    """
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read the tensors of a .safetensors file, and the strings in its header.

    Raises:
        CheckpointError: see `read_header`.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if size < 8 or not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise CheckpointError(
                    f"{path} is not a safetensors file, or was cut short. Download it again."
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from None
    try:
        raw = json.loads(text)
        metadata = raw.pop("__metadata__", {})
        entries = {n: _parse_entry(e, 8 + length, size) for n, e in raw.items()}
        _check_gapless(entries, 8 + length, size)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has a damaged safetensors header ({error}). Download it again."
        ) from None
    return entries, metadata if isinstance(metadata, dict) else {}


def _parse_entry(raw: Mapping[str, Any], start: int, size: int) -> TensorEntry:
    begin, end = raw["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (begin, end, *raw["shape"])):
        raise ValueError("shapes and offsets are whole numbers from 0")
    entry = TensorEntry(raw["dtype"], tuple(raw["shape"]), start + begin)
    if entry.bytes != end - begin or begin < 0 or start + end > size:
        raise ValueError("a tensor's bytes do not match its shape or lie outside the file")
    return entry


def _check_gapless(entries: Mapping[str, TensorEntry], start: int, size: int) -> None:
    """Check that tensors follow each other without gap or overlap, to the end of the file."""
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.bytes)):
        if entry.offset != start:
            raise ValueError("tensors overlap or leave a gap")
        start += entry.bytes
    if start != size:
        raise ValueError(
            f"its tensors end at byte {start} of {size}; they lie outside the file or do not"
            " fill it"
        )


def read_bytes(path: Path, entry: TensorEntry) -> bytearray:
    """Read the data of one tensor without mapping the file.

    Raises:
        CheckpointError: the file ends in the middle of the tensor.
    """
    data = bytearray(entry.bytes)
    view = memoryview(data)
    with path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        while len(view):
            count = file.readinto(view)
            if not count:
                raise CheckpointError(f"{path} ended in the middle of a tensor. Download it again.")
            view = view[count:]
    return data


def build_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorEntry]]:
    """Lay out a file before its data exists.

    Args:
        tensors: name -> (type, shape), in the order in which the data will be written. Wider types
            must come first, so that every tensor starts at a multiple of its own type's size.
        metadata: strings for the header.

    Returns:
        The bytes that precede the data, and where each tensor will lie.
    """
    position = 0
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, (kind, shape) in tensors.items():
        count = math.prod(shape) * TYPE_BYTES[kind]
        header[name] = {
            "dtype": kind,
            "shape": list(shape),
            "data_offsets": [position, position + count],
        }
        position += count
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    start = 8 + len(text)
    entries = {
        n: TensorEntry(k, s, start + header[n]["data_offsets"][0]) for n, (k, s) in tensors.items()
    }
    return len(text).to_bytes(8, "little") + text, entries
