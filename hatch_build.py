"""A build hook for the sdist: puts the package's symbolic links into it.

In the repository `anyflow_deploy/export`, `engines` and `training` are links to the folders at the
top. hatchling can store what a link leads to, but not the link. pyproject.toml therefore leaves the
three out of the sdist, and this hook appends them to the finished archive as links. What is
unpacked from it is the repository again: it builds the same wheel and runs the tests.
"""

from __future__ import annotations

import gzip
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class LinksBuildHook(BuildHookInterface[Any]):
    """Appends the package's links to the sdist."""

    PLUGIN_NAME = "custom"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Rewrite the finished archive with the links at its end."""
        archive = Path(artifact_path)
        links = [
            path
            for path in sorted(Path(self.root, "anyflow_deploy").iterdir())
            if path.is_symlink()
        ]
        with tempfile.TemporaryFile() as unzipped:
            with gzip.open(archive) as zipped:
                shutil.copyfileobj(zipped, unzipped)
            unzipped.seek(0)
            with tarfile.open(fileobj=unzipped, mode="a", format=tarfile.PAX_FORMAT) as tar:
                # The name and the time of the first entry: hatchling's are the same for all.
                first = tar.getmembers()[0]
                top = first.name.split("/")[0]
                for link in links:
                    entry = tarfile.TarInfo(f"{top}/{link.relative_to(self.root).as_posix()}")
                    entry.type = tarfile.SYMTYPE
                    entry.linkname = str(link.readlink())
                    entry.mtime = first.mtime
                    entry.mode = 0o777
                    tar.addfile(entry)
            unzipped.seek(0)
            with (
                archive.open("wb") as file,
                gzip.GzipFile(
                    filename="", fileobj=file, mode="wb", mtime=int(first.mtime)
                ) as zipped,
            ):
                shutil.copyfileobj(unzipped, zipped)
