"""Folders that are written whole or not at all: bundles, and the engines built from them.

A `FolderWriter` fills a hidden folder beside the destination, hashes what passes through, makes everything durable and
renames it. The last file written is the marker: a folder that has one is a folder that was finished, and only such a
folder is ever replaced.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO, TypeVar

from anyflow_deploy.bundle.manifest import File
from anyflow_deploy.errors import BundleError

_BLOCK = 8 << 20
W = TypeVar("W", bound="FolderWriter")


@dataclass(frozen=True)
class Kind:
    """What is being written, for the messages.

    Attributes:
        noun: "bundle" or "engine".
        marker: the file that is written last.
        list: what the marker is called.
        flag: what the user chooses another destination with.
        remedy: what to do about a damaged one, as a sentence.
    """

    noun: str
    marker: str
    list: str
    flag: str
    remedy: str


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal, read in blocks."""
    digest = hashlib.sha256()
    block = bytearray(_BLOCK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()


def check_file(folder: Path, name: str, record: File, verify: bool, kind: Kind) -> None:
    """Compare one file of a folder with what the marker lists.

    Raises:
        BundleError: naming the file and what is wrong with it.
    """
    parts = PurePosixPath(name)
    path = folder / name
    try:
        inside, present = path.resolve().is_relative_to(folder.resolve()), path.is_file()
        hint = " If the link is a hub cache's, copy the bundle with cp -rL." if path.is_symlink() else ""
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL, a name too long
        inside, present, hint = False, False, ""
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or not inside:
        raise BundleError(
            f"{folder / kind.marker} names {name!r}, which leaves the {kind.noun}'s folder. Do not use this {kind.noun}.{hint}"
        )
    if not present:
        raise BundleError(f"{folder} lacks {name!r}, which its {kind.list} lists. {kind.remedy}")
    size = path.stat().st_size
    if size != record.bytes:
        raise BundleError(f"{path} has {size} bytes; the {kind.list} says {record.bytes}. {kind.remedy}")
    if verify and (found := file_sha256(path)) != record.sha256:
        raise BundleError(f"{path} was changed: its SHA-256 is {found}, the {kind.list} says {record.sha256}. {kind.remedy}")


class HashingFile:
    """A file opened for writing that hashes what passes through, so nothing is read back to be hashed.

    Hashing and writing go on side by side, on two threads: both let go of Python's lock.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append `data` (whole: raw files may write less than asked)."""
        view = memoryview(data).cast("B")
        hashed = self._hasher.submit(self._digest.update, view)
        self._size += len(view)
        while len(view):
            view = view[self._file.write(view) :]
        hashed.result()

    def close(self) -> File:
        """Make the file durable; returns its size and hash."""
        os.fsync(self._file.fileno())
        self.abandon()
        return File(bytes=self._size, sha256=self._digest.hexdigest())

    def abandon(self) -> None:
        """Close without promises, after an error."""
        self._hasher.shutdown()
        self._file.close()


class FolderWriter:
    """Writes a folder whole or not at all.

        with FolderWriter(path, kind) as writer:
            writer.write("transition.onnx", data)
            writer.finish_folder(text_of_the_marker)

    Leaving the block before the end, by an error or otherwise, removes everything written. A process that is killed
    leaves a folder `.NAME.partial-PID`, which the next writer for the same destination clears away.

    Args:
        path: the destination; its parent must exist.
        kind: what it is.
        overwrite: replace a folder of that kind. A folder without its marker is never replaced.

    Attributes:
        folder: where the files go meanwhile.
        files: what is finished, by name.

    Raises:
        BundleError: destination taken, or its parent not writable. Raised by the constructor, before any work.
    """

    def __init__(self, path: Path, kind: Kind, overwrite: bool = False) -> None:
        self.path = path
        self.kind = kind
        self._overwrite = overwrite
        self._check_destination()
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise BundleError(f"{path.parent} is not a folder that can be written to. Choose another {kind.flag}.")
        self.folder = path.parent / f".{path.name}.partial-{os.getpid()}"
        self.files: dict[str, File] = {}
        self._open: list[HashingFile] = []

    def _check_destination(self) -> None:
        kind = self.kind
        if self.path.exists() and not self._overwrite:
            raise BundleError(f"{self.path} exists. Choose another {kind.flag}, or replace it with --overwrite.")
        if self.path.exists() and not (self.path / kind.marker).is_file():
            raise BundleError(
                f"{self.path} exists and is not a {kind.noun}, so --overwrite does not replace it. Choose another {kind.flag}."
            )

    def __enter__(self: W) -> W:
        _clear_abandoned(self.path)
        self.folder.mkdir()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._open:
            file.abandon()
        shutil.rmtree(self.folder, ignore_errors=True)

    def create(self, name: str) -> HashingFile:
        """Open `name` for writing; give the result of its `close` to `add`."""
        file = HashingFile(self.folder / name)
        self._open.append(file)
        return file

    def add(self, name: str, record: File) -> None:
        """Enter a finished file into the list."""
        self.files[name] = record

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write a whole file."""
        file = self.create(name)
        file.write(data)
        self.add(name, file.close())

    def adopt(self, name: str) -> None:
        """Enter a file that something else wrote into `folder`, once it is durable."""
        path = self.folder / name
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        self.add(name, File(bytes=path.stat().st_size, sha256=file_sha256(path)))

    def check(self) -> None:
        """Look at the whole folder once more, marker included, before it gets its name."""

    def finish_folder(self, marker: str) -> None:
        """Write the marker, make everything durable and rename the folder into place."""
        file = self.create(self.kind.marker)
        file.write(marker.encode())
        file.close()
        self.check()
        sync(self.folder)
        self._check_destination()  # hours may have passed since the constructor looked
        if self.path.exists():
            replaced = self.path.parent / f".{self.path.name}.replaced-{os.getpid()}"
            self.path.rename(replaced)
            try:
                self.folder.rename(self.path)
            except BaseException:
                replaced.rename(self.path)
                raise
            shutil.rmtree(replaced)
        else:
            self.folder.rename(self.path)
        sync(self.path.parent)


def sync(path: Path) -> None:
    """Make a folder or file durable: a rename survives a power cut only when the folder that holds the name was synced."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _clear_abandoned(path: Path) -> None:
    """Undo what a killed writer of the same destination left: half a folder, or an old one moved aside."""
    for kind in ("partial", "replaced"):
        prefix = f".{path.name}.{kind}-"
        for folder in [f for f in path.parent.iterdir() if f.name.startswith(prefix)]:
            pid = folder.name[len(prefix) :]
            if pid != str(os.getpid()) and _running(pid):
                continue
            if kind == "replaced" and not path.exists():
                folder.rename(path)
            else:
                shutil.rmtree(folder, ignore_errors=True)


def _running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
