"""One file, or a folder, written whole or not at all, and durable before it has its name."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from anyflow_deploy.bundle import outputs, renames
from anyflow_deploy.bundle.atomic_io import (
    atomic_file,
    atomic_folder,
    write_bytes_atomically,
    write_text_atomically,
)
from anyflow_deploy.errors import OutputError

Write = Callable[[Path], None]


def write_folder(path: Path) -> None:
    with atomic_folder(path) as partial:
        (partial / "below").mkdir()
        (partial / "below" / "file").write_text("new")


def write_file(path: Path) -> None:
    write_text_atomically(path, "new")


@pytest.mark.parametrize(
    ("write", "synced"),
    [
        (write_file, ["partial", "parent"]),
        (write_folder, ["file", "below", "partial", "parent"]),
    ],
)
def test_all_is_synced_before_the_name_and_the_name_after(
    write: Write, synced: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def record(path: Path) -> None:
        assert (tmp_path / "it").exists() == (path == tmp_path)
        calls.append("parent" if path == tmp_path else path.name.rpartition(".")[2])

    monkeypatch.setattr(renames, "fsync_path", record)
    monkeypatch.setattr(outputs, "fsync_path", record)
    write(tmp_path / "it")
    assert calls == synced


def test_an_older_file_is_replaced(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "it", "old")
    write_bytes_atomically(tmp_path / "it", b"new")
    assert (tmp_path / "it").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "it").write_text("old")

    def write_half() -> None:
        with atomic_file(tmp_path / "it") as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert (tmp_path / "it").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_an_error_leaves_the_old_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "it")

    def write_half() -> None:
        with atomic_folder(tmp_path / "it") as partial:
            (partial / "half").write_text("")
            raise OSError("midway")

    with pytest.raises(OSError, match="midway"):
        write_half()
    assert (tmp_path / "it" / "below" / "file").is_file() and len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_replaced_where_that_is_wanted(tmp_path: Path) -> None:
    write_folder(tmp_path / "it")
    with atomic_folder(tmp_path / "it") as partial:
        (partial / "other").write_text("")
    assert [path.name for path in (tmp_path / "it").iterdir()] == ["other"]
    with pytest.raises(OSError, match="exists"), atomic_folder(tmp_path / "it", replace=False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty", replace=False) as partial:
        (partial / "other").write_text("")
    assert (tmp_path / "empty" / "other").is_file()


def test_a_folder_that_cannot_be_named_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "it")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            raise PermissionError(errno.EACCES, "no")
        return rename(path, target)

    monkeypatch.setattr(renames, "_renameat2", lambda *_: False)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="may not be written to"):
        write_folder(tmp_path / "it")
    assert (tmp_path / "it" / "below" / "file").is_file() and len(list(tmp_path.iterdir())) == 1
