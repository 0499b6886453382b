"""Training the `shapes` models: its own loop, and every stage once with a few steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.models import MODELS
from anyflow_deploy.progress import NullProgress
from anyflow_deploy.training.config import OptimizerConfig
from anyflow_deploy.training.model.network import merge_padding
from anyflow_deploy.training.model.weight_init import build_network
from anyflow_deploy.training.optimizer import learning_rate
from anyflow_deploy.training.shapes.module_trainer import ModuleRun, train_module
from anyflow_deploy.training.shapes.packing import DIGESTS, find_changed_files, pack_pipeline
from anyflow_deploy.training.shapes.scenes import make_scene
from anyflow_deploy.training.shapes.stages import ShapesJob, stages
from anyflow_deploy.training.shapes.text_encoder import (
    QUESTIONS,
    CaptionReader,
    answer,
    build_caption_tokenizer,
    build_text_encoder,
    measure_text_encoder,
    train_text_encoder,
)
from anyflow_deploy.training.timestep_sampling import seeded_normal

SETTINGS = {
    "steps": "2",
    "batch": "2",
    "micro_batch": "2",
    "sample_every": "0",
    "rollout_steps": "1,2",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage, with too few steps to learn anything."""
    folder = tmp_path_factory.mktemp("shapes")
    job = ShapesJob(
        folder,
        scenes=10,
        shard_scenes=10,
        text_encoder_steps=2,
        vae_steps=4,
        decoder_steps=1,
        statistics_scenes=8,
        device="cpu",
        settings=SETTINGS,
    )
    for stage in stages(job).values():
        stage(NullProgress())
    return folder


@pytest.mark.parametrize("name", ["shapes", "far-shapes"])
def test_a_packed_pipeline_is_one_of_diffusers_in_16_bits_and_under_10_mb(
    trained: Path, name: str
) -> None:
    import diffusers

    folder = trained / name
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    expected = "AnyFlowFARPipeline" if name == "far-shapes" else "AnyFlowPipeline"
    assert type(pipeline).__name__ == expected
    assert pipeline.scheduler.config.shift == MODELS[name].shift
    weights = sorted(folder.rglob("*.safetensors"))
    assert [path.parent.name for path in weights] == ["text_encoder", "transformer", "vae"]
    for path in weights:
        kinds = {tensor.dtype for tensor in safetensors.torch.load_file(path).values()}
        assert kinds == {torch.float16}, path
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 10e6


def test_every_stage_starts_from_the_one_before(trained: Path) -> None:
    for stage, init in (("teacher", "base"), ("flow-map", "teacher"), ("on-policy", "flow-map")):
        folder = trained / stage
        recipe = json.loads((folder / "recipe.json").read_text())
        assert (recipe["model"], recipe["frames"], recipe["text_tokens"]) == ("shapes", 5, 512)
        start = trained / init / ("." if init == "base" else "model") / "transformer"
        before, after = (
            safetensors.torch.load_file(next(path.glob("*.safetensors")))
            for path in (start, folder / "model" / "transformer")
        )
        assert before.keys() == after.keys()
        assert not torch.equal(before["proj_out.bias"], after["proj_out.bias"])


def test_a_finished_stage_is_not_run_again(trained: Path) -> None:
    before = (trained / "teacher" / "losses.jsonl").stat().st_mtime_ns
    job = ShapesJob(trained, 0, 10, 10, settings=SETTINGS)
    for stage in stages(job).values():
        stage(NullProgress())
    assert (trained / "teacher" / "losses.jsonl").stat().st_mtime_ns == before


def test_latents_have_the_statistics_of_the_config(trained: Path) -> None:
    config = json.loads((trained / "base" / "vae" / "config.json").read_text())
    assert len(config["latents_mean"]) == len(config["latents_std"]) == 16
    assert min(config["latents_std"]) > 0


def test_a_changed_file_of_a_packed_pipeline_is_named(trained: Path, tmp_path: Path) -> None:
    pack_pipeline(trained / "base", tmp_path / "packed")
    assert find_changed_files(tmp_path / "packed") == []
    with (tmp_path / "packed" / "vae" / "config.json").open("a") as file:
        file.write(" ")
    (tmp_path / "packed" / "model_index.json").unlink()
    assert sorted(find_changed_files(tmp_path / "packed")) == [
        "model_index.json",
        "vae/config.json",
    ]
    assert (tmp_path / "packed" / DIGESTS).is_file()


def test_a_weight_beyond_float16_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    safetensors.torch.save_file({"large": torch.tensor([1e6])}, tmp_path / "in/a.safetensors")
    with pytest.raises(AnyFlowError, match="large has numbers beyond float16"):
        pack_pipeline(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.unused = torch.nn.Parameter(torch.ones(2))

    def loss(self, step: int) -> torch.Tensor:
        return (self.weight * seeded_normal((3,), 0, "line", step) - 1).square().sum()


def test_a_stopped_module_resumes_with_the_same_numbers(tmp_path: Path) -> None:
    def run(file: str, stop_at: int | None) -> torch.Tensor:
        line = Line()

        def loss_of_step(step: int) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            return line.loss(step)

        settings = ModuleRun("line", 30, 0.1, tmp_path / file, checkpoint_every=10)
        train_module(line, settings, loss_of_step, NullProgress())
        return line.weight.detach()

    whole = run("whole", None)
    with pytest.raises(KeyboardInterrupt):
        run("parts", 17)
    assert torch.equal(run("parts", None), whole)


def test_a_module_does_not_resume_from_another_run(tmp_path: Path) -> None:
    line = Line()
    run = ModuleRun("line", 10, 0.1, tmp_path / "line", checkpoint_every=10)
    train_module(line, run, line.loss, NullProgress())
    longer = ModuleRun("line", 20, 0.1, tmp_path / "line")
    with pytest.raises(AnyFlowError, match="belongs to another run"):
        train_module(Line(), longer, line.loss, NullProgress())


def test_a_loss_that_is_not_finite_stops_a_module(tmp_path: Path) -> None:
    line = Line()
    run = ModuleRun("line", 10, 0.1, tmp_path / "line")
    with pytest.raises(AnyFlowError, match="line: the loss of step 0 is nan"):
        train_module(line, run, lambda _: line.weight.sum() * torch.nan, NullProgress())


def test_a_text_encoder_learns_what_captions_say(tmp_path: Path) -> None:
    """A few steps teach it much more than chance, on captions that it never saw."""
    tokenizer = build_caption_tokenizer()
    encoder = build_text_encoder(len(tokenizer), 0)
    reader = CaptionReader(encoder, tokenizer, 0)
    assert measure_text_encoder(reader, 0, 64) == 0
    train_text_encoder(reader, tmp_path, 0, 300, NullProgress())
    assert measure_text_encoder(reader, 0, 64) > 0.3


def test_the_tokenizer_has_a_token_for_every_word_of_a_caption() -> None:
    tokenizer = build_caption_tokenizer()
    for index in range(50):
        caption = make_scene(0, index).caption
        words = caption.replace(",", " ,").split()
        assert len(tokenizer(caption).input_ids) == len(words) + 1


def test_every_answer_is_one_that_can_be_given() -> None:
    for index in range(100):
        for question, right in answer(make_scene(0, index)).items():
            assert right in QUESTIONS[question]


def test_one_zero_row_stands_for_all_of_them() -> None:
    a = MODELS["tiny"].architecture
    with torch.random.fork_rng():
        torch.manual_seed(0)
        from anyflow_deploy.checkpoints.random_weights import RandomWeights

        weights = RandomWeights(a, "tiny")
        network = build_network(a, {name: weights.read(name) for name in weights.shapes()})
        text = torch.zeros(2, 100, a.text_dim)
        text[0, :3], text[1, :7] = torch.randn(3, a.text_dim), torch.randn(7, a.text_dim)
        latents, times = torch.randn(2, 2, 16, 4, 4), torch.full((2, 2), 500.0)
    with torch.no_grad():
        whole = network(latents, times, times, text)
        network.merges_padding = True
        merged = network(latents, times, times, text)
    np.testing.assert_allclose(merged, whole, rtol=0, atol=1e-5)
    kept, bias = merge_padding(text)
    assert kept.shape == (2, 8, a.text_dim)
    assert bias is not None
    np.testing.assert_allclose(bias.exp(), [1] * 7 + [93], rtol=1e-6)
    assert merge_padding(text[:, :8])[1] is None


def test_the_learning_rate_rises_and_falls() -> None:
    config = OptimizerConfig(steps=100, batch=1, learning_rate=1.0, warm_up=10, final_rate=0.1)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=1e-3)
    assert max(rates) == rates[9]
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, rel=0.01)
    constant = OptimizerConfig(steps=100, batch=1, learning_rate=1.0)
    assert {learning_rate(constant, step) for step in range(100)} == {1.0}


def test_an_unknown_stage_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "anyflow_deploy.shapes", str(tmp_path / "runs"), "--until", "base2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "--until is 'base2'; allowed are base, latents, teacher" in result.stderr
    assert not (tmp_path / "runs").exists()
