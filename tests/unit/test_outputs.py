"""Destinations: tried before the work, never replaced unasked, and no finished work is lost."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from anyflow_deploy.bundle import renames
from anyflow_deploy.bundle.atomic_io import atomic_folder, write_text_atomically
from anyflow_deploy.bundle.outputs import Output, OutputFile, OutputFolder, clear_partial_files
from anyflow_deploy.errors import OutputError

KINDS = [OutputFile, OutputFolder]


def fill(output: Output, text: str) -> None:
    """Write a text where the output's content goes."""
    path = output.partial / "text" if output.partial.is_dir() else output.partial
    path.write_text(text)


def content(path: Path) -> str:
    return (path / "text" if path.is_dir() else path).read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["renameat2", "links", "neither"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """File systems that know less and less."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    if request.param != "renameat2":
        monkeypatch.setattr(renames, "_renameat2", lambda *_: False)
    if request.param == "neither":
        monkeypatch.setattr(os, "link", refuse)
    return str(request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_of_two_writers_of_one_name_neither_loses_its_work(
    kind: type[Output], file_system: str, tmp_path: Path
) -> None:
    path = tmp_path / "fox.mp4"
    with kind(path) as first, kind(path) as second:
        fill(first, "first")
        fill(second, "second")
        first.commit()
        with pytest.raises(OutputError, match=r"fox\.mp4 appeared .* in .*/fox-1\.mp4\.$"):
            second.commit()
    assert content(path) == "first" and content(tmp_path / "fox-1.mp4") == "second"
    assert names(tmp_path) == ["fox-1.mp4", "fox.mp4"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_there_is_replaced_when_that_is_asked_for(
    kind: type[Output], file_system: str, tmp_path: Path
) -> None:
    for text in ("old", "new"):
        with kind(tmp_path / "it", overwrite=True) as output:
            fill(output, text)
            output.commit()
    assert content(tmp_path / "it") == "new" and names(tmp_path) == ["it"]


def test_a_replacement_that_was_cut_short_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.mkdir()
    (path / "text").write_text("old")
    path.rename(renames._replaced_path(path))
    with OutputFolder(path):
        assert content(path) == "old"
    assert names(tmp_path) == ["it"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["12:30.mp4", "a" * 251 + ".mp4", "é" * 125 + ".mp4", ".mp4"])
def test_every_name_that_the_file_system_takes_can_be_written(
    kind: type[Output], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        with kind(Path(name)) as output:
            assert output.partial.is_absolute() and len(output.partial.name) < 40
            fill(output, str(number))
            monkeypatch.setattr(output, "_check_free", None)  # only the start may ask
            if number == 0:
                output.commit()
                Path(name).rename("moved")
    assert names(tmp_path) == ["moved"] and content(tmp_path / "moved") == "0"


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_written_is_refused_before_any_work(
    kind: type[Output], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    cases = {
        tmp_path / ("a" * 260): "its name has 260 bytes, more than the file system takes",
        tmp_path / "file": "/file exists. Choose another name, or replace it with --overwrite",
        tmp_path / "file" / "it": "/file is not a folder. Make it first",
        tmp_path / "missing" / "it": "/missing is not a folder. Make it first",
    }
    for path, message in cases.items():
        with pytest.raises(OutputError, match=message):
            kind(path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match=r"may not be written to \(Permission denied\)") as caught:
        kind(tmp_path / "it")
    assert caught.value.errno == errno.EACCES and names(tmp_path) == ["file"]


def test_a_folder_or_a_device_is_no_file_to_replace(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(OutputError, match="is not a file, so it is not replaced"):
            OutputFile(path, overwrite=True)


def test_a_link_that_leads_nowhere_is_something_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "it").symlink_to("nowhere")
    with pytest.raises(OutputError, match="exists"):
        OutputFile(tmp_path / "it")


def test_an_empty_folder_is_filled_and_another_is_not(tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    with OutputFolder(tmp_path / "it") as output:
        fill(output, "new")
        output.commit()
    assert content(tmp_path / "it") == "new"
    with pytest.raises(OutputError, match="exists"):
        OutputFolder(tmp_path / "it")


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may have more than 8 bytes, in the block alone: pytest writes files, too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("kind", ["text", "latents", "embeddings"])
def test_a_full_disk_is_one_kind_of_error_and_leaves_the_old_file(
    kind: str, tmp_path: Path
) -> None:
    from anyflow_deploy.pipelines.text_encoder import save_embeddings
    from anyflow_deploy.pipelines.video import save_latents

    path = tmp_path / "it"
    path.write_text("old")
    array = np.zeros((1, 2, 3), np.float32)
    write = {
        "text": lambda: write_text_atomically(path, "a" * 100),
        "latents": lambda: save_latents(path, array),
        "embeddings": lambda: save_embeddings(path, array, ["a fox"]),
    }[kind]
    with (
        pytest.raises(OutputError, match=r"/it cannot be written: File too large\. Make room"),
        full_disk(),
    ):
        write()
    assert path.read_text() == "old" and names(tmp_path) == ["it"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_modes_are_those_of_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from anyflow_deploy.pipelines.text_encoder import save_embeddings
    from anyflow_deploy.pipelines.video import save_latents

    array = np.zeros((1, 2, 3), np.float32)
    before = os.umask(umask)
    try:
        save_latents(tmp_path / "latents", array)
        save_embeddings(tmp_path / "embeds", array, ["a fox"])
        with OutputFile(tmp_path / "private") as output:
            output.partial.chmod(0o600)
            output.commit()
        with atomic_folder(tmp_path / "folder") as partial:
            (partial / "below").mkdir()
            save_file({"a": array}, partial / "below" / "weights")
            (partial / "below" / "weights").chmod(0o600)
    finally:
        os.umask(before)
    modes = {
        str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode)
        for path in tmp_path.rglob("*")
    }
    folders = {"folder", "folder/below"}
    executable = mode | (mode & 0o444) >> 2
    assert modes == {n: executable if n in folders else mode for n in modes} and len(modes) == 6


WRITER = """
import sys, time
from pathlib import Path
from anyflow_deploy.bundle import outputs
with getattr(outputs, sys.argv[1])(Path(sys.argv[2])):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_killed_left_is_cleared_and_what_others_write_stays(
    kind: type[Output], tmp_path: Path
) -> None:
    path = tmp_path / "[a] *"
    command = [sys.executable, "-c", WRITER, kind.__name__, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        (left,) = names(tmp_path)
        with kind(path) as output:
            assert names(tmp_path) == sorted([left, output.partial.name])
        process.kill()
    with kind(path) as output:
        assert names(tmp_path) == [output.partial.name]


def test_a_number_in_a_name_says_nothing(tmp_path: Path) -> None:
    """As in another container, where the same number is another process."""
    (tmp_path / f".anyflow-{os.getpid()}.partial").write_text("half")
    (tmp_path / f".it.partial-{os.getpid()}").write_text("not of this version")
    clear_partial_files(tmp_path)
    assert names(tmp_path) == [f".it.partial-{os.getpid()}"]


def test_without_locks_nothing_is_taken_for_a_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".anyflow-1.partial").write_text("whose?")
    write_text_atomically(tmp_path / "it", "new")
    assert names(tmp_path) == [".anyflow-1.partial", "it"]


def test_a_video_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To ffmpeg `12:30.mp4` is a file of the protocol 12."""
    from anyflow_deploy.pipelines.video_io import VideoWriter, save_video

    monkeypatch.chdir(tmp_path)
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    (tmp_path / "a:b").mkdir()
    paths = [Path("12:30.mp4"), Path("a:b/x.mkv"), Path("a" * 251 + ".mp4")]
    for path in paths:
        save_video(path, frames, 16)
    with VideoWriter(Path("12:31.mp4"), 16, (16, 16)) as writer:
        assert not writer.path.exists()
        writer.append(frames)
    import av

    for path in (*paths, Path("12:31.mp4")):
        with av.open(f"file:{path}") as container:
            assert len(list(container.decode(video=0))) == 2


def test_a_growing_video_replaces_nothing_and_stays_whole_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anyflow_deploy.pipelines.video_io import Mp4FragmentEncoder, VideoWriter

    frames = np.zeros((1, 16, 16, 3), np.uint8)
    monkeypatch.setattr(Mp4FragmentEncoder, "encode", lambda *_: b"12345")
    path = tmp_path / "it.mp4"
    with OutputFile(path) as output, VideoWriter(output, 16, (16, 16)) as writer:
        path.write_text("another run's")
        with pytest.raises(OutputError, match=r"in .*/it-1\.mp4\.$"):
            writer.append(frames)
        assert writer.path.name == "it-1.mp4" and writer.path.read_bytes() == b"12345"
    with VideoWriter(path, 16, (16, 16)) as writer:
        writer.append(frames)
        with pytest.raises(OutputError, match="File too large"), full_disk():
            writer.append(frames)
    assert path.read_bytes() == b"12345" and writer.frames == 1
