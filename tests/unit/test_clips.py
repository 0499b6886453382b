"""Clips as people have them, read as a player shows them; every input is made here."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.pipelines.clips import CLIP_SUFFIXES, ClipReader
from anyflow_deploy.pipelines.frame_fit import FrameFit
from anyflow_deploy.pipelines.pictures import load_picture
from anyflow_deploy.pipelines.video_io import load_video
from tests.media import (
    HEIGHT,
    WIDTH,
    Pixels,
    corners,
    grey,
    hidden_colours,
    near,
    numbers,
    turn_clip,
    write_clip,
)

TURNS: dict[str, tuple[tuple[float, float, float, float], Callable[[Pixels], Pixels]]] = {
    "as stored": ((1, 0, 0, 1), lambda p: p),
    "turned by 90 degrees": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "turned by 180 degrees": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "turned by 270 degrees": ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "flipped": ((1, 0, 0, -1), lambda p: p[::-1]),
    "turned by 90 degrees and mirrored": ((0, 1, 1, 0), lambda p: np.rot90(p, -1)[:, ::-1]),
    "turned by 270 degrees and mirrored": ((0, -1, -1, 0), lambda p: np.rot90(p, 1)[:, ::-1]),
}


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
@pytest.mark.parametrize("name", TURNS)
def test_clips_are_turned_as_their_matrix_says(tmp_path: Path, suffix: str, name: str) -> None:
    matrix, turned = TURNS[name]
    path = turn_clip(write_clip(tmp_path / f"a{suffix}", [corners()] * 2), matrix)
    with ClipReader(path) as clip:
        assert str(clip.orientation) == name and (name in clip.describe()) == (name != "as stored")
        found = clip.read_first(16, 2, FrameFit(*clip.size))
    wanted = turned(corners())
    assert found.shape == (2, *wanted.shape) and near(found[1], wanted)
    assert near(load_video(path)[0], wanted)
    fitted = FrameFit(40, 40, "stretch")
    with ClipReader(path) as clip:
        small = clip.read_first(16, 1, fitted)[0]
    assert near(small[::39, ::39], wanted[:: wanted.shape[0] - 1, :: wanted.shape[1] - 1], 8)


def test_matroska_is_turned_too(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=16)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "bgr0"
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV writes no display matrix")
        stream.set_display_rotation(90)  # counter-clockwise
        file.mux(stream.encode(av.VideoFrame.from_ndarray(corners(), format="rgb24")))
        file.mux(stream.encode())
    np.testing.assert_array_equal(load_video(path)[0], np.rot90(corners(), 1))


def test_a_clip_that_is_turned_by_something_between_is_refused(tmp_path: Path) -> None:
    path = turn_clip(write_clip(tmp_path / "a.mp4", [corners()]), (0.866, 0.5, -0.5, 0.866))
    with pytest.raises(AnyFlowError, match=r"a.mp4 is to be shown turned by 30 degrees; allowed"):
        ClipReader(path)
    turn_clip(path, (0, 0, 0, 0))
    with ClipReader(path) as clip:
        assert clip.size == (HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("suffix", "aspect", "matrix", "size"),
    [
        (".mp4", Fraction(3, 2), (1, 0, 0, 1), (48, 120)),
        (".mp4", Fraction(1, 2), (1, 0, 0, 1), (48, 40)),
        (".mp4", Fraction(3, 2), (0, 1, -1, 0), (120, 48)),
        (".mkv", Fraction(3, 2), None, (48, 120)),
    ],
)
def test_pixels_that_are_not_square_are_shown_square(
    tmp_path: Path,
    suffix: str,
    aspect: Fraction,
    matrix: Sequence[float] | None,
    size: tuple[int, int],
) -> None:
    path = write_clip(tmp_path / f"a{suffix}", [corners()], aspect=aspect)
    if matrix:
        turn_clip(path, matrix)
    with ClipReader(path) as clip:
        assert clip.size == size and "pixels" in clip.describe()
    found = load_video(path)[0]
    assert found.shape == (*size, 3)
    shown = np.rot90(found, 1) if matrix == (0, 1, -1, 0) else found
    rows, columns = shown.shape[:2]
    middles = shown[rows // 4 :: rows // 2, columns // 4 :: columns // 2, 0]
    assert near(middles, np.array([[220, 150], [80, 0]]))


def expected(times: Sequence[float], fps: int, count: int) -> list[int]:
    """By the rule alone: the last frame that begins at or before k / fps."""
    return [max(i for i, t in enumerate(times) if t <= k / fps) for k in range(count)]


UNEVEN = {
    "gap": [i / 32 for i in range(8)] + [1 + i / 32 for i in range(8)],
    "phone": [0, 0.033, 0.066, 0.2, 0.233, 0.266, 0.4, 0.6, 0.601, 0.602, 0.9],
    "slow": [0, 0.5, 1.0],
    "shifted": [2.0, 2.04, 2.3, 2.35, 2.5],
}


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
@pytest.mark.parametrize("name", UNEVEN)
def test_the_frame_at_a_time_is_the_last_that_has_begun(
    tmp_path: Path, suffix: str, name: str
) -> None:
    times = UNEVEN[name]
    codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
    frames = [grey(i) for i in range(len(times))]
    options = {"lossless": "1"} if suffix == ".webm" else None
    path = write_clip(tmp_path / f"a{suffix}", frames, times, codec=codec, options=options)
    begun = [t - times[0] for t in times]
    count = int(begun[-1] * 16) + 1
    wanted = expected(begun, 16, count)
    fit = FrameFit(32, 48)
    with ClipReader(path) as clip:
        assert numbers(clip.read_first(16, count, fit)) == wanted
        whole = numbers(clip.read_first(16, 99, fit))
        assert whole[:count] == wanted and set(whole[count:]) <= {len(times) - 1}
        assert numbers(clip.read_last(16, 5, fit)) == whole[-5:]


@pytest.mark.parametrize("fps", [8, 16, 24, 25, 30, 60])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_clip_of_any_rate_keeps_its_speed(tmp_path: Path, suffix: str, fps: int) -> None:
    times = [i / fps for i in range(fps)]
    path = write_clip(tmp_path / f"a{suffix}", [grey(i) for i in range(fps)], fps=fps)
    with ClipReader(path) as clip:
        assert clip.rate == pytest.approx(fps) and clip.seconds == pytest.approx(1, abs=0.002)
        assert clip.count_frames(16) == 16
        assert numbers(clip.read_first(16, 99, FrameFit(32, 48))) == expected(times, 16, 16)


def test_of_a_long_clip_only_the_end_is_decoded_for_its_end(tmp_path: Path) -> None:
    frames = [grey(i % 60) for i in range(320)]
    path = write_clip(tmp_path / "a.mp4", frames, options={"g": "16", "crf": "4"})
    fit = FrameFit(32, 48)
    with ClipReader(path) as clip:
        assert clip.decoded == 1
        assert numbers(clip.read_first(16, 9, fit)) == list(range(9))
        assert clip.decoded <= 1 + 9 + 1
        before = clip.decoded
        assert numbers(clip.read_last(16, 9, fit)) == [i % 60 for i in range(311, 320)]
        assert clip.decoded - before < 80
        clip.seconds = 900.0  # a header that is wrong costs time, not frames
        assert numbers(clip.read_last(16, 9, fit)) == [i % 60 for i in range(311, 320)]


def test_memory_does_not_grow_with_a_clip(tmp_path: Path) -> None:
    """30 s of 720p are 2.5 GB of pixels."""
    path = tmp_path / "long.mp4"
    options = {"preset": "ultrafast", "g": "60"}
    write_clip(path, [np.zeros((720, 1280, 3), np.uint8)] * 900, fps=30, options=options)
    program = f"""
from pathlib import Path
from anyflow_deploy.pipelines.clips import ClipReader
from anyflow_deploy.pipelines.frame_fit import FrameFit
with ClipReader(Path({str(path)!r})) as clip:
    fit = FrameFit(480, 832, "crop")
    for frames in (clip.read_first(16, 13, fit), clip.read_last(16, 13, fit)):
        assert frames.shape == (13, 480, 832, 3)
    clip.seconds = None  # then all of it is decoded
    assert clip.read_last(16, 13, fit).shape == (13, 480, 832, 3)
    assert clip.decoded > 900
# The peak of this program alone: ru_maxrss begins with that of the process it was forked from
(line,) = [line for line in Path("/proc/self/status").open() if line.startswith("VmHWM")]
print(int(line.split()[1]) / 1024)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 400


@pytest.mark.parametrize(
    ("suffix", "codec", "container"),
    [
        (".webm", "libvpx-vp9", None),
        (".avi", "mpeg4", None),
        (".m4v", "libx264", "mp4"),
        (".mov", "libx264", None),
        (".mkv", "libx264", None),
        (".ts", "libx264", None),
        (".3gp", "mpeg4", None),
        (".flv", "flv1", None),
        (".mpg", "mpeg2video", None),
        (".wmv", "msmpeg4", None),
        (".y4m", "wrapped_avframe", None),
    ],
)
def test_every_container_is_read(
    tmp_path: Path, suffix: str, codec: str, container: str | None
) -> None:
    fps = 25  # a rate that all of them know
    frames = [grey(i) for i in range(25)]
    try:
        path = write_clip(
            tmp_path / f"a{suffix}",
            frames,
            fps=fps,
            codec=codec,
            container=container,
            options={"qmin": "1", "qmax": "3"} if "mpeg" in codec else None,
        )
    except (ValueError, av.error.FFmpegError) as error:
        pytest.skip(f"this PyAV does not write it: {error}")
    assert suffix in CLIP_SUFFIXES
    times = [i / fps for i in range(25)]
    with ClipReader(path) as clip:
        found = numbers(clip.read_first(16, 13, FrameFit(32, 48)))
    assert found == expected(times, 16, 13)


@pytest.mark.parametrize(
    ("suffix", "codec", "pixel_format"),
    [
        (".webm", "libvpx-vp9", "yuva420p"),
        (".webm", "libvpx", "yuva420p"),
        (".mov", "qtrle", "argb"),
        (".mov", "png", "rgba"),
        (".mov", "prores_ks", "yuva444p10le"),
        (".mkv", "ffv1", "bgra"),
    ],
)
@pytest.mark.parametrize("color", [(0, 0, 0), (10, 200, 60)])
def test_what_is_transparent_in_a_clip_is_background(
    tmp_path: Path, suffix: str, codec: str, pixel_format: str, color: tuple[int, int, int]
) -> None:
    frames = [hidden_colours()] * 4
    path = write_clip(
        tmp_path / f"a{suffix}",
        frames,
        codec=codec,
        pixel_format=pixel_format,
        source="rgba",
        options={"auto-alt-ref": "0"} if codec == "libvpx" else None,
    )
    with ClipReader(path) as clip:
        found = clip.read_first(16, 4, FrameFit(HEIGHT, WIDTH, background=color))
    assert len(found) == 4
    for frame in found:
        assert np.abs(frame[:, 4 : WIDTH // 2 - 4].astype(int) - 120).max() < 12
        assert np.abs(frame[:, WIDTH // 2 + 4 :].astype(int) - color).max() < 12


def test_a_clip_comes_through_a_pipe(tmp_path: Path) -> None:
    data = write_clip(tmp_path / "a.mkv", [grey(3)] * 2).read_bytes()
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    writer.start()
    with ClipReader(tmp_path / "pipe") as clip:
        assert numbers(clip.read_last(16, 2, FrameFit(32, 48))) == [3, 3]
    writer.join()


def test_names_that_look_like_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative ones: a colon is no protocol, a percent sign no pattern."""
    monkeypatch.chdir(tmp_path)
    for name in ("12:30.mp4", "100%d.mp4", "a clip (1).mp4"):
        path = write_clip(tmp_path / "a.mp4", [corners()]).rename(tmp_path / name)
        assert load_video(Path(path.name)).shape == (1, HEIGHT, WIDTH, 3)
        with path.open("rb") as file, ClipReader(file) as clip:
            assert clip.size == (HEIGHT, WIDTH)
        assert near(load_picture(io.BytesIO(path.read_bytes()))[0], corners())
