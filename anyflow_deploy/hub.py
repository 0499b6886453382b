"""Files of the Hugging Face Hub: their names, and how they get here.

A `--checkpoint` or a bundle may be OWNER/NAME, or OWNER/NAME@REVISION, in place of a path. What is
on this machine comes first: a folder of that name is never shadowed by the Hub.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from anyflow_deploy.errors import CheckpointError

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)


def parse_hub_id(text: str | Path) -> tuple[str, str | None] | None:
    """Return the repository and the revision that a text names; None for a path.

    A path that exists, that is absolute or that begins with a dot is a path.
    """
    match = _HUB_ID.fullmatch(str(text))
    if match is None or ".." in str(text) or os.path.lexists(text):
        return None
    return match[1], match[2]


def download(hub_id: str, revision: str | None, files: list[str], advice: str) -> Path:
    """Download files of a Hub repository, unless the cache has all of them.

    The folder is named after the commit, which is how the Hub's cache is laid out.

    Args:
        hub_id: OWNER/NAME of the repository.
        revision: commit, branch or tag; None for the default branch.
        files: patterns of the files.
        advice: end of the error's text: what the calling command can do instead.

    Raises:
        CheckpointError: with what was tried and what to do without the network.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=files))
    except Exception as error:  # noqa: BLE001 - the Hub's client raises errors of three libraries; all mean "not to be had"
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"tried to download {hub_id!r} from the Hugging Face Hub (no folder here has that name)"
            f" and looked in its local cache; neither has it ({type(error).__name__}: {reason})."
            f" {advice}"
        ) from None


def cached_blobs(folder: Path) -> Path | None:
    """Return the folder that the files of a Hub's snapshot are links into; None for others.

    Args:
        folder: a snapshot, `…/models--OWNER--NAME/snapshots/COMMIT`, or a folder in one.
    """
    for place in (folder.resolve(), *folder.resolve().parents):
        repository = place.parent.parent
        if place.parent.name == "snapshots" and "--" in repository.name:
            return repository / "blobs"
    return None
