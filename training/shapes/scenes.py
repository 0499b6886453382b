"""Scenes of moving shapes, each with a caption: what the videos of the `shapes` models show.

A scene has one or two shapes on a ground, and a camera that may pan or zoom. Where a shape leaves
the picture on one side, it enters on the other, so a video can go on for ever. Five kinds:

    single    a red circle moves slowly right
    ground    a green box slides quickly up on a navy ground
    pass      a red ball rolls slowly right behind a blue box
    pan       a white ring and a purple circle, the camera pans slowly left
    zoom      a yellow box, the camera zooms in

Scene i is a function of (seed, i). Some pairs of colour and shape are held out: no scene of the
training data shows one of them, every held-out scene does. So a model that draws them has learnt
what the words mean, one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from anyflow_deploy.training.data.moving_shapes import COLOURS, DIRECTIONS, SHAPES, SPEEDS
from anyflow_deploy.training.timestep_sampling import seeded_generator

KINDS = {"single": 0.4, "ground": 0.2, "pass": 0.25, "pan": 0.1, "zoom": 0.05}
"""Share of each kind among the scenes."""

GROUNDS = {
    "gray": (0.45, 0.45, 0.45),
    "navy": (0.03, 0.06, 0.35),
    "brown": (0.35, 0.2, 0.08),
    "teal": (0.0, 0.35, 0.35),
}
"""Colours of a ground that the caption names. Without a name it is dark grey or black."""

HELD_OUT = (("red", "triangle"), ("green", "square"), ("blue", "ring"), ("yellow", "circle"))
"""Pairs of colour and shape that training never shows."""

NOUNS = {
    "circle": ("circle", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "ring": ("ring",),
}
VERBS = {
    "circle": ("moves", "rolls", "rolling", "moving"),
    "square": ("moves", "slides", "sliding", "moving"),
    "triangle": ("moves", "slides", "sliding", "moving"),
    "ring": ("moves", "rolls", "rolling", "moving"),
}

ZOOM_RATE = 0.02
"""Growth of the picture in each frame of a zoom."""

ZOOM_FRAMES = 33
"""Frames after which a zoom stands still; zooming out starts as large as zooming in ends."""

_LENGTHS = {"rows": 1.0, "columns": 1.5}
"""Height and width of the picture, in units of its shorter side."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Thing:
    """One shape of a scene.

    Lengths are in units of the picture's shorter side; pictures are 1.5 times as wide as high.

    Attributes:
        shape, colour: keys of `SHAPES` and `COLOURS`.
        start: row and column of the middle at time 0, as shares of height and width.
        radius: of the shape.
        direction, speed: of its movement; None where it stands still.
    """

    shape: str
    colour: str
    start: tuple[float, float]
    radius: float
    direction: str | None = None
    speed: str | None = None

    @property
    def velocity(self) -> tuple[float, float]:
        """Rows and columns that it moves in a frame, in units of the shorter side."""
        if self.direction is None or self.speed is None:
            return 0.0, 0.0
        down, right = DIRECTIONS[self.direction]
        return down * SPEEDS[self.speed], right * SPEEDS[self.speed]


@dataclass(frozen=True)
class Camera:
    """The movement of a camera.

    Attributes:
        move: "pan" or "zoom".
        direction: of a pan, as for a shape (the picture moves the other way); of a zoom, "in" or
            "out".
        speed: of a pan; None for a zoom, which has one speed.
    """

    move: str
    direction: str
    speed: str | None = None


@dataclass(frozen=True)
class Scene:
    """The contents of one video.

    Attributes:
        kind: key of `KINDS`.
        caption: the text that a model gets.
        things: from the farthest to the nearest; nearer ones cover others.
        ground: colour behind them, three numbers from 0 to 1.
        ground_name: key of `GROUNDS`; None for an unnamed dark one.
        camera: its movement; None where it stands still.
    """

    kind: str
    caption: str
    things: tuple[Thing, ...]
    ground: tuple[float, float, float]
    ground_name: str | None = None
    camera: Camera | None = None

    @property
    def subject(self) -> Thing:
        """The shape that moves, or else the one that is named first."""
        return next((thing for thing in self.things if thing.direction), self.things[0])

    @property
    def other(self) -> Thing | None:
        """The second shape, or None."""
        return next((thing for thing in self.things if thing is not self.subject), None)

    @property
    def relation(self) -> str | None:
        """How the subject stands to the other shape: "behind", "in front of", "and" or None."""
        if self.other is None:
            return None
        if self.subject.direction is None:
            return "and"
        return "behind" if self.things[0] is self.subject else "in front of"

    @property
    def is_held_out(self) -> bool:
        """Whether it shows a pair of colour and shape that training never shows."""
        return any((thing.colour, thing.shape) in HELD_OUT for thing in self.things)


class _Draws:
    """Random choices of one scene."""

    def __init__(self, seed: int, split: str, index: int, attempt: int) -> None:
        self._random = seeded_generator(seed, "shapes", split, index, attempt)

    def number(self, low: float = 0.0, high: float = 1.0) -> float:
        value = torch.rand((), generator=self._random, dtype=torch.float64)
        return low + (high - low) * float(value)

    def choose(self, values: Sequence[_T]) -> _T:
        return values[int(torch.randint(len(values), (), generator=self._random))]

    def kind(self) -> str:
        place = self.number()
        for kind, share in KINDS.items():
            if place < share:
                return kind
            place -= share
        return next(iter(KINDS))


def make_scene(seed: int, index: int, held_out: bool = False, kind: str | None = None) -> Scene:
    """Return scene number `index` of the data set of that seed.

    Args:
        seed: of the data set.
        index: of the scene, from 0.
        held_out: a scene with a held-out pair, in place of one without.
        kind: key of `KINDS`; None draws one.
    """
    split = "held-out" if held_out else "training"
    attempt = 0
    while True:
        draws = _Draws(seed, split, index, attempt)
        scene = _MAKERS[kind or draws.kind()](draws)
        if scene.is_held_out == held_out:
            return scene
        attempt += 1


def _thing(
    draws: _Draws,
    moves_along: str | None = None,
    radius: tuple[float, float] = (0.18, 0.30),
    colour: str | None = None,
) -> Thing:
    """Draw a shape that stands still; of any colour, or of any other than the given one.

    Where it is not going to move along ("rows" or "columns"), it is whole within the picture.
    """
    size = draws.number(*radius)
    start = tuple(
        draws.number() if axis == moves_along else draws.number(size / length, 1 - size / length)
        for axis, length in _LENGTHS.items()
    )
    return Thing(
        shape=draws.choose(SHAPES),
        colour=draws.choose([c for c in COLOURS if c != colour]),
        start=(start[0], start[1]),
        radius=size,
    )


def _moving_thing(
    draws: _Draws, radius: tuple[float, float] = (0.18, 0.30), colour: str | None = None
) -> Thing:
    """Draw a shape that moves."""
    direction = draws.choose(tuple(DIRECTIONS))
    thing = _thing(draws, _axis(direction), radius, colour)
    return replace(thing, direction=direction, speed=draws.choose(tuple(SPEEDS)))


def _axis(direction: str) -> str:
    return "rows" if DIRECTIONS[direction][0] else "columns"


def _dark(draws: _Draws) -> tuple[float, float, float]:
    grey = draws.number(0.0, 0.15)
    return grey, grey, grey


def _phrase(draws: _Draws, thing: Thing) -> str:
    """Return "a red ball": the plain name of a shape half of the time."""
    nouns = NOUNS[thing.shape]
    noun = nouns[0] if draws.number() < 0.5 else draws.choose(nouns)
    return f"a {thing.colour} {noun}"


def _movement(draws: _Draws, thing: Thing) -> str:
    """Return "moves slowly right": the plain verb half of the time; rarely without the speed."""
    verbs = VERBS[thing.shape]
    verb = verbs[0] if draws.number() < 0.5 else draws.choose(verbs)
    speed = "" if draws.number() < 0.1 else f"{thing.speed} "
    return f"{verb} {speed}{thing.direction}"


def _make_single(draws: _Draws) -> Scene:
    thing = _moving_thing(draws)
    caption = f"{_phrase(draws, thing)} {_movement(draws, thing)}"
    return Scene("single", caption, (thing,), _dark(draws))


def _make_ground(draws: _Draws) -> Scene:
    scene = _make_single(draws)
    name = draws.choose(tuple(GROUNDS))
    caption = f"{scene.caption} on a {name} ground"
    return Scene("ground", caption, scene.things, GROUNDS[name], name)


def _make_pass(draws: _Draws) -> Scene:
    """Make a shape that passes behind or in front of another, which stands still."""
    still = _thing(draws, radius=(0.18, 0.26))
    # A slow one would be hidden for most of a short clip
    mover = replace(_moving_thing(draws, (0.18, 0.26), still.colour), speed="quickly")
    meeting = draws.number(4.0, 12.0)
    aside = draws.number(-0.1, 0.1)
    down, right = mover.velocity
    low, high = mover.radius, 1 - mover.radius
    if right:
        column = still.start[1] - right * meeting / _LENGTHS["columns"]
        start = (min(max(still.start[0] + aside, low), high), column % 1.0)
    else:
        start = ((still.start[0] - down * meeting) % 1.0, still.start[1] + aside / 2)
    mover = replace(mover, start=start)
    is_behind = draws.number() < 0.5
    relation = "behind" if is_behind else "in front of"
    caption = (
        f"{_phrase(draws, mover)} {_movement(draws, mover)} {relation} {_phrase(draws, still)}"
    )
    ground_name = draws.choose((None, None, *GROUNDS))
    ground = GROUNDS[ground_name] if ground_name else _dark(draws)
    if ground_name:
        caption = f"{caption} on a {ground_name} ground"
    things = (mover, still) if is_behind else (still, mover)
    return Scene("pass", caption, things, ground, ground_name)


def _make_pan(draws: _Draws) -> Scene:
    camera = Camera("pan", draws.choose(tuple(DIRECTIONS)), draws.choose(tuple(SPEEDS)))
    axis = _axis(camera.direction)
    first = _thing(draws, axis, radius=(0.16, 0.22))
    things: tuple[Thing, ...] = (first,)
    subject = _phrase(draws, first)
    if draws.number() < 0.5:
        second = _thing(draws, axis, radius=(0.16, 0.22), colour=first.colour)
        # In different halves of the picture, so the two never cover each other
        halves = draws.choose(((0.26, 0.74), (0.74, 0.26)))
        things = tuple(
            replace(
                thing,
                start=(thing.start[0], half) if axis == "rows" else (half, thing.start[1]),
            )
            for thing, half in zip((first, second), halves, strict=True)
        )
        subject = f"{subject} and {_phrase(draws, second)}"
    caption = f"{subject}, the camera pans {camera.speed} {camera.direction}"
    return Scene("pan", caption, things, _dark(draws), camera=camera)


def _make_zoom(draws: _Draws) -> Scene:
    start = (draws.number(0.4, 0.6), draws.number(0.4, 0.6))
    thing = replace(_thing(draws, radius=(0.15, 0.22)), start=start)
    camera = Camera("zoom", draws.choose(("in", "out")))
    caption = f"{_phrase(draws, thing)}, the camera zooms {camera.direction}"
    return Scene("zoom", caption, (thing,), _dark(draws), camera=camera)


_MAKERS = {
    "single": _make_single,
    "ground": _make_ground,
    "pass": _make_pass,
    "pan": _make_pan,
    "zoom": _make_zoom,
}
