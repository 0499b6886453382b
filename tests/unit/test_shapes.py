"""The data of the `shapes` models: scenes, their captions, and the reader of videos."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from anyflow_deploy.training.data.moving_shapes import COLOURS, SHAPES
from anyflow_deploy.training.shapes.reader import compare, read_video
from anyflow_deploy.training.shapes.rendering import render_scene, render_video
from anyflow_deploy.training.shapes.scenes import (
    GROUNDS,
    HELD_OUT,
    KINDS,
    NOUNS,
    Camera,
    Scene,
    Thing,
    make_scene,
)
from anyflow_deploy.training.shapes.templates import template, template_radius
from anyflow_deploy.training.shapes.text_encoder import caption_words

SIZE = (17, 64, 96)


def render(scene: Scene) -> NDArray[np.uint8]:
    video: NDArray[np.uint8] = render_video(scene, *SIZE).numpy()
    return video


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    assert make_scene(0, 3) == make_scene(0, 3)
    assert make_scene(0, 3) != make_scene(0, 4)
    assert make_scene(0, 3) != make_scene(1, 3)


def test_training_never_shows_a_held_out_pair_and_a_held_out_scene_always_does() -> None:
    for index in range(100):
        pairs = {(thing.colour, thing.shape) for thing in make_scene(0, index).things}
        assert not pairs & set(HELD_OUT)
        held_out = make_scene(0, index, held_out=True)
        assert {(thing.colour, thing.shape) for thing in held_out.things} & set(HELD_OUT)


def test_every_word_of_a_held_out_pair_is_trained_in_other_pairs() -> None:
    things = [thing for index in range(300) for thing in make_scene(0, index).things]
    for colour, shape in HELD_OUT:
        assert any(t.colour == colour and t.shape != shape for t in things)
        assert any(t.colour != colour and t.shape == shape for t in things)


def test_kinds_have_their_shares() -> None:
    kinds = [make_scene(0, index).kind for index in range(400)]
    for kind, share in KINDS.items():
        assert kinds.count(kind) / 400 == pytest.approx(share, abs=0.08)


def test_a_caption_names_what_is_shown() -> None:
    for index in range(60):
        scene = make_scene(1, index)
        words = scene.caption.replace(",", "").split()
        assert set(words) <= set(caption_words())
        assert words[1] == scene.subject.colour
        assert words[2] in NOUNS[scene.subject.shape]
        if scene.other is not None:
            assert scene.other.colour in words
        if scene.ground_name is not None:
            assert scene.ground == GROUNDS[scene.ground_name]
            assert scene.caption.endswith(f"on a {scene.ground_name} ground")
        if scene.camera is not None:
            assert "the camera" in scene.caption


@pytest.mark.parametrize("kind", KINDS)
def test_the_reader_reads_what_was_rendered(kind: str) -> None:
    for index in range(8):
        scene = make_scene(2, index, held_out=index % 2 == 0, kind=kind)
        seen = read_video(render(scene))
        assert all(compare(scene, seen).values()), (scene.caption, seen)


def plain(**changes: str) -> Scene:
    words = {"colour": "red", "shape": "circle", "direction": "right", "speed": "slowly", **changes}
    thing = Thing(start=(0.5, 0.2), radius=0.24, **words)
    caption = f"a {words['colour']} {words['shape']} moves {words['speed']} {words['direction']}"
    return Scene("single", caption, (thing,), (0.05, 0.05, 0.05))


@pytest.mark.parametrize(
    ("word", "value"),
    [("colour", "purple"), ("shape", "ring"), ("direction", "left"), ("speed", "quickly")],
)
def test_the_reader_sees_what_is_wrong(word: str, value: str) -> None:
    answers = compare(plain(), read_video(render(plain(**{word: value}))))
    assert not answers[word]
    if word != "colour":  # a shape of another colour is another shape
        assert [name for name, right in answers.items() if not right] == [word]


def test_the_reader_follows_a_shape_around_the_edge() -> None:
    (thing,) = read_video(render(plain(speed="quickly"))).things
    assert (thing.shape, thing.direction, thing.speed) == ("circle", "right", "quickly")
    assert thing.likeness > 0.9


@pytest.mark.parametrize("relation", ["behind", "in front of"])
def test_the_reader_sees_which_shape_is_nearer(relation: str) -> None:
    ball = Thing("circle", "red", (0.5, 0.2), 0.22, "right", "quickly")
    box = Thing("square", "blue", (0.5, 0.5), 0.22)
    things = (ball, box) if relation == "behind" else (box, ball)
    caption = f"a red ball rolls quickly right {relation} a blue box"
    scene = Scene("pass", caption, things, (0.1, 0.1, 0.1))
    seen = read_video(render(scene))
    assert seen.nearest == ("blue" if relation == "behind" else "red")
    assert all(compare(scene, seen).values())
    swapped = Scene("pass", caption, things[::-1], scene.ground)
    assert compare(swapped, seen)["relation"] is False


def test_noise_shows_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    assert not all(compare(plain(), read_video(noise)).values())
    black = np.zeros((*SIZE, 3), np.uint8)
    assert read_video(black).things == ()
    assert not compare(plain(), read_video(black))["colour"]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_template_has_the_area_that_was_asked_for(shape: str) -> None:
    mask = template(shape, template_radius(shape, 900), 64, 96)
    assert mask.sum() == pytest.approx(900, rel=0.06)
    rows, columns = np.nonzero(mask)
    assert (rows.mean(), columns.mean()) == pytest.approx((31.5, 47.5), abs=0.6)


def test_zooming_in_ends_as_large_as_zooming_out_starts() -> None:
    thing = Thing("circle", "red", (0.5, 0.5), 0.2)

    def areas(direction: str) -> list[int]:
        scene = Scene("zoom", "", (thing,), (0, 0, 0), camera=Camera("zoom", direction))
        return (render_scene(scene, 33, 64, 96)[..., 0] > 0.5).sum((1, 2)).tolist()

    zoom_in, zoom_out = areas("in"), areas("out")
    assert zoom_in == zoom_out[::-1]
    assert zoom_in == sorted(zoom_in)
    assert zoom_in[-1] / zoom_in[0] == pytest.approx(1.64**2, rel=0.05)


def test_a_pan_moves_the_picture_the_other_way() -> None:
    thing = Thing("square", "green", (0.5, 0.5), 0.2)
    camera = Camera("pan", "right", "slowly")
    (seen,) = read_video(render(Scene("pan", "", (thing,), (0, 0, 0), camera=camera))).things
    assert (seen.direction, seen.speed) == ("left", "slowly")


def test_nearer_shapes_cover_others() -> None:
    things = tuple(Thing("square", colour, (0.5, 0.5), 0.2) for colour in ("red", "blue"))
    picture = render_scene(Scene("pass", "", things, (0, 0, 0)), 1, 64, 96)
    assert torch.allclose(picture[0, 32, 48], torch.tensor(COLOURS["blue"]))
