"""The last part of `make demo`: one prompt at 1, 2, 4 and 8 steps, and what to look at.

    python -m tools.demo BUNDLE [BUNDLE …] --output FOLDER [--prompt TEXT]

Writes an mp4 for each number of steps, and `sheet.png` with all of them side by side. Another
bundle of the same model adds a row of 4 steps (the int8 one), a causal one adds a streamed video.
The first picture of the README is this sheet.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anyflow_deploy import Video, VideoPipeline
from anyflow_deploy.models import FPS
from tools.contact_sheet import draw_contact_sheet

PROMPT = "a red ball rolls quickly right behind a blue box"
STEPS = (1, 2, 4, 8)
FRAMES = 17
STREAM_FRAMES = 57
"""Frames of the streamed video: longer than the videos that the model was trained on."""

Row = tuple[str, NDArray[np.uint8]]


def make_rows(bundles: list[Path], prompt: str, output: Path, seed: int) -> list[Row]:
    """Make every video, save it, and return the rows of the sheet."""
    rows: list[Row] = []
    for number, bundle in enumerate(bundles):
        with VideoPipeline.from_bundle(bundle) as pipe:
            manifest = pipe.manifest
            if manifest.kind == "causal":
                rows.append(_make_stream(pipe, prompt, output, seed))
                continue
            for steps in STEPS if number == 0 else STEPS[2:3]:
                video = pipe(prompt, num_inference_steps=steps, num_frames=FRAMES, seed=seed)
                plural = "s" if steps > 1 else ""
                video.save(output / f"{manifest.precision}-{steps}-step{plural}.mp4")
                rows.append((f"{manifest.precision}, {steps} step{plural}", _frames(video)))
    return rows


def _make_stream(pipe: VideoPipeline, prompt: str, output: Path, seed: int) -> Row:
    chunks = list(pipe.stream(prompt, num_inference_steps=4, num_frames=STREAM_FRAMES, seed=seed))
    video = Video.from_chunks(chunks, FPS)
    video.save(output / "stream.mp4")
    return f"streamed in\n{len(chunks)} chunks", _frames(video)


def _frames(video: Video) -> NDArray[np.uint8]:
    assert video.frames is not None  # they are only left out on request
    return video.frames


def main() -> None:
    """Make the videos and the sheet that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rows = make_rows(options.bundles, options.prompt, options.output, options.seed)
    draw_contact_sheet(options.output / "sheet.png", rows, options.prompt)
    sys.stdout.write(f"{options.output / 'sheet.png'}\n")


if __name__ == "__main__":
    main()
