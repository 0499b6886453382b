"""Pictures as people have them, read as a viewer shows them, and what is brought to a size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.pipelines.clips import ClipReader
from anyflow_deploy.pipelines.frame_display import ORIENTATION_FROM_EXIF, composite, parse_color
from anyflow_deploy.pipelines.frame_fit import FrameFit
from anyflow_deploy.pipelines.pictures import load_picture, pixels_from_image
from anyflow_deploy.pipelines.video_io import load_video
from tests.media import (
    HEIGHT,
    WIDTH,
    Pixels,
    corners,
    hidden_colours,
    near,
    write_clip,
)


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
        path = write_clip(
            tmp_path / f"{codec}.mkv", [wanted], codec=codec, pixel_format=pixel_format
        )
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
    write_clip(
        tmp_path / "film.mp4", [corners(), 255 - corners()]
    )  # PyAV reads what Pillow does not
    assert near(load_picture(tmp_path / "film.mp4")[0], corners())
    assert near(pixels_from_image(image.convert("RGBA"), (0, 0, 0)), corners())


@pytest.mark.parametrize("use", ["picture", "clip"])
def test_what_fits_a_size(tmp_path: Path, use: str) -> None:
    """80 columns and 48 rows become 32 and 32."""

    def load(mode: Any, height: int = 32, width: int = 32) -> Pixels:
        fit = FrameFit(height, width, mode, (0, 0, 200))
        if use == "picture":
            Image.fromarray(corners()).save(tmp_path / "a.png")
            return load_picture(tmp_path / "a.png", fit)[0]
        with ClipReader(write_clip(tmp_path / "a.mkv", [corners()])) as clip:
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


def test_all_eight_orientations_differ() -> None:
    shown = {o.apply(corners()).tobytes() for o in ORIENTATION_FROM_EXIF.values()}
    assert len(shown) == 8
