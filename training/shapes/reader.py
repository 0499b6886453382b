"""Tells what a video of moving shapes shows, by plain image processing.

No network is involved: the ground is the commonest colour, a pixel belongs to the shape whose
colour is nearest, a shape's movement is that of its middle, and its form is the template that
covers it best. So a generated video can be compared with its prompt. Tests hold it against rendered
videos, whose contents are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anyflow_deploy.training.data.moving_shapes import COLOURS, DIRECTIONS, SHAPES, SPEEDS
from anyflow_deploy.training.shapes.rendering import camera_velocity
from anyflow_deploy.training.shapes.scenes import GROUNDS, Scene, Thing
from anyflow_deploy.training.shapes.templates import template, template_radius

_NEAR = 0.35
"""Largest distance of a pixel's colour from a shape's, and smallest from the ground's."""

_LEAST_AREA = 0.01
"""Smallest share of the picture that counts as a shape, on average over frames."""

_STILL = 0.01
"""Speed below which a shape stands still, in shorter sides of the picture in a frame."""

_FAST = (SPEEDS["slowly"] * SPEEDS["quickly"]) ** 0.5
"""Speed from which a shape moves quickly: the geometric middle of the two."""


@dataclass(frozen=True)
class SeenThing:
    """A shape that was found in a video.

    Attributes:
        colour, shape: keys of `COLOURS` and `SHAPES`.
        direction, speed: of its movement across the picture; None where it stands still.
        growth: its area in the last quarter of the frames against the first quarter.
        likeness: share of its area, from 0 to 1, that the template of the shape covers.
    """

    colour: str
    shape: str
    direction: str | None
    speed: str | None
    growth: float
    likeness: float


@dataclass(frozen=True)
class SeenVideo:
    """What a video shows.

    Attributes:
        things: the shapes, the largest first.
        ground: colour of the ground, three numbers from 0 to 1.
        nearest: colour of the shape that covers the other where both would be; None where they
            never meet.
    """

    things: tuple[SeenThing, ...]
    ground: tuple[float, float, float]
    nearest: str | None


def read_video(video: NDArray[np.uint8]) -> SeenVideo:
    """Find the shapes of a video.

    Args:
        video: uint8 (frames, height, width, 3), at least two frames.
    """
    pixels = np.asarray(video, dtype=np.float32) / np.float32(255)
    ground = _find_ground(pixels)
    names = list(COLOURS)
    palette = np.array([COLOURS[name] for name in names], dtype=np.float32)
    distance = np.linalg.norm(pixels[..., None, :] - palette, axis=-1)
    is_ground = np.linalg.norm(pixels - ground, axis=-1) < _NEAR
    nearest = np.where(is_ground | (distance.min(-1) > _NEAR), -1, distance.argmin(-1))
    masks = {
        name: nearest == number
        for number, name in enumerate(names)
        if (nearest == number).mean() > _LEAST_AREA
    }
    tracks = {name: _Track(mask) for name, mask in masks.items()}
    order = sorted(tracks, key=lambda name: -tracks[name].areas.mean())[:2]
    things = tuple(_see_thing(name, tracks[name]) for name in order)
    return SeenVideo(
        things,
        (float(ground[0]), float(ground[1]), float(ground[2])),
        _find_nearest([(t.colour, t.shape, tracks[t.colour]) for t in things]),
    )


def _find_ground(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the commonest colour, in steps of 1/16, refined to the mean of its pixels."""
    flat = pixels.reshape(-1, 3)
    steps = np.minimum((flat * 16).astype(np.int64), 15)
    codes = steps @ np.array([256, 16, 1])
    commonest = np.bincount(codes, minlength=4096).argmax()
    return np.asarray(flat[codes == commonest].mean(0), dtype=np.float32)


class _Track:
    """The path of one shape, on a picture whose opposite edges touch.

    Attributes:
        mask: bool (frames, height, width).
        areas: share of the picture in each frame.
        middles: rows and columns in pixels, (frames, 2); NaN where the shape is not seen.
    """

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        self.mask = mask
        self.areas = mask.mean((1, 2))
        columns = [_circular_middle(mask.sum(2 - axis), mask.shape[1 + axis]) for axis in range(2)]
        self.middles = np.stack(columns, 1)

    def velocity(self) -> tuple[float, float]:
        """Return rows and columns in a frame, in shorter sides: medians over frames."""
        size = np.array(self.mask.shape[1:])
        steps = (np.diff(self.middles, axis=0) + size / 2) % size - size / 2
        large = self.areas > 0.5 * np.nanmax(self.areas)
        steps = steps[large[1:] & large[:-1]]
        if not len(steps):
            return 0.0, 0.0
        row, column = np.nanmedian(steps, axis=0) / size.min()
        return float(row), float(column)

    def whole_frames(self) -> list[int]:
        """Return the frames in which most of the shape is seen: those of the largest areas."""
        limit = np.quantile(self.areas, 0.75)
        return [int(frame) for frame in np.flatnonzero(self.areas >= limit)]

    def centred(self, frame: int) -> NDArray[np.bool_]:
        """Return the mask of a frame, rolled until the shape is in the middle."""
        height, width = self.mask.shape[1:]
        row, column = self.middles[frame]
        shift = (round(height / 2 - 0.5 - row), round(width / 2 - 0.5 - column))
        return np.roll(self.mask[frame], shift, axis=(0, 1))

    def whole_template(self, shape: str) -> NDArray[np.bool_]:
        """Return the template of a shape, as large as this one where nothing covers it."""
        area = np.quantile(self.areas, 0.9) * self.mask[0].size
        return template(shape, template_radius(shape, int(area)), *self.mask.shape[1:])


def _move_to(drawn: NDArray[np.bool_], middle: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Roll a template from the middle of the picture to another place."""
    height, width = drawn.shape
    shift = (round(middle[0] - height / 2 + 0.5), round(middle[1] - width / 2 + 0.5))
    return np.roll(drawn, shift, axis=(0, 1))


def _circular_middle(counts: NDArray[np.int64], size: int) -> NDArray[np.float64]:
    """Return the middle of pixels on a circle of `size`, for each frame; NaN without any."""
    angles = 2 * np.pi * np.arange(size) / size
    total = counts.sum(1)
    x = (counts * np.cos(angles)).sum(1)
    y = (counts * np.sin(angles)).sum(1)
    middle = (np.arctan2(y, x) / (2 * np.pi) * size) % size
    return np.where(total > 0, middle, np.nan)


def _see_thing(colour: str, track: _Track) -> SeenThing:
    shape, likeness = _find_shape(track)
    row, column = track.velocity()
    direction, speed = _name_movement(row, column)
    quarter = max(1, len(track.areas) // 4)
    first, last = track.areas[:quarter].mean(), track.areas[-quarter:].mean()
    return SeenThing(colour, shape, direction, speed, float(last / max(first, 1e-6)), likeness)


def _find_shape(track: _Track) -> tuple[str, float]:
    """Return the shape whose template covers the mask best, and how well (intersection / union)."""
    scores = dict.fromkeys(SHAPES, 0.0)
    frames = track.whole_frames()
    for frame in frames:
        mask = track.centred(frame)
        for shape in SHAPES:
            drawn = template(shape, template_radius(shape, int(mask.sum())), *mask.shape)
            union = (mask | drawn).sum()
            scores[shape] += float((mask & drawn).sum() / max(1, union)) / len(frames)
    best = max(scores, key=lambda shape: scores[shape])
    return best, scores[best]


def _name_movement(row: float, column: float) -> tuple[str | None, str | None]:
    """Return direction and speed of a velocity in shorter sides a frame."""
    size = max(abs(row), abs(column))
    if size < _STILL:
        return None, None
    direction = max(
        DIRECTIONS, key=lambda name: DIRECTIONS[name][0] * row + DIRECTIONS[name][1] * column
    )
    return direction, "quickly" if size > _FAST else "slowly"


def _find_nearest(things: list[tuple[str, str, _Track]]) -> str | None:
    """Return the colour that is seen where the templates of both shapes are."""
    if len(things) < 2:
        return None
    votes = [0, 0]
    tracks = [track for _, _, track in things]
    drawn = [track.whole_template(shape) for _, shape, track in things]
    for frame in range(len(tracks[0].mask)):
        middles = [track.middles[frame] for track in tracks]
        if np.isnan(middles).any():
            continue
        first, second = map(_move_to, drawn, middles)
        for number in range(2):
            votes[number] += int((first & second & tracks[number].mask[frame]).sum())
    if sum(votes) < 20:
        return None
    return things[int(votes[1] > votes[0])][0]


def compare(scene: Scene, seen: SeenVideo) -> dict[str, bool]:
    """Compare a video with the scene that its prompt asks for.

    Returns:
        Whether each thing that the caption says is so: "colour", "shape", "direction" and "speed"
        of the first shape; where they are said, "other" (colour and shape of the second),
        "ground", "relation" and "zoom".
    """
    by_colour = {thing.colour: thing for thing in seen.things}
    subject, other = scene.subject, scene.other
    found = by_colour.get(subject.colour)
    result = {
        "colour": found is not None,
        "shape": found is not None and found.shape == subject.shape,
        **_compare_movement(scene, subject, found),
    }
    if other is not None:
        match = by_colour.get(other.colour)
        result["other"] = match is not None and match.shape == other.shape
        if scene.relation in ("behind", "in front of"):
            front = subject.colour if scene.relation == "in front of" else other.colour
            result["relation"] = seen.nearest in (front, None)
    elif len(seen.things) > 1:
        result["other"] = False
    if scene.ground_name is not None:
        result["ground"] = scene.ground_name == min(
            GROUNDS, key=lambda name: float(np.linalg.norm(np.subtract(GROUNDS[name], seen.ground)))
        )
    if scene.camera is not None and scene.camera.move == "zoom":
        growth = found.growth if found else 1.0
        result["zoom"] = growth > 1.1 if scene.camera.direction == "in" else growth < 1 / 1.1
    return result


def _compare_movement(scene: Scene, subject: Thing, found: SeenThing | None) -> Mapping[str, bool]:
    """Compare direction and speed across the picture, where the caption says them."""
    if scene.camera is not None and scene.camera.move == "zoom":
        return {}
    pan = camera_velocity(scene.camera)
    down, right = (own - moved for own, moved in zip(subject.velocity, pan, strict=True))
    direction, speed = _name_movement(down, right)
    result = {"direction": found is not None and found.direction == direction}
    if any(word in scene.caption.split() for word in SPEEDS):
        result["speed"] = found is not None and found.speed == speed
    return result
