"""Finds the videos of a folder and their captions, and says what else is there.

NAME.txt beside NAME.mp4 is its caption. Folders inside are searched, those that are links, too.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.pipelines.clips import CLIP_SUFFIXES
from anyflow_deploy.training.data.captions import decode_caption

CAPTION_SUFFIX = ".txt"

_NAMED = 6
"""Kinds of other files that are named."""


@dataclass(frozen=True)
class VideoFolder:
    """What a folder holds.

    Attributes:
        videos: sorted by name.
        others: files that are neither a video nor the caption of one.
    """

    videos: list[Path]
    others: list[Path]

    def describe_others(self) -> str:
        """Count and name what is not read, as `not read: 2 .jpg (such as a.jpg)`; or nothing."""
        if not self.others:
            return ""
        kinds = Counter(path.suffix.lower() or "without an ending" for path in self.others)
        first = {path.suffix.lower() or "without an ending": path for path in self.others[::-1]}
        shown = [
            f"{count} {kind} (such as {first[kind].name})"
            for kind, count in kinds.most_common(_NAMED)
        ]
        rest = sum(kinds.values()) - sum(count for _, count in kinds.most_common(_NAMED))
        if rest:
            shown.append(f"{rest} of other kinds")
        return f"not read: {', '.join(shown)}"


def find_videos(folder: Path) -> VideoFolder:
    """Find the videos of a folder and its subfolders.

    Raises:
        AnyFlowError: no videos, a broken link, two of one name, or one whose caption is missing,
            empty or in another encoding.
    """
    if not folder.is_dir():
        raise AnyFlowError(
            f"{folder} is not a folder. Give a folder of videos ({_shown_suffixes()}) with captions"
            f" ({CAPTION_SUFFIX})."
        )
    files = sorted(path for path in _walk(folder) if not path.name.startswith("."))
    videos = [path for path in files if path.suffix.lower() in CLIP_SUFFIXES]
    captions = {path.with_suffix(CAPTION_SUFFIX) for path in videos}
    known = captions.union(videos)
    found = VideoFolder(videos, [path for path in files if path not in known])
    if not videos:
        others = found.describe_others()
        raise AnyFlowError(
            f"{folder} holds no videos ({_shown_suffixes()}){others and '; ' + others}. Give the"
            " folder they are in."
        )
    _check_links(folder, videos)
    _check_keys(folder, videos)
    _check_captions(videos)
    return found


def sample_key(folder: Path, path: Path) -> str:
    """Return the name of a sample: the path without its ending.

    webdataset ends a name at its first dot, and drops `__…`.
    """
    return (
        str(path.relative_to(folder).with_suffix(""))
        .replace(".", "_")
        .replace("/", "_")
        .lstrip("_")
        or "video"
    )


def read_caption(path: Path) -> str:
    """Read the caption of a video; empty where there is none.

    Raises:
        AnyFlowError: it cannot be read, or is in another encoding.
    """
    caption = path.with_suffix(CAPTION_SUFFIX)
    try:
        data = caption.read_bytes()
    except FileNotFoundError:
        if caption.is_symlink():
            raise _broken_link(caption) from None
        return ""
    except OSError as error:
        raise AnyFlowError(f"the caption {caption} cannot be read: {error.strerror}.") from None
    return decode_caption(data, str(caption))


def _walk(folder: Path) -> Iterator[Path]:
    """Yield all files; a folder that a link leads back to from inside is not entered again."""

    def refuse(error: OSError) -> None:
        raise AnyFlowError(f"{error.filename} cannot be read: {error.strerror}.") from None

    for name, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        here = Path(name)
        above = {here.resolve(), *here.resolve().parents}
        folders[:] = [
            f for f in folders if not (here / f).is_symlink() or (here / f).resolve() not in above
        ]
        yield from (here / file for file in files)


def _check_links(folder: Path, videos: list[Path]) -> None:
    broken = [path for path in videos if path.is_symlink() and not path.exists()]
    if broken:
        raise AnyFlowError(
            f"{len(broken)} of {len(videos)} videos in {folder} are links to nothing:"
            f" {_broken_link(broken[0])}"
        )


def _broken_link(path: Path) -> AnyFlowError:
    return AnyFlowError(
        f"{path} is a link to {path.readlink()}, which does not exist. Repair or remove it."
    )


def _check_keys(folder: Path, videos: list[Path]) -> None:
    (key, times), *_ = Counter(sample_key(folder, path) for path in videos).most_common(1)
    if times > 1:
        raise AnyFlowError(
            f"{folder} holds {times} videos whose name in a shard would be {key!r}. Rename all but"
            " one."
        )


def _check_captions(videos: list[Path]) -> None:
    without_caption = []
    unreadable = []
    for path in videos:
        try:
            if not read_caption(path):
                without_caption.append(path)
        except AnyFlowError as error:
            unreadable.append(error)
    if unreadable:
        raise AnyFlowError(
            f"{len(unreadable)} of {len(videos)} captions cannot be read: {unreadable[0]}"
        )
    if without_caption:
        first = without_caption[0]
        caption = first.with_suffix(CAPTION_SUFFIX)
        state = ", whose caption is empty" if caption.exists() else ""
        raise AnyFlowError(
            f"{len(without_caption)} of {len(videos)} videos have no caption, such as"
            f" {first}{state}. Write what it shows into {caption.name} beside it, or take the video"
            " out of the folder."
        )


def _shown_suffixes() -> str:
    return ", ".join(CLIP_SUFFIXES)
