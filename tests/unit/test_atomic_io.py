"""One file, or a folder, written whole or not at all, and durable before it has its name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from anyflow_deploy.bundle import atomic_io
from anyflow_deploy.bundle.atomic_io import (
    atomic_file,
    atomic_folder,
    clear_partial_files,
    write_bytes_atomically,
    write_text_atomically,
)

Write = Callable[[Path], None]


def write_folder(path: Path) -> None:
    with atomic_folder(path) as partial:
        (partial / "below").mkdir()
        (partial / "below" / "file").write_text("new")


def write_file(path: Path) -> None:
    write_text_atomically(path, "new")


@pytest.fixture(scope="module")
def dead() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        return process.pid


@pytest.mark.parametrize(
    ("write", "synced"),
    [
        (write_file, [".it.partial", "parent"]),
        (write_folder, ["file", "below", ".it.partial", "parent"]),
    ],
)
def test_all_is_synced_before_the_name_and_the_name_after(
    write: Write, synced: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def record(path: Path) -> None:
        assert (tmp_path / "it").exists() == (path == tmp_path)
        calls.append("parent" if path == tmp_path else path.name.removesuffix(f"-{os.getpid()}"))

    monkeypatch.setattr(atomic_io, "fsync_path", record)
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
    with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "it", replace=False):
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
        if ".partial-" in path.name:
            raise PermissionError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        write_folder(tmp_path / "it")
    assert (tmp_path / "it" / "below" / "file").is_file() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_what_killed_writers_left_goes_and_what_others_write_stays(
    write: Write, dead: int, tmp_path: Path
) -> None:
    (tmp_path / f".it.partial-{dead}").write_text("half")
    (tmp_path / f".it.partial-{os.getppid()}").mkdir()
    (tmp_path / f".other.partial-{dead}").write_text("half")
    write(tmp_path / "it")
    left = {f".it.partial-{os.getppid()}", f".other.partial-{dead}", "it"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_half_files_of_a_whole_folder_are_removed(dead: int, tmp_path: Path) -> None:
    for name in (
        f".a.tar.partial-{dead}",
        f".b.tar.partial-{os.getppid()}",
        ".c.tar.partial-",
        "d.partial-1",
    ):
        (tmp_path / name).write_text("half")
    clear_partial_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f".b.tar.partial-{os.getppid()}",
        "d.partial-1",
    }
