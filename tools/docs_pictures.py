"""Draws the pictures of the README and of docs/index.md.

`python -m tools.docs_pictures` writes them to docs/images/:

- `overview.svg`: the stages of a model in this project, from a checkpoint to a video.
- `any_step_schedule.png`: what "any number of steps" means, on frames of the moving-shapes data
  set. The frames are training data mixed with noise, as in the training of a flow map. They are not
  the output of a model.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from anyflow_deploy import Schedule
from anyflow_deploy.training.data.moving_shapes import Scene, render_scene

IMAGES = Path(__file__).parents[1] / "docs" / "images"

# Title, lines of text, and the command or call that leads there.
BOXES = (
    ("checkpoint", ("AnyFlow weights in", "diffusers' layout"), ""),
    ("bundle", ("ONNX graph, weights,", "manifest with hashes"), "anyflow-export"),
    ("engine", ("ONNX Runtime, TensorRT,", "AOTInductor"), "anyflow-build"),
    ("video", ("1, 2, 4 … 50 steps,", "or a deadline"), "anyflow-generate"),
)
WIDTH, HEIGHT, GAP, TOP = 192, 92, 60, 14

STEPS = (4, 2, 1)
FRAMES = (0, 5)
SCENE = Scene("circle", "red", "right", "quickly", (0.5, 0.5), 0.26, 0.12)


def overview_svg() -> str:
    """Draw four boxes in a row with arrows between them.

    They are readable on a light and on a dark page.
    """
    parts = []
    for index, (title, lines, command) in enumerate(BOXES):
        left = 4 + index * (WIDTH + GAP)
        middle = left + WIDTH / 2
        parts.append(
            f'<rect class="box" x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" rx="10"/>'
        )
        parts.append(f'<text class="title" x="{middle}" y="{TOP + 32}">{title}</text>')
        for row, line in enumerate(lines):
            parts.append(
                f'<text class="small" x="{middle}" y="{TOP + 56 + 18 * row}">{line}</text>'
            )
        if index:
            parts.append(_arrow(left - GAP + 6, left - 6))
            parts.append(
                f'<text class="code" x="{left - GAP / 2}" y="{TOP + HEIGHT + 26}">{command}</text>'
            )
    total = 8 + len(BOXES) * WIDTH + (len(BOXES) - 1) * GAP
    style = (
        "text{font-family:system-ui,sans-serif;text-anchor:middle;fill:#12324a}"
        ".box{fill:#eaf3fa;stroke:#3f7ca8;stroke-width:1.5}.title{font-size:19px;font-weight:600}"
        ".small{font-size:13.5px}.code{font-family:ui-monospace,monospace;font-size:14px;fill:#3f7ca8}"
        ".line{stroke:#3f7ca8;stroke-width:2.5;fill:none}.head{fill:#3f7ca8}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {TOP + HEIGHT + 38}"'
        f' role="img" aria-label="checkpoint, bundle, engine, video">\n<style>{style}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _arrow(start: float, end: float) -> str:
    y = TOP + HEIGHT / 2
    head = f'<path class="head" d="M{end} {y} l-12 -7 v14 z"/>'
    return f'<path class="line" d="M{start} {y} H{end - 10}"/>{head}'


def any_step_figure() -> Figure:
    """Draw frames at the times of a four-step schedule.

    The steps of the schedules of 4, 2 and 1 steps are drawn under them.
    """
    times = list(Schedule.uniform(max(STEPS)).timesteps)
    clean = render_scene(SCENE, torch.tensor(FRAMES), 48, 72)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)) * 0.25 + 0.5
    columns = len(times)
    figure = pyplot.figure(figsize=(1.9 * columns, 4.4), facecolor="white")
    grid = figure.add_gridspec(
        len(FRAMES) + 1,
        columns,
        hspace=0.06,
        wspace=0.06,
        height_ratios=[1] * len(FRAMES) + [0.95],
        left=0.01,
        right=0.99,
        top=0.92,
        bottom=0.02,
    )
    for column, time in enumerate(times):
        share = time / 1000
        for row in range(len(FRAMES)):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(
                ((1 - share) * clean[row] + share * noise[row]).clamp(0, 1).numpy(),
                interpolation="nearest",
            )
            axes.set_axis_off()
            if not row:
                axes.set_title(f"t = {time:.0f}", fontsize=13)
    below = figure.add_subplot(grid[-1, :])
    below.set_axis_off()
    below.set_xlim(0, columns)
    below.set_ylim(len(STEPS), 0)
    for row, steps in enumerate(STEPS):
        stops = [
            times.index(min(times, key=lambda other, t=t: abs(other - t)))
            for t in Schedule.uniform(steps).timesteps
        ]
        for start, end in itertools.pairwise(stops):
            arrow = FancyArrowPatch(
                (start + 0.5, row + 0.6),
                (end + 0.5, row + 0.6),
                arrowstyle="-|>",
                mutation_scale=18,
                shrinkA=2,
                shrinkB=2,
                linewidth=2,
                color="#3f7ca8",
            )
            below.add_patch(arrow)
        below.text(
            0.02, row + 0.6, f"{steps} step{'s' if steps > 1 else ''}", fontsize=12, va="center"
        )
    return figure


def main() -> None:
    """Write both pictures."""
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "overview.svg").write_text(overview_svg())
    any_step_figure().savefig(IMAGES / "any_step_schedule.png", dpi=80)


if __name__ == "__main__":
    main()
