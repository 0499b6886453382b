"""Destinations that are opened before the work whose result they take.

A video, a bundle or a report is written last, after minutes or days. So its place is tried first:
the name, the folder and the right to write there. Then the work goes on, and what it made is
renamed into place without replacing anything, unless that was asked for.

    with OutputFile(path, overwrite=False) as output:
        frames = make_video()                    # hours
        save(frames, output.partial)
        output.commit()

Meanwhile the data is in a file or folder with a short name of its own, `.anyflow-TOKEN.partial`,
beside the destination and made with the modes that the umask gives. A lock on it (flock) ends with
the process that holds it, also in another container. What has no such lock was left by a killed
process, and the next writer in that folder clears it away.

Where the destination appeared during the work, the result gets the next free name and the error
says which: no finished work is thrown away.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from anyflow_deploy.bundle.renames import (
    PREFIX,
    file_mode,
    finish_replacement,
    fsync_path,
    fsync_tree,
    is_empty_folder,
    rename_new,
    replace_folder,
)
from anyflow_deploy.errors import OutputError

_PARTIAL = ".partial"
_LONGEST_NAME = 255  # bytes; what file systems allow at most

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)

O = TypeVar("O", bound="Output")  # noqa: E741 - the letter for outputs


class Output:
    """A destination and the partial file or folder that becomes it; use one of the two subclasses.

    Args:
        path: the destination.
        overwrite: replace what is there.
        flag: what the user calls the destination, for the messages.

    Attributes:
        path: the destination, absolute.
        partial: where to write meanwhile, absolute. Its suffix differs, so name the format to
            writers that choose it by the suffix. It is there inside the `with` block.

    Raises:
        OutputError: the destination is taken, its name is not possible, or its folder cannot be
            written to. The constructor raises it, before any work.
    """

    _noun = "file"

    def __init__(self, path: str | Path, overwrite: bool = False, flag: str = "name") -> None:
        self.path = Path(os.path.abspath(path))  # noqa: PTH100 - Path.resolve would follow a link
        self.partial = self.path
        self.overwrite = overwrite
        self.flag = flag
        self._lock: int | None = None
        self._created_mode = 0
        self._committed = False
        with self.explain_errors():
            self._check_free()
            self._check_folder()
            self._try_name()

    def __enter__(self: O) -> O:
        with self.explain_errors():
            self._clear_leftovers()
            self.partial, self._lock = self._create()
            self._created_mode = os.fstat(self._lock).st_mode
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._committed and self.partial != self.path:
            _remove(self.partial)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if isinstance(value, OutputError) or not isinstance(value, OSError):
            return
        if value.errno in (*_NO_ROOM, errno.EROFS):
            raise self._error(value) from None

    def commit(self) -> None:
        """Make what was written durable, and give it its name.

        Raises:
            OutputError: it cannot be written, or the destination appeared meanwhile; then the
                result has another name, which the message says.
        """
        with self.explain_errors():
            self._sync()
            if self.overwrite:
                self._replace()
            else:
                self._rename()
            self._committed = True

    def _rename(self) -> None:
        """Rename without replacing; a result whose place is taken gets the next free name."""
        with suppress(FileExistsError):
            self._rename_new(self.path)
            fsync_path(self.path.parent)
            return
        for number in itertools.count(1):
            ending = f"-{number}{self.path.suffix}"
            stem = os.fsencode(self.path.stem)[: _LONGEST_NAME - len(os.fsencode(ending))]
            other = self.path.with_name(stem.decode(errors="ignore") + ending)
            with suppress(FileExistsError):
                self._rename_new(other)
                break
        self._committed = True
        taken = self.path
        self.path = other
        fsync_path(other.parent)
        raise OutputError(
            f"{taken} appeared while this {self._noun} was made, and is not replaced. The result is"
            f" in {other}."
        )

    def _check_free(self) -> None:
        if os.path.lexists(self.path) and not self.overwrite:
            raise OutputError(
                f"{self.path} exists. Choose another {self.flag}, or replace it with --overwrite."
            )

    def _check_folder(self) -> None:
        folder = self.path.parent
        if not stat.S_ISDIR(file_mode(folder)):
            raise OutputError(
                f"{self.path} cannot be written: {folder} is not a folder. Make it first, or choose"
                f" another {self.flag}."
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def _try_name(self) -> None:
        """Create a hidden neighbour whose name is as long and has the same characters."""
        name = os.fsencode(self.path.name)
        first = os.fsencode(self.path.name[:1])
        cover = b"_" if first == b"." else b"."
        neighbour = os.path.join(  # noqa: PTH118 - bytes
            os.fsencode(self.path.parent), cover * len(first) + name[len(first) :]
        )
        try:
            handle = os.open(neighbour, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC)
        except FileExistsError:  # somebody's file: the name is possible
            return
        os.close(handle)
        os.unlink(neighbour)  # noqa: PTH108 - bytes

    def _clear_leftovers(self) -> None:
        with suppress(OSError):  # writing will say what is wrong with the folder
            clear_partial_files(self.path.parent)

    @contextmanager
    def explain_errors(self) -> Iterator[None]:
        """Turn what the system says in the block into an `OutputError`."""
        try:
            yield
        except OutputError:
            raise
        except OSError as error:
            raise self._error(error) from None

    def _error(self, error: OSError) -> OutputError:
        """Say in one sentence why the destination cannot be written."""
        if error.errno == errno.ENAMETOOLONG:
            size = len(os.fsencode(self.path.name))
            reason = f"its name has {size} bytes, more than the file system takes"
            advice = f"Choose a shorter {self.flag}."
        elif error.errno in _NO_ROOM:
            reason = f"{error.strerror}"
            advice = f"Make room, or choose another {self.flag}."
        elif error.errno in _NO_RIGHT:
            reason = f"{self.path.parent} may not be written to ({error.strerror})"
            advice = f"Choose another {self.flag}, or change the folder's permissions."
        else:
            reason = f"{error.strerror or error}"
            advice = f"Choose another {self.flag}."
        return OutputError(f"{self.path} cannot be written: {reason}. {advice}", error)

    def _create(self) -> tuple[Path, int]:
        """Create the partial and lock it."""
        while True:
            partial = self.path.with_name(f"{PREFIX}{secrets.token_hex(6)}{_PARTIAL}")
            handle = self._open_new(partial)
            try:
                if _lock(handle) is not False and _is_same(handle, partial):
                    return partial, handle
            except BaseException:
                os.close(handle)
                _remove(partial)
                raise
            os.close(handle)  # another process took it for a leftover

    def _open_new(self, partial: Path) -> int:
        raise NotImplementedError

    def _sync(self) -> None:
        raise NotImplementedError

    def _replace(self) -> None:
        raise NotImplementedError

    def _rename_new(self, path: Path) -> None:
        rename_new(self.partial, path)


class OutputFile(Output):
    """A file's destination; see `Output`."""

    def _check_free(self) -> None:
        super()._check_free()
        if os.path.lexists(self.path) and not stat.S_ISREG(file_mode(self.path)):
            raise OutputError(
                f"{self.path} is there and is not a file, so it is not replaced. Choose another"
                f" {self.flag}."
            )

    def _open_new(self, partial: Path) -> int:
        return os.open(partial, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)

    def _sync(self) -> None:
        _widen_mode(self.partial, self._created_mode)
        fsync_path(self.partial)

    def _replace(self) -> None:
        self.partial.replace(self.path)
        fsync_path(self.path.parent)


def output_path(destination: Path | OutputFile) -> Path:
    """Return the path of a destination, which may be open already."""
    return destination.path if isinstance(destination, OutputFile) else destination


class OutputFolder(Output):
    """A folder's destination; see `Output`. An empty folder is as good as none."""

    _noun = "folder"

    def _check_free(self) -> None:
        if not self.overwrite and is_empty_folder(self.path):
            return
        super()._check_free()

    def _open_new(self, partial: Path) -> int:
        partial.mkdir()
        return os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _sync(self) -> None:
        mode = self._created_mode
        for path in self.partial.rglob("*"):
            if not path.is_symlink():
                _widen_mode(path, mode if path.is_dir() else mode & 0o666)
        fsync_tree(self.partial)

    def _replace(self) -> None:
        replace_folder(self.partial, self.path)

    def _rename_new(self, path: Path) -> None:
        if is_empty_folder(path):
            self.partial.rename(path)  # replaces an empty folder, and no other
            return
        super()._rename_new(path)

    def _clear_leftovers(self) -> None:
        super()._clear_leftovers()
        finish_replacement(self.path)


def clear_partial_files(folder: Path) -> None:
    """Remove the partial files and folders that killed processes left in a folder."""
    for entry in list(os.scandir(folder)):
        if entry.name.startswith(PREFIX) and entry.name.endswith(_PARTIAL):
            _clear_if_dead(Path(entry.path), entry.is_dir(follow_symlinks=False))


def _clear_if_dead(path: Path, is_folder: bool) -> None:
    access = os.O_RDONLY | os.O_DIRECTORY if is_folder else os.O_RDWR
    try:
        handle = os.open(path, access | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if _lock(handle) is True and _is_same(handle, path):
            _remove(path)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Lock a file or folder: True, or False where another holds it; None without such locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_same(handle: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _widen_mode(path: Path, mode: int) -> None:
    """Add permissions that a file lacks; a file with several names is somebody else's, too."""
    status = path.stat()
    wide = stat.S_IMODE(status.st_mode | mode)
    if wide != stat.S_IMODE(status.st_mode) and (status.st_nlink == 1 or path.is_dir()):
        path.chmod(wide)
