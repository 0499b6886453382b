"""The pipelines of assets/: whole, small, loadable, and able to draw what they are asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.models import MODELS
from anyflow_deploy.training.shapes.evaluation import load_sampler
from anyflow_deploy.training.shapes.packing import DIGESTS, find_changed_files
from anyflow_deploy.training.shapes.reader import read_video

ASSETS = Path(__file__).parents[2] / "assets"
PIPELINES = sorted(path.parent for path in ASSETS.glob("*/model_index.json"))

pytestmark = pytest.mark.skipif(not PIPELINES, reason="assets/ is not in this copy of the project")


@pytest.mark.parametrize("folder", PIPELINES, ids=lambda folder: folder.name)
def test_an_asset_is_as_it_was_packed_and_under_10_mb(folder: Path) -> None:
    assert find_changed_files(folder) == []
    files = {path for path in folder.rglob("*") if path.is_file()}
    named = {line.split("  ", 1)[1] for line in (folder / DIGESTS).read_text().splitlines()}
    assert {str(path.relative_to(folder)) for path in files} == {*named, DIGESTS}
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    assert folder.name in (ASSETS / "README.md").read_text()


@pytest.mark.parametrize("folder", PIPELINES, ids=lambda folder: folder.name)
def test_an_asset_has_the_architecture_of_the_table(folder: Path) -> None:
    row = MODELS["far-shapes" if folder.name.startswith("far-") else "shapes"]
    assert open_checkpoint(folder).architecture == row.architecture


def test_the_teacher_draws_the_colour_and_the_direction_it_is_asked_for() -> None:
    import diffusers

    folder = ASSETS / "shapes-teacher"
    pipeline = diffusers.AnyFlowPipeline.from_pretrained(folder)
    sampler = load_sampler(folder, pipeline, guidance=2.0)
    captions = ["a yellow circle moves slowly right", "a green box moves slowly up"]
    videos = sampler.decode(sampler.sample(captions, 8, 0, 5))
    assert videos.shape == (2, 17, 64, 96, 3) and videos.dtype == np.uint8
    largest = [read_video(video).things[0] for video in videos]
    assert [(thing.colour, thing.direction) for thing in largest] == [
        ("yellow", "right"),
        ("green", "up"),
    ]
