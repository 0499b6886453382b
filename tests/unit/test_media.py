"""Pictures and clips as people have them, read as a viewer shows them; every input is made here."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.pipelines.clips import CLIP_SUFFIXES, ClipReader
from anyflow_deploy.pipelines.frame_display import ORIENTATION_FROM_EXIF, composite, parse_color
from anyflow_deploy.pipelines.frame_fit import FrameFit
from anyflow_deploy.pipelines.pictures import load_picture, pixels_from_image
from anyflow_deploy.pipelines.video_io import load_video

Pixels = NDArray[Any]
HEIGHT, WIDTH = 48, 80
MATRIX_START = 4 + 4 + 4 * 5 + 8 + 8
"""Of the display matrix, after the box's name `tkhd` (version 0)."""


def corners(height: int = HEIGHT, width: int = WIDTH) -> Pixels:
    """A picture that no turn or mirror image of it equals: four quarters of their own grey."""
    result = np.zeros((height, width, 3), np.uint8)
    result[: height // 2, : width // 2] = 220
    result[: height // 2, width // 2 :] = 150
    result[height // 2 :, : width // 2] = 80
    return result


def grey(number: int, height: int = 32, width: int = 48) -> Pixels:
    """A frame that says its number."""
    return np.full((height, width, 3), 4 * number + 8, np.uint8)


def numbers(frames: Pixels) -> list[int]:
    """What frames of `grey` say."""
    return [round((float(f.mean()) - 8) / 4) for f in frames]


def write(
    path: Path,
    frames: Sequence[Pixels],
    times: Sequence[float] | None = None,
    fps: int = 16,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    source: str = "rgb24",
    aspect: Fraction | None = None,
    container: str | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    base = Fraction(1, fps) if times is None else Fraction(1, 1000)
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixel_format
        stream.options = options or ({"crf": "4"} if codec == "libx264" else {})
        stream.codec_context.time_base = base
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=source)
            frame.pts = number if times is None else round(times[number] / base)
            frame.time_base = base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def turn(path: Path, matrix: Sequence[float]) -> Path:
    """Write a display matrix (a b, c d) into an mp4 or mov."""
    data = bytearray(path.read_bytes())
    a, b, c, d = (round(number * 65536) for number in matrix)
    struct.pack_into(
        ">9i", data, data.index(b"tkhd") + MATRIX_START, a, b, 0, c, d, 0, 0, 0, 1 << 30
    )
    path.write_bytes(data)
    return path


def near(found: Pixels, wanted: Pixels, levels: float = 3) -> bool:
    return found.shape == wanted.shape and bool(
        np.abs(found.astype(int) - wanted.astype(int)).mean() < levels
    )


# Orientation and aspect


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_photos_are_turned_as_their_exif_says(tmp_path: Path, kind: str, tag: int) -> None:
    exif = Image.Exif()
    exif[274] = tag
    path = tmp_path / f"a.{kind}"
    lossless = {"lossless": True} if kind == "webp" else {}
    Image.fromarray(corners()).save(path, exif=exif, **lossless)
    with Image.open(path) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    found = load_picture(path)
    assert found.shape == (1, *((HEIGHT, WIDTH) if tag < 5 else (WIDTH, HEIGHT)), 3)
    np.testing.assert_array_equal(found[0], wanted)
    np.testing.assert_array_equal(load_picture(path.read_bytes()), found)
    assert tag == 1 or not near(wanted, corners())


def test_broken_exif_data_says_nothing(tmp_path: Path) -> None:
    Image.fromarray(corners()).save(tmp_path / "a.png", exif=b"Exif\0\0nothing")
    np.testing.assert_array_equal(load_picture(tmp_path / "a.png")[0], corners())


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
    path = turn(write(tmp_path / f"a{suffix}", [corners()] * 2), matrix)
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
    path = turn(write(tmp_path / "a.mp4", [corners()]), (0.866, 0.5, -0.5, 0.866))
    with pytest.raises(AnyFlowError, match=r"a.mp4 is to be shown turned by 30 degrees; allowed"):
        ClipReader(path)
    turn(path, (0, 0, 0, 0))
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
    path = write(tmp_path / f"a{suffix}", [corners()], aspect=aspect)
    if matrix:
        turn(path, matrix)
    with ClipReader(path) as clip:
        assert clip.size == size and "pixels" in clip.describe()
    found = load_video(path)[0]
    assert found.shape == (*size, 3)
    shown = np.rot90(found, 1) if matrix == (0, 1, -1, 0) else found
    rows, columns = shown.shape[:2]
    middles = shown[rows // 4 :: rows // 2, columns // 4 :: columns // 2, 0]
    assert near(middles, np.array([[220, 150], [80, 0]]))


# Times


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
    path = write(tmp_path / f"a{suffix}", frames, times, codec=codec, options=options)
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
    path = write(tmp_path / f"a{suffix}", [grey(i) for i in range(fps)], fps=fps)
    with ClipReader(path) as clip:
        assert clip.rate == pytest.approx(fps) and clip.seconds == pytest.approx(1, abs=0.002)
        assert clip.count_frames(16) == 16
        assert numbers(clip.read_first(16, 99, FrameFit(32, 48))) == expected(times, 16, 16)


def test_of_a_long_clip_only_the_end_is_decoded_for_its_end(tmp_path: Path) -> None:
    frames = [grey(i % 60) for i in range(320)]
    path = write(tmp_path / "a.mp4", frames, options={"g": "16", "crf": "4"})
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
    write(path, [np.zeros((720, 1280, 3), np.uint8)] * 900, fps=30, options=options)
    program = f"""
import resource
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
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 400


# Containers and pixel formats


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
        path = write(
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


def hidden_colours() -> Pixels:
    """Grey on the left; on the right transparent, with magenta that nobody has seen."""
    pixels = np.full((HEIGHT, WIDTH, 4), 255, np.uint8)
    pixels[..., :3] = 120
    pixels[:, WIDTH // 2 :] = (255, 0, 255, 0)
    return pixels


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
    path = write(
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


@pytest.mark.parametrize("name", ["rgba.png", "rgba.webp", "la.png", "palette.png", "rgb.png"])
def test_what_is_transparent_in_a_picture_is_background(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    image = Image.fromarray(hidden_colours())
    if name == "la.png":
        image.convert("LA").save(path)
    elif name == "palette.png":
        image.convert("RGB").quantize(2).save(path, transparency=_index_of_magenta(image))
    elif name == "rgb.png":
        image.convert("RGB").save(path, transparency=(255, 0, 255))
    else:
        image.save(path, **({"lossless": True, "exact": True} if "webp" in name else {}))
    for color in ((0, 0, 0), (10, 200, 60)):
        found = load_picture(path, background=color)[0]
        assert (found[:, : WIDTH // 2] == 120).all()
        assert (found[:, WIDTH // 2 :] == color).all()
    # Hidden colours do not bleed into what is scaled, either
    small = load_picture(path, FrameFit(12, 20, "stretch"))[0]
    assert np.ptp(small, axis=2).max() <= 2


def _index_of_magenta(image: Image.Image) -> int:
    index = image.convert("RGB").quantize(2).getpixel((WIDTH - 1, 0))
    assert isinstance(index, int)
    return index


def test_half_transparent_pixels_are_mixed() -> None:
    half = np.array([[[200, 100, 0, 128], [200, 100, 0, 255]]], np.uint8)
    assert composite(half, (0, 0, 255)).tolist() == [[[100, 50, 127], [200, 100, 0]]]
    assert parse_color("white") == (255, 255, 255) and parse_color("#ff8001") == (255, 128, 1)
    with pytest.raises(AnyFlowError, match="background is 'whitish'; allowed are the names of CSS"):
        parse_color("whitish")


def test_depths_of_8_to_16_bits(tmp_path: Path) -> None:
    ramp = np.repeat(np.linspace(0, 65535, WIDTH).astype(np.uint16)[None], HEIGHT, axis=0)
    wanted = np.repeat((ramp / 257).round().astype(np.uint8)[..., None], 3, axis=2)
    Image.fromarray(ramp).save(tmp_path / "grey16.png")
    Image.fromarray(ramp).save(tmp_path / "grey16.tiff")
    Image.fromarray(wanted[..., 0]).save(tmp_path / "grey8.png")
    for name, levels in (("grey16.png", 0), ("grey16.tiff", 0), ("grey8.png", 0)):
        difference = np.abs(load_picture(tmp_path / name)[0].astype(int) - wanted).max()
        assert difference <= levels, name
    deep = np.repeat(ramp[..., None], 3, axis=2)
    with av.open(str(tmp_path / "rgb48.png"), "w", format="image2", options={"update": "1"}) as f:
        stream = f.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "rgb48be"
        f.mux(stream.encode(av.VideoFrame.from_ndarray(deep, format="rgb48le")))
        f.mux(stream.encode())
    assert np.abs(load_picture(tmp_path / "rgb48.png")[0].astype(int) - wanted).max() <= 1
    for codec, pixel_format in (("libx264", "yuv420p10le"), ("ffv1", "gbrp16le")):
        path = write(tmp_path / f"{codec}.mkv", [wanted], codec=codec, pixel_format=pixel_format)
        assert near(load_video(path)[0], wanted, 2), pixel_format
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(AnyFlowError, match=r"float.tiff has pixels of 32-bit floats; allowed are"):
        load_picture(tmp_path / "float.tiff")
    Image.fromarray(np.full((4, 4), 1 << 20, np.int32)).save(tmp_path / "int.tiff")
    with pytest.raises(AnyFlowError, match=r"grey values of 1048576 to .* 8 to 16 bits"):
        load_picture(tmp_path / "int.tiff")


def test_other_kinds_of_pictures(tmp_path: Path) -> None:
    image = Image.fromarray(corners())
    image.convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    image.save(tmp_path / "a.bmp")
    image.save(tmp_path / "a.gif", save_all=True, append_images=[image.rotate(180)])
    for name in ("a.jpg", "a.bmp", "a.gif"):
        assert near(load_picture(tmp_path / name)[0], corners(), 6), name
    write(tmp_path / "film.mp4", [corners(), 255 - corners()])  # PyAV reads what Pillow does not
    assert near(load_picture(tmp_path / "film.mp4")[0], corners())
    assert near(pixels_from_image(image.convert("RGBA"), (0, 0, 0)), corners())


# Sizes


@pytest.mark.parametrize("use", ["picture", "clip"])
def test_what_fits_a_size(tmp_path: Path, use: str) -> None:
    """80 columns and 48 rows become 32 and 32."""

    def load(mode: Any, height: int = 32, width: int = 32) -> Pixels:
        fit = FrameFit(height, width, mode, (0, 0, 200))
        if use == "picture":
            Image.fromarray(corners()).save(tmp_path / "a.png")
            return load_picture(tmp_path / "a.png", fit)[0]
        with ClipReader(write(tmp_path / "a.mkv", [corners()])) as clip:
            return clip.read_first(16, 1, fit)[0]

    quarters = np.array([[220, 150], [80, 0]])
    for mode in ("crop", "stretch"):
        assert near(load(mode)[8::16, 8::16, 0], quarters)
    padded = load("pad")  # 32 columns and 19 rows, of which 6 are above
    assert (padded[:6] == (0, 0, 200)).all() and (padded[25:] == (0, 0, 200)).all()
    assert near(padded[10:22:11, 8::16, 0], quarters) and np.ptp(padded[7:24], axis=2).max() < 9
    assert near(load("pad", 96, 320)[24::48, 120:201:80, 0], quarters), "bars at the sides"
    with pytest.raises(AnyFlowError, match=r"48 x 80 and the requested video is 32 x 32 .*--fit"):
        load(None)
    assert near(load(None, HEIGHT, WIDTH), corners())


def test_cropping_is_even_and_keeps_aspect(tmp_path: Path) -> None:
    circle = np.zeros((90, 160, 3), np.uint8)
    rows, columns = np.mgrid[:90, :160]
    circle[(rows - 44.5) ** 2 + (columns - 79.5) ** 2 < 30**2] = 255
    Image.fromarray(circle).save(tmp_path / "a.png")
    found = load_picture(tmp_path / "a.png", FrameFit(64, 64, "crop"))[0][..., 0]
    lit = np.argwhere(found > 127)
    assert np.abs(lit.mean(0) - 31.5).max() < 0.6
    assert abs(np.ptp(lit[:, 0]) - np.ptp(lit[:, 1])) <= 1


# What cannot be read


def test_files_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "page").write_text("<html>404 Not Found</html>")
    reasons = {
        "empty": "it is empty",
        "none": "there is no such file",
        "folder": "it is a folder",
        "link": "it is a link to .*gone, which does not exist",
        "page": "Invalid data",
    }
    for name, reason in reasons.items():
        with pytest.raises(AnyFlowError, match=f"{name} cannot be read as a video: {reason}"):
            ClipReader(tmp_path / name)
        with pytest.raises(AnyFlowError, match=f"{name} cannot be read as an image: {reason}"):
            load_picture(tmp_path / name)
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(
            np.zeros((1, 4410), np.float32), format="fltp", layout="mono"
        )
        sound.rate = 44100
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    with pytest.raises(AnyFlowError, match=r"sound.mp4 cannot be read as a video: it has no pict"):
        ClipReader(tmp_path / "sound.mp4")
    Image.fromarray(corners()).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-300])
    with pytest.raises(AnyFlowError, match=r"cut.jpg cannot be read as an image: (?i:.*truncated)"):
        load_picture(tmp_path / "cut.jpg")


def test_names_that_look_like_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative ones: a colon is no protocol, a percent sign no pattern."""
    monkeypatch.chdir(tmp_path)
    for name in ("12:30.mp4", "100%d.mp4", "a clip (1).mp4"):
        path = write(tmp_path / "a.mp4", [corners()]).rename(tmp_path / name)
        assert load_video(Path(path.name)).shape == (1, HEIGHT, WIDTH, 3)
        with path.open("rb") as file, ClipReader(file) as clip:
            assert clip.size == (HEIGHT, WIDTH)
        assert near(load_picture(io.BytesIO(path.read_bytes()))[0], corners())


def test_all_eight_orientations_differ() -> None:
    shown = {o.apply(corners()).tobytes() for o in ORIENTATION_FROM_EXIF.values()}
    assert len(shown) == 8
