"""What a calibration saves unless it is thorough: the ranges stay those of every prompt alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from anyflow_deploy import MODELS, noise
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.checkpoints.weights import Weights
from anyflow_deploy.cli.calibrate import CalibrateOptions
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.export.quantization import calibrate as calibration_module
from anyflow_deploy.export.quantization.calibrate import (
    BATCH_TOKENS,
    CalibrationSettings,
    choose_batch,
    run_calibration,
    stands_still,
)
from anyflow_deploy.export.quantization.prompts import (
    PROMPTS,
    collapse_padding,
    random_prompt_embeds,
)
from anyflow_deploy.export.quantization.rollouts import (
    calibration_shape,
    chunk_plan,
    count_tokens,
    latent_shape,
    run_rollout,
)
from anyflow_deploy.export.torch_engine import TorchEngine
from anyflow_deploy.quantization.calibration import Calibration
from anyflow_deploy.schedule import Schedule
from tests.conftest import SMALL
from tests.integration.test_calibration import CAUSAL, Stopping, settings


def amax(calibration: Calibration) -> dict[str, float]:
    return {name: tensor.amax for name, tensor in calibration.tensors.items()}


@pytest.mark.parametrize("checkpoint", [SMALL, CAUSAL])
def test_a_batch_with_one_row_of_zeros_has_the_ranges_of_every_prompt_alone(
    checkpoint: Path,
) -> None:
    weights = open_checkpoint(checkpoint)
    quick = settings(weights, prompts=3, steps=(1, 2))
    thorough = dataclasses.replace(quick, thorough=True)
    batch, alone = run_calibration(weights, quick), run_calibration(weights, thorough)
    assert (batch.batch, batch.thorough) == (3, False)
    assert (alone.batch, alone.thorough) == (1, True)
    assert batch.prompts == alone.prompts == list(PROMPTS[:3]) and batch.prompts_left_out == []
    assert batch.chunks == list(chunk_plan(weights.architecture, quick.shape[0]))
    assert amax(batch) == pytest.approx(amax(alone), rel=2e-4)  # five digits, rounded up
    for name, tensor in batch.tensors.items():
        expected = alone.tensors[name].channels
        assert (tensor.channels or []) == pytest.approx(expected or [], rel=1e-3), name


def test_videos_of_a_batch_are_those_made_alone() -> None:
    weights = open_checkpoint(CAUSAL)
    engine, a = TorchEngine(weights), weights.architecture
    latents = noise((2, 12, a.in_channels, 8, 8), 3)
    text = random_prompt_embeds(weights, PROMPTS[:2], 40).prompt_embeds
    schedule = Schedule.uniform(2)
    both = run_rollout(engine, latents, text, schedule)
    for index in range(2):
        alone = run_rollout(engine, latents[index : index + 1], text[index : index + 1], schedule)
        np.testing.assert_allclose(both[index], alone[0], atol=1e-4)


def test_one_row_stands_for_the_zeros_behind_the_longest_prompt() -> None:
    text = np.zeros((2, 10, 3), np.float32)
    text[0, :2] = 1
    text[1, :4, 2] = 1
    short, count = collapse_padding(text)
    assert (short.shape, count) == ((2, 5, 3), 6)
    assert np.array_equal(short, text[:, :5])
    for full in (text[:, :4], text[:, :5]):
        assert collapse_padding(full)[0] is full and collapse_padding(full)[1] == 1


def test_large_models_run_one_prompt_at_a_time() -> None:
    """Their memory is what it was; small ones stay below the tokens of a batch."""
    for name in ("1.3b", "14b", "far-1.3b", "far-14b"):
        a = MODELS[name].architecture
        assert choose_batch(a, latent_shape(a, None, None, None), 8, 512) == 1
        assert choose_batch(a, latent_shape(a, 29, 256, 448), 8, 40) == 1
    far = MODELS["far-tiny"].architecture
    shape = calibration_shape(far, None, None, None)
    assert choose_batch(far, shape, 8, 33) == 8
    assert choose_batch(far, shape, 10**6, 33) == BATCH_TOKENS // count_tokens(far, shape, 33)
    # 4 tokens a frame: a chunk of 3 frames, 2 such chunks full, 10 frames compressed to 1 token
    assert count_tokens(far, (13, 16, 4, 4), 33) == 12 + (2 * 12 + 4) + 33


@pytest.mark.parametrize(
    ("largest", "batch", "still"),
    [
        ([1.0], 1, False),
        ([1.0, 1.0], 1, False),  # one prompt does not show that two add nothing
        ([1.0, 1.0, 1.005], 1, True),
        ([1.0, 1.008, 1.016], 1, False),  # 1.6 % over two prompts
        ([0.5, 1.0, 1.005, 1.006], 1, True),
        ([1.0], 2, False),
        ([1.0, 1.009], 2, True),
        ([1.0, 1.02], 8, False),
        ([0.0, 0.0, 0.0], 1, True),
        ([0.0, 0.0, 1e-9], 1, False),
    ],
)
def test_ranges_stand_still_over_two_prompts(largest: list[float], batch: int, still: bool) -> None:
    history = [{"still": 1.0, "x": value} for value in largest]
    assert stands_still(history, batch) is still


@pytest.fixture
def three_of_five(monkeypatch: pytest.MonkeyPatch) -> tuple[Weights, CalibrationSettings]:
    """A calibration of one prompt at a time, whose ranges stand still after three."""
    monkeypatch.setattr(calibration_module, "BATCH_TOKENS", 1)
    monkeypatch.setattr(calibration_module, "GROWTH", 100.0)
    weights = open_checkpoint(SMALL)
    return weights, settings(weights, prompts=5, steps=(1, 2))


def test_prompts_are_left_out_once_the_ranges_stand_still_and_thorough_runs_them(
    three_of_five: tuple[Weights, CalibrationSettings],
) -> None:
    weights, quick = three_of_five
    said: list[str] = []
    found = run_calibration(weights, dataclasses.replace(quick, notify=said.append))
    assert found.prompts == list(PROMPTS[:3]) and found.prompts_left_out == list(PROMPTS[3:5])
    assert said == [
        "the ranges stand still after 3 of 5 prompts; the others were left out. --thorough runs"
        " them all."
    ]
    all_of_them = run_calibration(weights, dataclasses.replace(quick, thorough=True))
    assert all_of_them.prompts == list(PROMPTS[:5]) and all_of_them.prompts_left_out == []
    three = dataclasses.replace(settings(weights, prompts=3, steps=(1, 2)), thorough=True)
    assert amax(found) == pytest.approx(amax(run_calibration(weights, three)), rel=2e-4)


@pytest.mark.parametrize("after", [3, 20, 40, 53])
def test_what_was_interrupted_stops_where_it_would_have(
    three_of_five: tuple[Weights, CalibrationSettings], after: int, tmp_path: Path
) -> None:
    weights, quick = three_of_five
    kept = dataclasses.replace(quick, checkpoint_path=tmp_path / "partial")
    with pytest.raises(KeyboardInterrupt):
        run_calibration(weights, kept, Stopping(after))
    expected = run_calibration(weights, quick)
    assert run_calibration(weights, kept) == expected
    assert run_calibration(weights, kept) == expected  # nothing is left, and nothing is added


def test_unfinished_work_of_a_thorough_calibration_is_not_used(tmp_path: Path) -> None:
    weights, said = open_checkpoint(SMALL), list[str]()
    kept = settings(
        weights, prompts=1, steps=(1,), checkpoint_path=tmp_path / "partial", notify=said.append
    )
    run_calibration(weights, dataclasses.replace(kept, thorough=True))
    run_calibration(weights, kept)
    assert len(said) == 1 and "was not used" in said[0]


def test_the_default_video_is_shorter_for_a_causal_model_and_smaller_for_an_unknown_small_one() -> (
    None
):
    def shape(name: str, **sizes: int) -> tuple[int, ...]:
        a = MODELS[name].architecture
        quick = calibration_shape(a, sizes.get("frames"), sizes.get("height"), None)
        assert calibration_shape(a, None, None, None, True) == latent_shape(a, None, None, None)
        return quick

    assert shape("far-1.3b") == (13, 16, 60, 104)
    assert chunk_plan(MODELS["far-1.3b"].architecture, 13) == (1, 3, 3, 3, 3)
    assert shape("far-tiny", frames=81) == (21, 16, 8, 12)
    assert shape("1.3b") == (21, 16, 60, 104) and shape("tiny") == (5, 16, 8, 12)
    small = open_checkpoint(CAUSAL).architecture
    assert calibration_shape(small, None, None, None) == (12, 4, 16, 28)
    assert calibration_shape(small, 1, 256, 448) == (1, 4, 32, 56)
    assert latent_shape(small, None, None, None) == (12, 4, 60, 104)
    unknown = dataclasses.replace(MODELS["14b"].architecture, num_layers=39)
    assert calibration_shape(unknown, None, None, None) == (21, 16, 60, 104)


def test_files_from_before_say_thorough() -> None:
    weights = open_checkpoint(SMALL)
    found = run_calibration(weights, settings(weights, prompts=1, steps=(1,)))
    old = json.loads(found.model_dump_json(by_alias=True))
    for key in ("thorough", "batch", "chunks", "prompts_left_out"):
        del old[key]
    read = Calibration.model_validate_json(json.dumps(old))
    assert read.thorough and read.batch == 1 and read.tensors == found.tensors


def test_the_flag() -> None:
    words = ["--model", "tiny", "--thorough"]
    assert parse_options(CalibrateOptions, words).thorough
    assert not parse_options(CalibrateOptions, words[:2]).thorough
