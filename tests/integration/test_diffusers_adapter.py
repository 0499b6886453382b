"""Drop-in: diffusers' own AnyFlowPipeline on our engine gives what it gives on its own
transformer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AnyFlowPipeline, DiffusionPipeline

from anyflow_deploy import AnyFlowError, BackendError, Bundle, ShapeError, load_engine
from anyflow_deploy.pipelines.diffusers import EngineTransformer

SIZE: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 5, "output_type": "latent"}


def pipeline(folder: Path) -> AnyFlowPipeline:
    pipe = AnyFlowPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pair(tiny_pipeline: Path, tiny_bundle: Bundle) -> tuple[AnyFlowPipeline, AnyFlowPipeline]:
    """diffusers on its own transformer, and on our engine."""
    theirs = pipeline(tiny_pipeline)
    ours = pipeline(tiny_pipeline)
    ours.transformer = EngineTransformer(load_engine(tiny_bundle))
    return theirs, ours


def both(
    pair: tuple[AnyFlowPipeline, AnyFlowPipeline], **call: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The same call on both, with the same noise."""
    results = [
        pipe(generator=torch.Generator().manual_seed(7), **{**SIZE, **call}).frames for pipe in pair
    ]
    return np.asarray(results[0]), np.asarray(results[1])


def conditioning() -> torch.Tensor:
    return torch.randn(1, 1, 16, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "call",
    [
        {"prompt": "a red fox", "num_inference_steps": 1},
        {"prompt": "a red fox", "num_inference_steps": 4},
        {"prompt": ["a red fox", "rain in the city"], "num_inference_steps": 2},
        {"prompt": "a red fox", "num_inference_steps": 2, "num_videos_per_prompt": 3},
        {"prompt": "a red fox", "sigmas": [1.0, 0.7, 0.2]},
        {"prompt": "a red fox", "timesteps": [1000.0, 400.0]},
        {
            "prompt": "a red fox",
            "num_inference_steps": 2,
            "guidance_scale": 3.0,
            "negative_prompt": "rain",
        },
        {"prompt": "a red fox", "num_inference_steps": 2, "use_mean_velocity": False},
        {"prompt": "a red fox", "num_inference_steps": 2, "max_sequence_length": 64},
        {
            "prompt_embeds": torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(3)),
            "num_inference_steps": 2,
        },
        {"prompt": "a red fox", "num_inference_steps": 2, "latents": torch.ones(1, 16, 2, 4, 6)},
        {"prompt": "a red fox", "num_inference_steps": 2, "num_frames": 1},
    ],
    ids=lambda call: "-".join(k for k in call if k != "prompt"),
)
def test_calls_agree(pair: tuple[AnyFlowPipeline, AnyFlowPipeline], call: dict[str, Any]) -> None:
    theirs, ours = both(pair, **call)
    assert theirs.shape == ours.shape
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_pixels_agree(pair: tuple[AnyFlowPipeline, AnyFlowPipeline]) -> None:
    theirs, ours = both(pair, prompt="a red fox", num_inference_steps=2, output_type="np")
    assert ours.shape == (1, 5, 32, 48, 3)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_conditioning_frames_stand_still(
    pair: tuple[AnyFlowPipeline, AnyFlowPipeline], tiny_pipeline: Path
) -> None:
    """diffusers leaves r above t for given frames; we feed t = r = 0, as the model was trained. The
    others must see them."""
    result = both(pair, prompt="a red fox", num_inference_steps=2, video_latents=conditioning())[1]
    free = both(pair, prompt="a red fox", num_inference_steps=2)[1]
    np.testing.assert_array_equal(result[:, :, :1], conditioning().permute(0, 2, 1, 3, 4))
    assert np.abs(result[:, :, 1:] - free[:, :, 1:]).max() > 1e-3


def test_frames_at_time_zero_are_fed_as_the_model_was_trained(
    pair: tuple[AnyFlowPipeline, AnyFlowPipeline], tiny_pipeline: Path
) -> None:
    """What the adapter makes of diffusers' t = 0, r = 500 is diffusers' own transformer at t = r =
    0."""
    latents = torch.randn(1, 2, 16, 4, 6, generator=torch.Generator().manual_seed(2))
    text = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([[0.0, 900.0]])
    r = torch.tensor([[500.0, 500.0]])
    ours = pair[1].transformer(latents, t, r, text).sample
    with torch.no_grad():
        theirs = pair[0].transformer(latents, t, torch.minimum(t, r), text).sample
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_callbacks_see_and_change_latents(pair: tuple[AnyFlowPipeline, AnyFlowPipeline]) -> None:
    seen: list[tuple[int, float]] = []

    def halve(
        pipe: Any, index: int, timestep: torch.Tensor, values: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        seen.append((index, float(timestep)))
        return {"latents": values["latents"] * 0.5}

    theirs, ours = both(pair, prompt="a red fox", num_inference_steps=2, callback_on_step_end=halve)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert seen == [(0, 1000.0), (1, pytest.approx(833.3333))] * 2


def test_the_pipeline_can_be_moved_and_saved_settings_read(
    pair: tuple[AnyFlowPipeline, AnyFlowPipeline],
) -> None:
    ours = pair[1].to("cpu")
    assert ours.transformer.config.in_channels == 16 and ours.transformer.dtype == torch.float32


def test_velocities_come_back_in_the_callers_type(
    pair: tuple[AnyFlowPipeline, AnyFlowPipeline],
) -> None:
    times = torch.full((1, 2), 500.0)
    output = pair[1].transformer(
        torch.zeros(1, 2, 16, 4, 6, dtype=torch.bfloat16), times, times, torch.zeros(1, 3, 64)
    )
    assert output.sample.dtype == torch.bfloat16 and output.sample.shape == (1, 2, 16, 4, 6)


def test_lora_scales_are_refused(pair: tuple[AnyFlowPipeline, AnyFlowPipeline]) -> None:
    with pytest.raises(AnyFlowError, match="attention_kwargs"):
        both(
            (pair[1], pair[1]),
            prompt="a red fox",
            num_inference_steps=1,
            attention_kwargs={"scale": 0.5},
        )


def test_sizes_outside_the_bundle_are_refused(
    pair: tuple[AnyFlowPipeline, AnyFlowPipeline],
) -> None:
    with pytest.raises(ShapeError, match="frames is 257"):
        both((pair[1], pair[1]), prompt="a red fox", num_inference_steps=1, num_frames=1025)


def test_a_pipeline_with_an_engine_is_saved_and_loaded(
    pair: tuple[AnyFlowPipeline, AnyFlowPipeline], tmp_path: Path
) -> None:
    """As with any model of diffusers: what comes back makes the same video, to the bit."""
    _, ours = pair
    ours.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["transformer"] == ["anyflow_deploy.pipelines.diffusers", "EngineTransformer"]
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.transformer, EngineTransformer)
    call = {"prompt": "a red fox", "num_inference_steps": 2}
    np.testing.assert_array_equal(*both((ours, loaded), **call))


def test_a_saved_engine_is_opened_by_the_backend_that_is_asked_for(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    EngineTransformer(load_engine(tiny_bundle)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "engine.json").read_text())["backend"] == "onnxruntime"
    with pytest.raises(BackendError, match="tensorrt"):
        EngineTransformer.from_pretrained(tmp_path, backend="tensorrt")


def test_a_folder_without_an_engine_is_refused(tmp_path: Path, tiny_pipeline: Path) -> None:
    with pytest.raises(AnyFlowError, match="has no readable engine.json"):
        EngineTransformer.from_pretrained(tiny_pipeline / "transformer")


def test_a_pipeline_may_be_saved_where_it_was_loaded_from(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    EngineTransformer(load_engine(tiny_bundle)).save_pretrained(tmp_path)
    EngineTransformer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    again = EngineTransformer.from_pretrained(tmp_path)
    assert again.engine.bundle.manifest == tiny_bundle.manifest
