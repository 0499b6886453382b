"""The bundle: the folder that crosses from export to engines.

Reading is suspicious: the schema must be known, every file must be inside the folder, present, of the right size and of
the right SHA-256. Writing is all or nothing: `BundleWriter` fills a temporary folder beside the destination, makes it
durable and renames it, so that a bundle with a manifest is a bundle that was finished.

Reports (`validation.json`) and engines built later live in the same folder and name the bundle's `digest`, but are not
listed in the manifest: making them must not change the bundle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO

from pydantic import ValidationError

from anyflow_deploy.errors import AnyFlowError, BundleError
from anyflow_deploy.manifest import MANIFEST, SCHEMA, File, Manifest

_BLOCK = 8 << 20


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest was read.

    Attributes:
        path: the folder.
        manifest: its contents.
        digest: SHA-256 of manifest.json, which names the hash of every other file: one word for the whole bundle.
    """

    path: Path
    manifest: Manifest
    digest: str

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists.

        Raises:
            BundleError: when it does not.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.path} has no file {name!r}; its manifest lists {', '.join(self.manifest.files)}.")
        return self.path / name


def load_bundle(path: str | Path, verify: bool = True) -> Bundle:
    """Open a bundle.

    Args:
        path: the folder that holds manifest.json.
        verify: compare every file with its hash (reads the whole bundle once). Pass False only where that was done
            before, on storage that cannot have changed since; sizes and paths are checked even then.

    Raises:
        BundleError: no manifest, a newer schema, an unknown key, a missing or changed file, a path out of the folder.
    """
    folder = Path(path)
    try:
        text = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise BundleError(
            f"{folder} is not a bundle: {MANIFEST} cannot be read ({error.strerror}). Make one with anyflow-export."
        ) from None
    bundle = Bundle(folder, _parsed(text, folder), hashlib.sha256(text).hexdigest())
    for name, record in bundle.manifest.files.items():
        check_file(folder, name, record, verify)
    for graph in bundle.manifest.graphs.values():
        bundle.file(graph.file)
    try:
        bundle.manifest.architecture, bundle.manifest.shape_ranges  # noqa: B018 - both check what they read
    except AnyFlowError as error:
        raise BundleError(f"{folder / MANIFEST} is damaged: {error} Export again.") from None
    return bundle


def _parsed(text: bytes, folder: Path) -> Manifest:
    try:
        raw = json.loads(text)
        schema = raw["schema"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BundleError(f"{folder / MANIFEST} is not a manifest: no JSON object with a 'schema'. Export again.") from None
    if schema != SCHEMA:
        advice = "Update anyflow_deploy" if isinstance(schema, int) and schema > SCHEMA else "Export again"
        raise BundleError(f"{folder} has manifest schema {schema!r}; this version reads {SCHEMA}. {advice}.")
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "graphs"  # what no single key is wrong in
        raise BundleError(f"{folder / MANIFEST} is damaged at {place!r}: {first['msg']}. Export again.") from None


def check_file(folder: Path, name: str, record: File, verify: bool) -> None:
    """Compare one listed file with the manifest.

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
        raise BundleError(f"{folder / MANIFEST} names {name!r}, which leaves the bundle's folder. Do not use this bundle.{hint}")
    if not present:
        raise BundleError(f"{folder} lacks {name!r}, which its manifest lists. Copy the bundle again, or export again.")
    size = path.stat().st_size
    if size != record.bytes:
        raise BundleError(f"{path} has {size} bytes; the manifest says {record.bytes}. Copy the bundle again, or export again.")
    if verify and (found := file_sha256(path)) != record.sha256:
        raise BundleError(
            f"{path} was changed: its SHA-256 is {found}, the manifest says {record.sha256}. "
            "Copy the bundle again, or export again."
        )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal, read in blocks."""
    digest = hashlib.sha256()
    block = bytearray(_BLOCK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()


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


class BundleWriter:
    """Writes a bundle whole or not at all.

        with BundleWriter(path) as writer:
            writer.write("transition.onnx", data)
            writer.finish(manifest)

    Leaving the block before `finish`, by an error or otherwise, removes everything written. A process that is killed
    leaves a folder `.NAME.partial-PID`, which the next writer for the same destination clears away.

    Args:
        path: the destination; its parent must exist.
        overwrite: replace a bundle that is there. A folder without a manifest is never replaced.

    Raises:
        BundleError: destination taken, or its parent not writable. Raised by the constructor, before any work.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        self.path = path
        self._overwrite = overwrite
        self._check_destination()
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise BundleError(f"{path.parent} is not a folder that can be written to. Choose another --output.")
        self.folder = path.parent / f".{path.name}.partial-{os.getpid()}"
        self.files: dict[str, File] = {}
        self._open: list[HashingFile] = []

    def _check_destination(self) -> None:
        if self.path.exists() and not self._overwrite:
            raise BundleError(f"{self.path} exists. Choose another --output, or replace it with --overwrite.")
        if self.path.exists() and not (self.path / MANIFEST).is_file():
            raise BundleError(
                f"{self.path} exists and is not a bundle, so --overwrite does not replace it. Choose another --output."
            )

    def __enter__(self) -> BundleWriter:
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
        """Enter a finished file into the manifest's list."""
        self.files[name] = record

    def write(self, name: str, data: bytes) -> None:
        """Write a whole small file."""
        file = self.create(name)
        file.write(data)
        self.add(name, file.close())

    def finish(self, manifest: Manifest) -> Bundle:
        """Write the manifest, make everything durable and rename the folder into place."""
        text = manifest.model_copy(update={"files": dict(self.files)}).model_dump_json(indent=1, by_alias=True) + "\n"
        file = self.create(MANIFEST)
        file.write(text.encode())
        file.close()
        load_bundle(self.folder, verify=False)
        _sync_folder(self.folder)
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
        _sync_folder(self.path.parent)
        return load_bundle(self.path, verify=False)


def _sync_folder(folder: Path) -> None:
    """A rename survives a power cut only when the folder that holds the name was synced."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _clear_abandoned(path: Path) -> None:
    """Undo what a killed writer of the same destination left: half a bundle, or an old one moved aside."""
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
