"""Renders scenes of moving shapes as videos."""

from __future__ import annotations

import torch
from torch import Tensor

from anyflow_deploy.training.data.moving_shapes import (
    COLOURS,
    DIRECTIONS,
    SPEEDS,
    distance_to_edge,
)
from anyflow_deploy.training.shapes.scenes import ZOOM_FRAMES, ZOOM_RATE, Camera, Scene, Thing


def render_scene(scene: Scene, frames: int, height: int, width: int) -> Tensor:
    """Render the first frames of a scene, with edges one pixel wide.

    Args:
        scene: to draw.
        frames, height, width: of the video, in frames and pixels.

    Returns:
        float32 (frames, height, width, 3), 0 to 1.
    """
    times = torch.arange(frames, dtype=torch.float64)
    picture = torch.tensor(scene.ground).expand(frames, height, width, 3)
    for thing in scene.things:
        cover = _cover(thing, scene.camera, times, height, width)
        picture = picture * (1 - cover) + torch.tensor(COLOURS[thing.colour]) * cover
    return picture


def render_video(scene: Scene, frames: int, height: int, width: int) -> Tensor:
    """Render the first frames of a scene as uint8 (frames, height, width, 3)."""
    return (render_scene(scene, frames, height, width) * 255).round().to(torch.uint8)


def camera_zoom(camera: Camera | None, times: Tensor) -> Tensor:
    """Return how much larger than life things are drawn at each time: (frames), 1 or more."""
    if camera is None or camera.move != "zoom":
        return torch.ones_like(times)
    passed = times.clamp(max=ZOOM_FRAMES - 1)
    return 1 + ZOOM_RATE * (passed if camera.direction == "in" else ZOOM_FRAMES - 1 - passed)


def camera_velocity(camera: Camera | None) -> tuple[float, float]:
    """Return rows and columns that a pan moves the camera by in a frame, in shorter sides."""
    if camera is None or camera.move != "pan" or camera.speed is None:
        return 0.0, 0.0
    down, right = DIRECTIONS[camera.direction]
    return down * SPEEDS[camera.speed], right * SPEEDS[camera.speed]


def _cover(thing: Thing, camera: Camera | None, times: Tensor, height: int, width: int) -> Tensor:
    """Return how much of each pixel a shape covers: float32 (frames, height, width, 1)."""
    side = min(height, width)
    zoom = camera_zoom(camera, times)
    offsets = []
    for axis, size in enumerate((height, width)):
        length = size / side
        velocity = thing.velocity[axis] - camera_velocity(camera)[axis]
        middle = thing.start[axis] * length + velocity * times
        place = (torch.arange(size, dtype=torch.float64) + 0.5) / side
        seen = length / 2 + (place[None] - length / 2) / zoom[:, None]
        # The shorter way around the edges
        offsets.append((seen - middle[:, None] + length / 2) % length - length / 2)
    inside = distance_to_edge(
        thing.shape, offsets[0][:, :, None], offsets[1][:, None, :], thing.radius
    )
    return (0.5 - inside * side * zoom[:, None, None]).clamp(0, 1).float()[..., None]
