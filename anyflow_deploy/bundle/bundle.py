"""The bundle: the folder that export writes and engines read.

Reading trusts nothing: the schema must be known, every file must be inside the folder, present, of
the right size and of the right SHA-256. Writing is all or nothing (`atomic_io`): a bundle that has
a manifest was finished.

Reports (`validation.json`) and engines built later (`engines/`) live in the same folder and name
the bundle's `digest`, but are not listed in the manifest: making them must not change the bundle.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from anyflow_deploy.bundle.atomic_io import ArtifactKind, AtomicFolderWriter, check_file
from anyflow_deploy.bundle.json_records import RecordFormat
from anyflow_deploy.bundle.manifest import MANIFEST, SCHEMA, Manifest
from anyflow_deploy.errors import AnyFlowError, BundleError, CheckpointError, unreadable
from anyflow_deploy.hub import download, parse_hub_id

_KIND = ArtifactKind(
    "bundle", MANIFEST, "manifest", "--output", "Copy the bundle again, or export again."
)
_FORMAT = RecordFormat(Manifest, SCHEMA, "manifest", "Export again.", BundleError)


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest was read.

    Attributes:
        path: the folder.
        manifest: its contents.
        digest: SHA-256 of manifest.json, which names the hash of every other file; it
            identifies the whole bundle.
    """

    path: Path
    manifest: Manifest
    digest: str

    def file(self, name: str) -> Path:
        """Return the path of a file that the manifest lists.

        Raises:
            BundleError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise BundleError(
                f"{self.path} has no file {name!r}; its manifest lists"
                f" {', '.join(self.manifest.files)}."
            )
        return self.path / name


def load_bundle(path: str | Path, verify: bool = True) -> Bundle:
    """Open a bundle.

    Args:
        path: the folder that holds manifest.json, or a repository on the Hub, OWNER/NAME or
            OWNER/NAME@REVISION.
        verify: compare every file with its hash (reads the whole bundle once). Pass False only
            where that was done before, on storage that cannot have changed since; sizes and paths
            are checked even then.

    Raises:
        BundleError: no manifest, a newer schema, an unknown key, a missing or changed file, a path
            out of the folder, what may not be read, or a Hub that does not have it.
    """
    hub_id = parse_hub_id(path)
    folder = Path(path) if hub_id is None else _download_bundle(*hub_id)
    try:
        text = (folder / MANIFEST).read_bytes()
    except PermissionError as error:
        raise BundleError(unreadable(folder / MANIFEST, error)) from None
    except OSError as error:
        raise BundleError(
            f"{folder} is not a bundle: {MANIFEST} cannot be read ({error.strerror}). Make one with"
            " anyflow-export."
        ) from None
    bundle = Bundle(
        folder, _FORMAT.parse(text, folder / MANIFEST), hashlib.sha256(text).hexdigest()
    )
    for name, record in bundle.manifest.files.items():
        check_file(folder, name, record, verify, _KIND)
    for graph in bundle.manifest.graphs.values():
        bundle.file(graph.file)
    try:
        bundle.manifest.architecture, bundle.manifest.shape_ranges  # noqa: B018 - both check what they read
    except AnyFlowError as error:
        raise BundleError(f"{folder / MANIFEST} is damaged: {error} Export again.") from None
    return bundle


def _download_bundle(hub_id: str, revision: str | None) -> Path:
    """Download a bundle from the Hub: its manifest, then the files that it lists."""
    folder = _download(hub_id, revision, [MANIFEST])
    try:
        text = (folder / MANIFEST).read_bytes()
    except OSError:
        raise BundleError(f"{hub_id} on the Hub is not a bundle: it has no {MANIFEST}.") from None
    files = sorted(_FORMAT.parse(text, folder / MANIFEST).files)
    return _download(hub_id, folder.name, [MANIFEST, *files])


def _download(hub_id: str, revision: str | None, files: list[str]) -> Path:
    try:
        return download(hub_id, revision, files, "Give a folder that anyflow-export made.")
    except CheckpointError as error:
        raise BundleError(str(error)) from None


class BundleWriter(AtomicFolderWriter):
    """Writes a bundle whole or not at all.

    An `AtomicFolderWriter` whose marker is the manifest:

        with BundleWriter(path) as writer:
            writer.write("transition.onnx", data)
            writer.finish(manifest)

    Args:
        path: the destination; its parent must exist.
        overwrite: replace a bundle that is there.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        super().__init__(path, _KIND, overwrite)

    def check(self) -> None:
        """Load the finished folder as a bundle, without reading its files, to check it."""
        load_bundle(self.folder, verify=False)

    def finish(self, manifest: Manifest) -> Bundle:
        """Write the manifest with the list of files, and give the bundle its name."""
        full = manifest.model_copy(update={"files": dict(self.files)})
        self.finish_folder(full.to_text())
        return load_bundle(self.path, verify=False)
