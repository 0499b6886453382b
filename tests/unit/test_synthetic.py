"""The built-in data: what a caption says is what is shown, and sample i depends on nothing but
(seed, i)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.training.data.moving_shapes import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SPEEDS,
    Scene,
    make_scene,
    render_scene,
    render_video,
    save_videos,
)
from anyflow_deploy.training.data.source import DataShard
from anyflow_deploy.training.data.synthetic import (
    SyntheticLatents,
    caption_embedding,
    scene_latents,
)


def middle(mass: Tensor) -> tuple[float, float]:
    """Row and column of the mass (H, W) on a torus, in pixels."""
    found = []
    for axis in (0, 1):
        size = mass.shape[axis]
        angle = 2 * torch.pi * (torch.arange(size) + 0.5) / size
        line = mass.sum(1 - axis)
        found.append(
            float(torch.atan2((line * angle.sin()).sum(), (line * angle.cos()).sum()))
            * size
            / (2 * torch.pi)
        )
    return found[0], found[1]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("speed", SPEEDS)
def test_a_shape_goes_where_its_caption_says(direction: str, speed: str) -> None:
    shown = Scene("circle", "white", direction, speed, (0.3, 0.6), 0.2, 0.0)
    assert shown.caption == f"a white circle moves {speed} {direction}"
    first, second = (
        middle(frame[..., 0]) for frame in render_scene(shown, torch.tensor([0, 2]), 64, 96)
    )
    for axis, size in enumerate((64, 96)):
        wanted = 2 * SPEEDS[speed] * DIRECTIONS[direction][axis] * 64
        way = (second[axis] - first[axis] + size / 2) % size - size / 2
        assert way == pytest.approx(wanted, abs=0.05)


def test_shapes_and_colours_differ_and_all_words_occur() -> None:
    covers = [
        render_scene(
            Scene(s, "white", "up", "slowly", (0.5, 0.5), 0.25, 0.0), torch.zeros(1), 64, 64
        )[0, ..., 0]
        for s in SHAPES
    ]
    assert min(float((a - b).abs().mean()) for i, a in enumerate(covers) for b in covers[:i]) > 0.02
    for colour, wanted in COLOURS.items():
        frame = render_scene(
            Scene("square", colour, "up", "slowly", (0.5, 0.5), 0.25, 0.0), torch.zeros(1), 64, 64
        )[0]
        assert frame[32, 32].tolist() == pytest.approx(wanted)
    words = {word for i in range(300) for word in make_scene(0, i).caption.split()}
    assert words == {"a", "moves", *SHAPES, *COLOURS, *DIRECTIONS, *SPEEDS}


def test_latents_have_unit_spread_and_depend_on_seed_and_number_alone() -> None:
    shape = (5, 16, 8, 12)
    many = torch.stack([scene_latents(0, i, shape) for i in range(256)])
    assert (
        many.mean((0, 1, 3, 4)).abs().max() < 0.15
        and ((many.std((0, 1, 3, 4)) - 1).abs() < 0.35).all()
    )
    source = SyntheticLatents(DataShard(1, 2, 2), shape, (16, 64))
    source.load_state_dict({"samples": 4})
    batch = next(iter(source))
    assert torch.equal(batch.latents, many[6:8]) and batch.names == ("synthetic-6", "synthetic-7")
    assert batch.captions == (make_scene(0, 6).caption, make_scene(0, 7).caption)
    assert not torch.equal(scene_latents(1, 6, shape), many[6])
    assert torch.equal(scene_latents(0, 6, (5, 4, 8, 12)), many[6, :, :4])


def test_the_first_channels_are_the_picture() -> None:
    """A cell's mean of a colour is that of the scene drawn coarsely; at half the time between
    frames 1 and 4."""
    latents = scene_latents(0, 3, (2, 3, 8, 12))
    shown = make_scene(0, 3)
    fine = (
        render_scene(shown, torch.tensor([0.0, 2.5]), 16, 24)
        .view(2, 8, 2, 12, 2, 3)
        .mean((2, 4))
        .permute(0, 3, 1, 2)
    )
    assert torch.allclose(latents * 0.18 + 0.13, fine, atol=1e-5)


def test_embeddings_tell_captions_apart_even_in_few_tokens() -> None:
    for tokens in (2, 16):
        made = {
            make_scene(0, i).caption: (
                caption_embedding(make_scene(0, i).caption, (tokens, 32)).flatten()
            )
            for i in range(100)
        }
        assert torch.cdist(*[torch.stack(list(made.values()))] * 2).fill_diagonal_(9).min() > 1
    assert not caption_embedding("a red ring", (16, 32))[3:].any()


def test_videos_are_written_beside_their_captions(tmp_path: Path) -> None:
    from anyflow_deploy.pipelines.video_io import load_video

    save_videos(tmp_path / "clips", 2, (5, 32, 48))
    assert sorted(p.name for p in (tmp_path / "clips").iterdir()) == [
        "00000.mp4",
        "00000.txt",
        "00001.mp4",
        "00001.txt",
    ]
    read = torch.from_numpy(load_video(tmp_path / "clips" / "00001.mp4")).float()
    assert (read - render_video(make_scene(0, 1), 5, 32, 48).float()).abs().mean() < 6
    with pytest.raises(AnyFlowError, match="is not empty"):
        save_videos(tmp_path / "clips", 2)
