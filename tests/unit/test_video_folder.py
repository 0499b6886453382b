"""Folders of videos and captions as people have them: what is read, and what is wrong with it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.training.data.captions import decode_caption
from anyflow_deploy.training.data.samples import BrokenSampleError, SampleShape, read_sample
from anyflow_deploy.training.data.tar_index import index_shards
from anyflow_deploy.training.data.video_folder import find_videos, read_caption, sample_key
from tests.media import grey, write_clip

CAPTION = "Ein Füchslein läuft, 狐 runs"


def add(folder: Path, *names: str, caption: bytes = b"a fox") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"-")
        path.with_suffix(".txt").write_bytes(caption)


def test_all_containers_and_linked_folders_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    add(folder, "a.webm", "b.avi", "c.M4V", "d.mov", "e.mkv", "f.MP4", "sub/deep/g 1.0 (x).ts")
    add(tmp_path / "elsewhere", "h.mp4")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "sub" / "loop").symlink_to(folder)  # would never end
    found = find_videos(folder)
    names = [str(path.relative_to(folder)) for path in found.videos]
    assert names == [
        *("a.webm", "b.avi", "c.M4V", "d.mov", "e.mkv", "f.MP4", "link/h.mp4"),
        "sub/deep/g 1.0 (x).ts",
    ]
    assert not found.others and not found.describe_others()
    assert sample_key(folder, found.videos[-1]) == "sub_deep_g 1_0 (x)"


def test_what_is_not_read_is_counted_and_named(tmp_path: Path) -> None:
    add(tmp_path, "a.mp4")
    for name in ("1.jpg", "2.JPG", "x.safetensors", "lonely.txt", "Makefile", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    said = find_videos(tmp_path).describe_others()
    assert said.startswith("not read: 2 .jpg (such as 1.jpg), ")
    assert all(f"1 {kind}" in said for kind in (".txt", ".safetensors", "without an ending"))
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(AnyFlowError, match=r"holds no videos \(.mp4, .*; not read: .*2 .jpg"):
        find_videos(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_captions_that_say_their_encoding_are_read(tmp_path: Path, encoding: str) -> None:
    add(tmp_path, "a.mp4", caption=f"{CAPTION}\r\n".encode(encoding))
    assert read_caption(find_videos(tmp_path).videos[0]) == CAPTION


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("läuft".encode("latin-1"), r"a.txt is not UTF-8 \(byte 0xe4 at 1\), but perhaps Latin-1"),
        ("fox".encode("utf-16-le"), "a.txt holds NUL characters: perhaps UTF-16 without its byte"),
        (
            "fox".encode("utf-16")[:-1],
            "a.txt begins as UTF-16 and is none at byte 6: it is dam",
        ),
        (b" \n", "no caption, such as .*a.mp4, whose caption is empty. Write .* into a"),
        (None, "1 of 1 videos have no caption, such as .*a.mp4. Write"),
    ],
)
def test_captions_that_cannot_be_used_say_why(
    tmp_path: Path, data: bytes | None, reason: str
) -> None:
    add(tmp_path, "a.mp4", caption=data or b"")
    if data is None:
        (tmp_path / "a.txt").unlink()
    with pytest.raises(AnyFlowError, match=reason):
        find_videos(tmp_path)


def test_broken_links_say_where_they_lead(tmp_path: Path) -> None:
    add(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "b.mp4").unlink()
    (tmp_path / "b.mp4").symlink_to("gone.mp4")
    with pytest.raises(AnyFlowError, match=r"1 of 2 .* links to nothing: .*b.mp4 is a link to g"):
        find_videos(tmp_path)
    (tmp_path / "b.mp4").unlink()
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.txt").symlink_to("gone.txt")
    (tmp_path / "b.txt").unlink()
    with pytest.raises(AnyFlowError, match=r"1 of 1 captions .*: .*a.txt is a link to gone.txt"):
        find_videos(tmp_path)


def test_what_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tmp_path, "a.mp4")

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything
    with pytest.raises(AnyFlowError, match="a.txt cannot be read: Permission denied"):
        find_videos(tmp_path)


def test_samples_of_shards_say_why_they_are_broken(tmp_path: Path) -> None:
    import tarfile

    clip = write_clip(tmp_path / "v 1.0 (clean).mp4", [grey(0)] * 2)
    latin = tmp_path / "w.txt"
    latin.write_bytes("läuft".encode("latin-1"))
    with tarfile.open(tmp_path / "s.tar", "w") as file:
        file.add(clip, clip.name)
        file.add(latin, "w.txt")
        file.add(clip, "w.webm")
    shape = SampleShape((1, 16, 4, 6), (4, 8))
    dotted, foreign = index_shards(tmp_path).entries
    with pytest.raises(BrokenSampleError, match=r"v 1.0 \(clean\).mp4 has a dot in its name") as e:
        read_sample(dotted, shape, None)
    assert "--frames" not in e.value.advice
    with pytest.raises(BrokenSampleError, match="the caption w.txt is not UTF-8"):
        read_sample(foreign, shape, None)
    assert decode_caption(b"\xef\xbb\xbf fox ", "a") == "fox"
