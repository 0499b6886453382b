"""Moving shapes with captions: generated videos for testing training without a download.

A scene is one shape of one colour that moves over a dark ground at a constant speed; where it
leaves the picture on one side, it enters on the other. Its caption names shape, colour, direction
and speed, but not where it starts, how large it is and how dark the ground is. So samples of one
caption differ, and it can be measured whether a generated video matches its caption. Scene i is a
function of (seed, i), and can be rendered at any size and at any times.

    # mp4 files and captions for anyflow-precompute:
    python -m anyflow_deploy.training.data.moving_shapes FOLDER [COUNT]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.models import FPS, TINY_VIDEO
from anyflow_deploy.training.timestep_sampling import seeded_generator

SHAPES = ("circle", "square", "triangle", "ring")
COLOURS = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 0.9, 0.2),
    "blue": (0.15, 0.3, 1.0),
    "yellow": (1.0, 0.9, 0.1),
    "purple": (0.7, 0.2, 0.9),
    "white": (1.0, 1.0, 1.0),
}
DIRECTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}
SPEEDS = {"slowly": 0.02, "quickly": 0.06}
"""Distance that a shape moves in a frame of a video, in units of the picture's shorter side."""


@dataclass(frozen=True)
class Scene:
    """The contents of one video.

    Lengths are in units of the picture's shorter side.

    Attributes:
        start: row and column of the middle at time 0, as shares of height and width.
        radius: of the shape.
        ground: grey level behind it, 0 to 1.
    """

    shape: str
    colour: str
    direction: str
    speed: str
    start: tuple[float, float]
    radius: float
    ground: float

    @property
    def caption(self) -> str:
        """The text that a model gets."""
        return f"a {self.colour} {self.shape} moves {self.speed} {self.direction}"


def make_scene(seed: int, index: int) -> Scene:
    """Return scene number `index` of the data set of that seed.

    All combinations of words are equally likely.
    """
    random = seeded_generator(seed, "scene", index)

    def choose(arguments: tuple[str, ...]) -> str:
        return arguments[int(torch.randint(len(arguments), (), generator=random))]

    shape = choose(SHAPES)
    colour = choose(tuple(COLOURS))
    direction = choose(tuple(DIRECTIONS))
    speed = choose(tuple(SPEEDS))
    row, column, size, grey = torch.rand(4, generator=random, dtype=torch.float64).tolist()
    return Scene(shape, colour, direction, speed, (row, column), 0.18 + 0.12 * size, 0.15 * grey)


def render_scene(scene: Scene, times: Tensor, height: int, width: int) -> Tensor:
    """Render a scene at some times, with edges one pixel wide.

    Args:
        scene: to draw.
        times: (frames), in frames of a video; any numbers.
        height, width: of the picture.

    Returns:
        float32 (frames, height, width, 3), 0 to 1.
    """
    side = min(height, width)
    distance = SPEEDS[scene.speed] * times.double()
    offsets = []
    for axis, size in enumerate((height, width)):
        length = size / side
        middle = scene.start[axis] * length + DIRECTIONS[scene.direction][axis] * distance
        place = (torch.arange(size, dtype=torch.float64) + 0.5) / side
        # The shorter way around the edges
        offsets.append((place[None] - middle[:, None] + length / 2) % length - length / 2)
    inside = distance_to_edge(
        scene.shape, offsets[0][:, :, None], offsets[1][:, None, :], scene.radius
    )
    cover = (0.5 - inside * side).clamp(0, 1).float()[..., None]
    colour = torch.tensor(COLOURS[scene.colour])
    return scene.ground * (1 - cover) + colour * cover


def distance_to_edge(shape: str, rows: Tensor, columns: Tensor, radius: float) -> Tensor:
    """Return the distance to the edge, negative inside."""
    if shape == "square":
        return torch.maximum(rows.abs(), columns.abs()) - 0.85 * radius
    if shape == "triangle":  # on its base
        return torch.maximum(rows - 0.5 * radius, 0.866 * columns.abs() - 0.5 * rows - 0.5 * radius)
    middle = (rows.square() + columns.square()).sqrt()
    return (middle - 0.75 * radius).abs() - 0.25 * radius if shape == "ring" else middle - radius


def render_video(scene: Scene, frames: int, height: int, width: int) -> Tensor:
    """Render a video of a scene, uint8 (frames, height, width, 3)."""
    return (render_scene(scene, torch.arange(frames), height, width) * 255).round().to(torch.uint8)


def save_videos(
    folder: Path, count: int, size: tuple[int, int, int] = TINY_VIDEO, seed: int = 0
) -> None:
    """Write scenes 0 to count - 1 as 00000.mp4 and 00000.txt, …

    Args:
        folder: created where missing.
        size: frames, height and width.

    Raises:
        AnyFlowError: the folder has files in it.
    """
    from anyflow_deploy.pipelines.video_io import save_video

    if folder.exists() and any(folder.iterdir()):
        raise AnyFlowError(f"{folder} is not empty. Choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        scene = make_scene(seed, index)
        save_video(folder / f"{index:05d}.mp4", render_video(scene, *size).numpy(), FPS)
        (folder / f"{index:05d}.txt").write_text(scene.caption + "\n")


def main() -> None:
    """Write the folder named on the command line."""
    arguments = sys.argv[1:]
    if (
        len(arguments) not in (1, 2)
        or arguments[0].startswith("-")
        or not (arguments[1:] or ["1"])[0].isdecimal()
    ):
        sys.exit("usage: python -m anyflow_deploy.training.data.moving_shapes FOLDER [COUNT]")
    try:
        save_videos(Path(arguments[0]), int(arguments[1]) if len(arguments) == 2 else 16)
    except AnyFlowError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
