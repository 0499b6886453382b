"""Draws a contact sheet: one row for each video, its frames side by side.

    python tools/contact_sheet.py sheet.png "1 step=one.mp4" "4 steps=four.mp4" [--title TEXT]

`make demo` ends with it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anyflow_deploy.bundle.atomic_io import atomic_file
from anyflow_deploy.pipelines.clips import ClipReader

COLUMNS = 6


def read_frames(path: Path) -> NDArray[np.uint8]:
    """Read a video, uint8 (frames, height, width, 3)."""
    with ClipReader(path) as clip:
        return clip.read_all()


def pick_frames(frames: NDArray[np.uint8], columns: int = COLUMNS) -> list[int]:
    """Return the numbers of evenly spaced frames, the first and the last among them."""
    return [round(number) for number in np.linspace(0, len(frames) - 1, columns)]


def draw_contact_sheet(
    path: Path, rows: list[tuple[str, NDArray[np.uint8]]], title: str = ""
) -> None:
    """Draw videos of one size, and write a PNG.

    Args:
        path: of the picture.
        rows: label and frames, uint8 (frames, height, width, 3), of each video.
        title: above all.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height, width = rows[0][1].shape[1:3]
    cell = 1.5
    figure, axes = pyplot.subplots(
        len(rows),
        COLUMNS,
        figsize=(cell * COLUMNS * width / height + 1, cell * len(rows) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for row, (label, frames) in enumerate(rows):
        for column, number in enumerate(pick_frames(frames)):
            panel = axes[row][column]
            panel.imshow(frames[number], interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
            panel.set_xlabel(f"frame {number}", fontsize=7)
        axes[row][0].set_ylabel(label, fontsize=10)
    if title:
        figure.suptitle(title, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=100, format="png")
    pyplot.close(figure)


def main() -> None:
    """Draw the sheet that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("videos", nargs="+", help="LABEL=FILE")
    parser.add_argument("--title", default="")
    options = parser.parse_args()
    rows = []
    for video in options.videos:
        label, _, file = video.rpartition("=")
        if not label or not Path(file).is_file():
            sys.exit(f"error: {video!r} is not LABEL=FILE with a video; nothing was drawn.")
        rows.append((label, read_frames(Path(file))))
    draw_contact_sheet(options.output, rows, options.title)


if __name__ == "__main__":
    main()
