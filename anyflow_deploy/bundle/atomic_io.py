"""Files and folders that are written whole or not at all, and that survive a power cut.

Everything that this project writes to keep goes through here. A file or folder is filled under a
hidden name beside its destination, synced, renamed into place, and then the folder that holds the
name is synced, too; `outputs` has the names, the locks and the renames.

    write_text_atomically(path, text)                      # one file, made in memory
    with atomic_file(path) as partial: save(partial)       # one file, written by something else
    with atomic_folder(path) as partial: save(partial)     # a folder, written by something else

Each takes a path, whose file is replaced, or an `OutputFile` that was opened before long work.

An `AtomicFolderWriter` writes the folders that list their own files, bundles and engines: it hashes
what passes through, and the last file written is the marker. A folder that has one is a folder that
was finished, and only such a folder is ever replaced.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO, TypeVar

from anyflow_deploy.bundle.manifest import FileRecord
from anyflow_deploy.bundle.outputs import OutputFile, OutputFolder
from anyflow_deploy.errors import BundleError, OutputError, unreadable
from anyflow_deploy.hub import cached_blobs

_BLOCK = 8 << 20
W = TypeVar("W", bound="AtomicFolderWriter")


@contextmanager
def atomic_file(destination: Path | OutputFile) -> Iterator[Path]:
    """Give a path to write to, and put what was written there in the place of a destination.

    Args:
        destination: a path in a folder that exists, where an older file is replaced; or an output
            that is open already.

    Yields:
        An absolute path in the same folder. Its suffix differs, so name the format to writers that
        choose it by the suffix.

    Raises:
        OutputError: it cannot be written. Then, and after any error in the block, the older file is
            as it was.
    """
    if isinstance(destination, OutputFile):
        yield destination.partial
        destination.commit()
        return
    with OutputFile(destination, overwrite=True) as output:
        yield output.partial
        output.commit()


def write_bytes_atomically(destination: Path | OutputFile, data: bytes) -> None:
    """Write a file durably, whole or not at all.

    Raises:
        OutputError: it cannot be written; an older file is as it was.
    """
    with atomic_file(destination) as partial:
        partial.write_bytes(data)


def write_text_atomically(destination: Path | OutputFile, text: str) -> None:
    """Write a file in UTF-8 durably, whole or not at all.

    Raises:
        OutputError: it cannot be written; an older file is as it was.
        UnicodeEncodeError: the text has half a surrogate pair; an older file is as it was.
    """
    with atomic_file(destination) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: Path, replace: bool = True) -> Iterator[Path]:
    """Give an empty folder to write to, and put it in the place of `path`.

    Args:
        path: the destination; its parent must exist.
        replace: replace a folder that is there. Without it only an empty one is replaced.

    Yields:
        The folder, beside the destination.

    Raises:
        OutputError: it cannot be written, or the destination is taken. Then, and after any error in
            the block, `path` is as it was.
    """
    with OutputFolder(path, overwrite=replace) as output:
        yield output.partial
        output.commit()


@dataclass(frozen=True)
class ArtifactKind:
    """What is being written, for the messages.

    Attributes:
        noun: "bundle" or "engine".
        marker: the file that is written last.
        listing: what messages call the marker.
        flag: the flag that chooses another destination.
        remedy: what to do about a damaged one, as a sentence.
    """

    noun: str
    marker: str
    listing: str
    flag: str
    remedy: str


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file in blocks; return it in hexadecimal."""
    digest = hashlib.sha256()
    block = bytearray(_BLOCK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()


def check_file(
    folder: Path, name: str, record: FileRecord, verify: bool, kind: ArtifactKind
) -> None:
    """Compare one file of a folder with what the marker lists.

    Raises:
        BundleError: naming the file and what is wrong with it.
    """
    parts = PurePosixPath(name)
    path = folder / name
    try:
        target = path.resolve()
        inside = target.is_relative_to(folder.resolve()) or _is_blob(target, folder)
        present = path.is_file()
    except PermissionError as error:
        raise BundleError(unreadable(path, error)) from None
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL, a name too long
        inside, present = False, False
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or not inside:
        raise BundleError(
            f"{folder / kind.marker} names {name!r}, which leaves the {kind.noun}'s folder. Do not"
            f" use this {kind.noun}."
        )
    if not present:
        raise BundleError(f"{folder} lacks {name!r}, which its {kind.listing} lists. {kind.remedy}")
    size = path.stat().st_size
    if size != record.bytes:
        raise BundleError(
            f"{path} has {size} bytes; the {kind.listing} says {record.bytes}. {kind.remedy}"
        )
    try:
        digest = file_sha256(path) if verify else record.sha256
    except PermissionError as error:
        raise BundleError(unreadable(path, error)) from None
    if digest != record.sha256:
        raise BundleError(
            f"{path} was changed: its SHA-256 is {digest}, the {kind.listing} says {record.sha256}."
            f" {kind.remedy}"
        )


def _is_blob(target: Path, folder: Path) -> bool:
    """Whether a file is where the Hub's cache keeps the contents of a snapshot's links."""
    blobs = cached_blobs(folder)
    return blobs is not None and target.parent == blobs


class HashingFile:
    """A file opened for writing that hashes the bytes on their way to the disk.

    Nothing is read back to be hashed. Hashing and writing run side by side on two threads, because
    both release the interpreter's lock.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append all of `data` (a raw file may write less than it is given)."""
        view = memoryview(data).cast("B")
        hash_update = self._hasher.submit(self._digest.update, view)
        self._size += len(view)
        while len(view):
            view = view[self._file.write(view) :]
        hash_update.result()

    def close(self) -> FileRecord:
        """Make the file durable; return its size and hash."""
        os.fsync(self._file.fileno())
        self.abandon()
        return FileRecord(bytes=self._size, sha256=self._digest.hexdigest())

    def abandon(self) -> None:
        """Close the file without syncing it, after an error."""
        self._hasher.shutdown()
        self._file.close()


class AtomicFolderWriter:
    """Writes a folder whole or not at all.

        with AtomicFolderWriter(path, kind) as writer:
            writer.write("transition.onnx", data)
            writer.finish_folder(text_of_the_marker)

    Leaving the block before the end, by an error or otherwise, removes everything written. What a
    process leaves that is killed, the next writer in the same place clears away.

    Args:
        path: the destination; its parent must exist.
        kind: what it is.
        overwrite: replace a folder of that kind. A folder without its marker is never replaced.

    Attributes:
        folder: where the files go meanwhile.
        files: what is finished, by name.

    Raises:
        OutputError: destination taken, or its parent not writable. Raised by the constructor,
            before any work.
    """

    def __init__(self, path: Path, kind: ArtifactKind, overwrite: bool = False) -> None:
        self.path = path
        self.kind = kind
        self._output = OutputFolder(path, overwrite, kind.flag)
        self._check_marker()
        self.folder = path
        self.files: dict[str, FileRecord] = {}
        self._open: list[HashingFile] = []

    def _check_marker(self) -> None:
        kind = self.kind
        is_taken = self.path.exists() and self._output.overwrite
        if is_taken and not (self.path / kind.marker).is_file():
            raise OutputError(
                f"{self.path} exists and is not a {kind.noun}, so --overwrite does not replace it."
                f" Choose another {kind.flag}."
            )

    def __enter__(self: W) -> W:
        self.folder = self._output.__enter__().partial
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._open:
            file.abandon()
        self._output.__exit__(kind, value, trace)

    def create(self, name: str) -> HashingFile:
        """Open `name` for writing; give the result of its `close` to `add`."""
        file = HashingFile(self.folder / name)
        self._open.append(file)
        return file

    def add(self, name: str, record: FileRecord) -> None:
        """Enter a finished file into the list."""
        self.files[name] = record

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write a whole file."""
        file = self.create(name)
        file.write(data)
        self.add(name, file.close())

    def add_existing(self, name: str) -> None:
        """Enter a file that something else wrote into `folder`, once it is durable."""
        path = self.folder / name
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        self.add(name, FileRecord(bytes=path.stat().st_size, sha256=file_sha256(path)))

    def check(self) -> None:
        """Check the whole folder, marker included, before it is renamed into place."""

    def finish_folder(self, marker: str) -> None:
        """Write the marker, make everything durable and rename the folder into place."""
        file = self.create(self.kind.marker)
        file.write(marker.encode())
        file.close()
        self.check()
        if self.path.exists() and not (self.path / self.kind.marker).is_file():
            self._output.overwrite = False  # something else came there during the work
        self._output.commit()


def link_or_copy(source: str, target: str) -> str:
    """Link a file under another name where the file system allows it, or copy it.

    For `shutil.copytree(copy_function=…)`. A symbolic link is followed, as a hub's cache needs.
    """
    real = os.path.realpath(source)
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)
    return target
