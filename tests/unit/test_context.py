"""The picture or clip that a video begins with: at the model's rate, and as long as its chunks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anyflow_deploy.cli.step_options import flag_name
from anyflow_deploy.engines.kv_cache import cache_plan
from anyflow_deploy.engines.step_policy import StepSettings
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.models import MODELS
from anyflow_deploy.pipelines.clips import ClipReader
from anyflow_deploy.pipelines.context import ContextOptions, load_context
from anyflow_deploy.pipelines.request import GenerationRequest
from tests.media import corners, grey, hidden_colours, near, numbers, write_clip

CHUNKS = (1, 2, 2)  # a video may begin with 1 or 9 of its 17 frames
SIZE = (32, 48)


def request(chunks: tuple[int, ...] = CHUNKS) -> GenerationRequest:
    plan = cache_plan(MODELS["far-tiny"].architecture, chunks, 4, 6)
    frames = 4 * sum(chunks) - 3
    shape = (sum(chunks), 16, 4, 6)
    return GenerationRequest(
        shape, frames, *SIZE, plan, StepSettings(), 4, 5.0, 0, 4, "", flag_name
    )


def load(
    image: Any = None, video: Any = None, chunks: tuple[int, ...] = CHUNKS, **options: Any
) -> tuple[Any, list[str]]:
    told: list[str] = []
    parsed = ContextOptions.parse(**options)
    return load_context(request(chunks), image, video, 16, parsed, told.append), told


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """0.6 s at 30 a second: 10 frames at 16."""
    return write_clip(tmp_path / "a.mp4", [grey(i) for i in range(18)], fps=30)


SAMPLED = [0, 1, 3, 5, 7, 9, 11, 13, 15, 16]


def test_a_clip_is_taken_at_the_rate_of_the_model(tmp_path: Path, clip: Path) -> None:
    for take, wanted in (("first", SAMPLED[:9]), ("last", SAMPLED[-9:])):
        for source in (clip, str(clip), clip.read_bytes(), io.BytesIO(clip.read_bytes())):
            frames, told = load(video=source, take=take)
            assert numbers(frames) == wanted
        assert told == [
            f"video is 32 x 48, 30 fps, 0.60 s; the {take} 9 frames are used, 16 a second (0.56 s)"
        ]
    half = write_clip(tmp_path / "b.mp4", [grey(i) for i in range(17)], fps=30)  # 0.5667 s
    assert ClipReader(half).count_frames(16) == 10
    exact = write_clip(tmp_path / "c.mp4", [grey(i) for i in range(16)], fps=30)  # 9 frames
    frames, told = load(video=exact)
    assert numbers(frames) == SAMPLED[:9] and "; 9 frames are used, 16 a second" in told[0]


def test_a_clip_that_does_not_fill_chunks_is_refused_with_a_way_on(
    tmp_path: Path, clip: Path
) -> None:
    with pytest.raises(AnyFlowError, match=r"at least 10 frames at 16 a second; .*--take first or"):
        load(video=clip)
    seven = write_clip(tmp_path / "seven.mp4", [grey(i) for i in range(7)])
    with pytest.raises(AnyFlowError, match=r"frames is 7; .*4n\+1.*--take first or --take last"):
        load(video=seven)
    five = write_clip(tmp_path / "b.mp4", [grey(i) for i in range(5)])
    with pytest.raises(AnyFlowError, match=r"has 5 frames.*clip of 1 or 9 frames \(--take first"):
        load(video=five)
    assert numbers(load(video=five, take="last")[0]) == [4]
    with pytest.raises(AnyFlowError, match=r"a.mp4 has 10 frames; .* take 13. Give a longer clip"):
        load(video=clip, chunks=(4, 1), take="last")
    with pytest.raises(AnyFlowError, match="nothing would be left to make"):
        load(video=clip, chunks=(5,), take="first")


def test_a_long_clip_or_one_of_another_size_is_refused_by_its_first_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[ClipReader] = []
    opened = ClipReader.__init__

    def watch(self: ClipReader, *args: Any) -> None:
        readers.append(self)
        opened(self, *args)

    monkeypatch.setattr(ClipReader, "__init__", watch)
    path = write_clip(tmp_path / "long.mp4", [grey(i % 60) for i in range(320)])
    with pytest.raises(
        AnyFlowError,
        match=r"long.mp4 is 32 x 48, 16 fps, 20.00 s: at least 320 frames at 16 a second; the "
        r"video asked for has 17 and can begin with 9. Cut the clip, or take .*--take first",
    ):
        load(video=path)
    wide = write_clip(tmp_path / "wide.mp4", [grey(i, 64, 64) for i in range(60)])
    with pytest.raises(AnyFlowError, match=r"wide.mp4 is 64 x 64 .* is 32 x 48 .*--fit crop, pad"):
        load(video=wide, take="first")
    assert [reader.decoded for reader in readers] == [1, 1]
    assert load(video=wide, take="first", fit="crop")[0].shape == (9, *SIZE, 3)


def test_pictures_are_turned_fitted_and_put_on_a_colour(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    turned = Image.fromarray(corners(48, 32))
    turned.save(tmp_path / "a.png", exif=exif)
    wanted = np.rot90(corners(48, 32), -1)
    assert near(load(image=tmp_path / "a.png")[0][0], wanted)
    with Image.open(tmp_path / "a.png") as image:
        assert near(load(image=image)[0][0], wanted), "a PIL picture keeps its EXIF data"
    with pytest.raises(AnyFlowError, match=r"image is 48 x 32 and the requested video is 32 x 48"):
        load(image=turned)
    assert load(image=np.asarray(turned), fit="pad")[0].shape == (1, *SIZE, 3)
    green = load(image=Image.fromarray(hidden_colours()), fit="stretch", background="#0ac83c")[0]
    assert (green[0, :, -12:] == (10, 200, 60)).all()
    for options, message in (
        ({"fit": "cover"}, "fit is 'cover'; allowed are crop and pad and stretch"),
        ({"take": "middle"}, "take is 'middle'; allowed are first and last"),
        ({"background": "clear"}, "background is 'clear'; allowed are the names of CSS"),
    ):
        with pytest.raises(AnyFlowError, match=message):
            load(image=turned, **options)
