"""Renames that Python's library has no name for, and what makes them last.

`rename_new` never replaces anything, `replace_folder` exchanges two folders in one step, where the
file system can; both have a second way for file systems that cannot. `fsync_path` and `fsync_tree`
make files durable, so that a name never stands for data that a power cut took.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
from pathlib import Path

PREFIX = ".anyflow-"
"""What every hidden file and folder of ours begins with."""

_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EMLINK)
"""What file systems answer that lack a kind of rename, or links."""


def rename_new(source: Path, target: Path) -> None:
    """Rename a file or folder to a name that nothing has.

    Raises:
        FileExistsError: the name is taken.
        OSError: it cannot be renamed.
    """
    if _renameat2(source, target, _RENAME_NOREPLACE):
        return
    if source.is_dir():
        target.mkdir()  # the name is ours now, and an empty folder may be replaced
        source.rename(target)
        return
    try:
        os.link(source, target)
        source.unlink()
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # the name is ours now
        source.replace(target)


def replace_folder(partial: Path, path: Path) -> None:
    """Rename a synced folder into place durably; a folder that is there is removed.

    Raises:
        OSError: it cannot be renamed; the old folder is in its place.
    """
    if not path.exists():
        partial.rename(path)
        fsync_path(path.parent)
        return
    if _renameat2(partial, path, _RENAME_EXCHANGE):
        old = partial
    else:
        old = _replaced_path(path)
        path.rename(old)
        try:
            partial.rename(path)
        except BaseException:
            old.rename(path)
            raise
    fsync_path(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def finish_replacement(path: Path) -> None:
    """Undo or finish a replacement that was cut short where folders cannot be exchanged."""
    old = _replaced_path(path)
    if not old.is_dir():
        return
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.rename(path)


def _replaced_path(path: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]
    return path.with_name(f"{PREFIX}{digest}.replaced")


def is_empty_folder(path: Path) -> bool:
    """Whether there is a folder with nothing in it."""
    return file_mode(path) != 0 and path.is_dir() and not any(path.iterdir())


def file_mode(path: Path) -> int:
    """Return type and permissions of what a path leads to; 0 where nothing is there.

    Raises:
        OSError: it cannot be told.
    """
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Rename with flags of Linux; False where the library or the file system cannot.

    Raises:
        OSError: FileExistsError for RENAME_NOREPLACE and a target that is there.
    """
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    here = -100  # AT_FDCWD
    if function(here, os.fsencode(source), here, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_SUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(target))


def fsync_path(path: Path) -> None:
    """Make a file or folder durable.

    A rename survives a power cut only if the folder that holds the name was synced.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Make everything in a folder durable, and the folder itself."""
    for path in folder.iterdir():
        if path.is_symlink():
            continue
        if path.is_dir():
            fsync_tree(path)
        else:
            fsync_path(path)
    fsync_path(folder)
