"""Engine folders, which `anyflow-build` makes from a bundle for one device.

    BUNDLE/engines/NAME/   engine.json and the backend's own files

`load_engine` opens them. `engine.json` names the bundle by its digest, the device and the versions
it was built with. An engine is not portable: one that was built for another device or version is
refused with both names, since a plan of another GPU may load and then fail, or be slow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from anyflow_deploy.bundle.atomic_io import ArtifactKind, AtomicFolderWriter, check_file
from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.bundle.json_records import FrozenRecord, RecordFormat
from anyflow_deploy.bundle.manifest import AxisRange, FileRecord, records_from_ranges
from anyflow_deploy.errors import BackendError, BundleError, unreadable
from anyflow_deploy.shape_ranges import Range, ShapeRanges

ENGINE = "engine.json"
ENGINES = "engines"
SCHEMA = 1

_REMEDY = "Build it again with anyflow-build."
_KIND = ArtifactKind("engine", ENGINE, "engine.json", "--name or --output", _REMEDY)


class DeviceRecord(FrozenRecord):
    """The device that an engine was built on.

    Args:
        kind: "cpu" or "cuda".
        name: as the driver or the processor calls itself.
        compute_capability: of a GPU, as "9.0".
    """

    kind: Literal["cpu", "cuda"]
    name: str
    compute_capability: str | None = None


class EngineRecord(FrozenRecord):
    """The contents of `engine.json`.

    Args:
        backend: a name in `registry.BACKENDS`.
        bundle: digest of the bundle it was built from.
        device: what it was built on.
        versions: of the software it was built with; a backend says which have to be the same when
            it is loaded.
        settings: of the build.
        ranges: shapes it accepts, within the bundle's.
        profiles: optimization profiles, where the backend has them: graph -> profile, in order ->
            tensor -> (least, best, most).
        achieved: what the built engine really holds, read back from it.
        seconds: duration of the build.
        files: size and SHA-256 of every other file.
    """

    schema_version: int = Field(default=SCHEMA, alias="schema")
    backend: str
    bundle: str
    device: DeviceRecord
    versions: dict[str, str]
    settings: dict[str, Any]
    ranges: dict[str, AxisRange]
    profiles: dict[str, dict[str, dict[str, list[list[int]]]]] = Field(default_factory=dict)
    achieved: dict[str, Any] = Field(default_factory=dict)
    seconds: float
    files: dict[str, FileRecord] = Field(default_factory=dict)

    @cached_property
    def shape_ranges(self) -> ShapeRanges:
        """The accepted shapes, as ranges that check a shape; computed once."""
        return ShapeRanges(
            **{axis: Range(r.minimum, r.maximum, r.multiple) for axis, r in self.ranges.items()}
        )


_FORMAT = RecordFormat(EngineRecord, SCHEMA, "engine", _REMEDY, BundleError)


@dataclass(frozen=True)
class EngineFolder:
    """An engine on disk whose record has been read.

    Attributes:
        path: the folder.
        record: its contents.
    """

    path: Path
    record: EngineRecord

    @property
    def digest(self) -> str:
        """SHA-256 over the hashes of all files: what tells two engines apart, wherever they
        lie."""
        hashes = {name: file.sha256 for name, file in self.record.files.items()}
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()

    def file(self, name: str) -> Path:
        """Return the path of a file that the record lists.

        Raises:
            BundleError: when it does not.
        """
        if name not in self.record.files:
            raise BundleError(
                f"{self.path} has no file {name!r}; it lists {', '.join(self.record.files)}."
                f" {_REMEDY}"
            )
        return self.path / name


def load_engine_folder(path: Path, verify: bool = True) -> EngineFolder:
    """Open an engine folder.

    Args:
        path: the folder that holds engine.json.
        verify: compare every file with its hash.

    Raises:
        BundleError: no record, another schema, an unknown key, a missing or changed file.
    """
    try:
        data = (path / ENGINE).read_bytes()
    except PermissionError as error:
        raise BundleError(unreadable(path / ENGINE, error)) from None
    except OSError as error:
        raise BundleError(
            f"{path} is not an engine: {ENGINE} cannot be read ({error.strerror}). {_REMEDY}"
        ) from None
    record = _FORMAT.parse(data, path / ENGINE)
    for name, file in record.files.items():
        check_file(path, name, file, verify, _KIND)
    return EngineFolder(path, record)


def find_engine(
    bundle: Bundle, backend: str, engine: str | Path | None = None, verify: bool = True
) -> EngineFolder:
    """Find the engine of a backend that was built from a bundle.

    Args:
        bundle: an opened bundle.
        backend: a name in `registry.BACKENDS`.
        engine: a name in the bundle's folder of engines, or a path; None where there is only one of
            the backend.
        verify: compare every file with its hash.

    Raises:
        BackendError: none, or several, or one of another bundle or backend.
        BundleError: damaged.
    """
    build = f"anyflow-build {bundle.path} --backend {backend}"
    engines = list_engines(bundle)
    if engine is None:
        candidates = [path for path in engines if _read_backend(path) == backend]
        if not candidates:
            raise BackendError(
                f"{bundle.path} has no {backend} engine yet. Make one on this machine: {build}"
            )
        if len(candidates) > 1:
            names = ", ".join(path.name for path in candidates)
            raise BackendError(
                f"{bundle.path} has several {backend} engines ({names}): choose one with --engine"
                " NAME."
            )
        path = candidates[0]
    else:
        inside = bundle.path / ENGINES / engine
        path = inside if (inside / ENGINE).is_file() else Path(engine)
        if not (path / ENGINE).is_file():
            names = ", ".join(p.name for p in engines) or "none"
            raise BackendError(
                f"there is no engine {str(engine)!r}; {bundle.path} has {names}. Make one: {build}"
            )
    folder = load_engine_folder(path, verify)
    if folder.record.backend != backend:
        raise BackendError(
            f"{path} is an engine of backend {folder.record.backend}, not of {backend}."
        )
    if folder.record.bundle != bundle.digest:
        raise BackendError(
            f"{path} was built from bundle {folder.record.bundle[:12]}, and {bundle.path} is"
            f" {bundle.digest[:12]}. Build it again: {build} --overwrite"
        )
    return folder


def list_engines(bundle: Bundle) -> list[Path]:
    """List the engine folders inside a bundle, sorted by name."""
    folder = bundle.path / ENGINES
    return sorted(
        path.parent for path in folder.glob(f"*/{ENGINE}") if not path.parent.name.startswith(".")
    )


def check_compatible(
    folder: EngineFolder, device: DeviceRecord, versions: Mapping[str, str]
) -> None:
    """Refuse an engine that was built elsewhere.

    Args:
        folder: from `find_engine`.
        device: that it would run on.
        versions: installed here, of the software that has to be the same.

    Raises:
        BackendError: with both names.
    """
    check_device(folder, device)
    check_versions(folder, versions)


def check_device(folder: EngineFolder, device: DeviceRecord, remedy: str | None = None) -> None:
    """Refuse an engine that was built for another device.

    Args:
        folder: from `find_engine`.
        device: what it would run on.
        remedy: what to do, as a sentence; None: build it here.

    Raises:
        BackendError: with both names.
    """
    built_for = folder.record.device
    if built_for != device:
        raise BackendError(
            f"{folder.path} was built for {device_label(built_for)}, and this is"
            f" {device_label(device)}. {remedy or _build_here(folder)}"
        )


def check_versions(folder: EngineFolder, versions: Mapping[str, str]) -> None:
    """Refuse an engine that was built with other versions.

    Args:
        folder: from `find_engine`.
        versions: what is installed here, of those that have to be the same.

    Raises:
        BackendError: with both versions.
    """
    for name, version in versions.items():
        if folder.record.versions.get(name) != version:
            built_with = folder.record.versions.get(name, "unknown")
            raise BackendError(
                f"{folder.path} was built with {name} {built_with}, and here is {name} {version}."
                f" {_build_here(folder)}"
            )


def _build_here(folder: EngineFolder) -> str:
    return f"Build it on this machine: anyflow-build … --backend {folder.record.backend}"


class EngineWriter(AtomicFolderWriter):
    """Writes an engine folder whole or not at all, see `AtomicFolderWriter`.

    Args:
        path: the destination.
        overwrite: replace an engine that is there.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        super().__init__(path, _KIND, overwrite)

    def check(self) -> None:
        """Read the written folder back, before it gets its name."""
        load_engine_folder(self.folder, verify=False)

    def finish(self, record: EngineRecord) -> EngineFolder:
        """Write the record with the list of files, and give the engine its name."""
        complete = record.model_copy(update={"files": dict(self.files)})
        self.finish_folder(complete.to_text())
        return load_engine_folder(self.path, verify=False)


def narrow_ranges(bundle: Bundle, **axes: Range) -> dict[str, AxisRange]:
    """Return a bundle's ranges with some of them replaced, as an engine's record holds them."""
    return records_from_ranges(ShapeRanges(**{**vars(bundle.manifest.shape_ranges), **axes}))


def _read_backend(path: Path) -> str | None:
    try:
        return str(json.loads((path / ENGINE).read_bytes())["backend"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def device_label(device: DeviceRecord) -> str:
    """Return a device's name for messages, with its compute capability."""
    capability = (
        f" (compute capability {device.compute_capability})" if device.compute_capability else ""
    )
    return f"{device.name}{capability}"
