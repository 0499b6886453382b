"""Runs: nothing is lost, nothing is written half, and what comes out is AnyFlow in diffusers'
layout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.errors import AnyFlowError, CheckpointError
from anyflow_deploy.training.data.source import Batch, DataShard
from anyflow_deploy.training.data.synthetic import SyntheticLatents
from anyflow_deploy.training.distributed import DistributedContext
from anyflow_deploy.training.model.memory import count_trained_parameters
from anyflow_deploy.training.model.model_factory import build_trained_network, trained_parameters
from anyflow_deploy.training.model.weight_init import open_initial_weights
from anyflow_deploy.training.recipes import Recipe, get_recipe, override_recipe
from anyflow_deploy.training.run_spec import RunSpec
from anyflow_deploy.training.trainer import Trainer, train
from tests.conftest import CAUSAL, SMALL

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "frames": 3,
    "height": 8,
    "width": 8,
    "text_tokens": 4,
    "batch": 4,
    "micro_batch": 2,
    "steps": 4,
    "checkpoint_every": 2,
    "sample_every": 0,
    "ema_start": 1,
    "rollout_steps": "2,4",
}
LORA = {"lora_rank": 4, "lora_alpha": 4}
ALONE = DistributedContext(0, 1, torch.device("cpu"))


def small(name: str = "flow-map-tiny", **values: Any) -> Recipe:
    return override_recipe(get_recipe(name), {**SETTINGS, **values})


def request(output: Path, name: str = "flow-map-tiny", **values: Any) -> RunSpec:
    chosen = small(name, **values)
    causal = chosen.causal
    return RunSpec(
        chosen,
        output,
        CAUSAL if causal else SMALL,
        SMALL if chosen.stage == "on-policy" else None,
        device="cpu",
    )


def losses(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "losses.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(next(folder.rglob("diffusion_pytorch_model.safetensors")))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


RUNS = [
    ("teacher-tiny", {}),
    ("flow-map-tiny", LORA),
    ("on-policy-tiny-causal", {"frames": 10, "batch": 2, **LORA}),
]


@pytest.mark.parametrize(("name", "values"), RUNS)
def test_a_resumed_run_makes_the_same_numbers_bit_for_bit(
    tmp_path: Path, name: str, values: dict[str, Any]
) -> None:
    train(request(tmp_path / "whole", name, **values))
    train(request(tmp_path / "parts", name, **values, steps=2))
    assert len(losses(tmp_path / "parts")) == 2
    train(request(tmp_path / "parts", name, **values))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole = weights_of(tmp_path / "whole" / "model")
    parts = weights_of(tmp_path / "parts" / "model")
    assert all(torch.equal(parts[n], whole[n]) for n in whole)
    before = open_checkpoint(CAUSAL if "causal" in name else SMALL)
    assert any(not torch.equal(whole[n], before.read(n)) for n in whole)


def command(*words: str) -> list[str]:
    settings = [f"--{n.replace('_', '-')}={v}" for n, v in SETTINGS.items()]
    return ["anyflow_deploy.train", *settings, *words]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("asynchronous", [True, False])
def test_kill_9_costs_nothing_but_time(tmp_path: Path, asynchronous: bool) -> None:
    killed = tmp_path / "killed"
    words = command(
        "flow-map-tiny",
        f"--init={SMALL}",
        f"--output={killed}",
        "--steps=100000",
        f"--asynchronous={asynchronous}",
    )
    process = subprocess.Popen(
        [sys.executable, "-m", *words], env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    log = killed / "losses.jsonl"
    deadline = time.monotonic() + 600
    while not (log.exists() and log.read_text().count("\n") >= 5) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = log.read_text().count("\n")
    steps = reached + 2
    train(request(killed, steps=steps))
    train(request(tmp_path / "whole", steps=steps))
    assert losses(killed) == losses(tmp_path / "whole")
    assert [line["step"] for line in losses(killed)] == list(range(1, steps + 1))
    assert not list((killed / "checkpoints").glob(".*"))


def test_one_process_then_two_then_one(tmp_path: Path) -> None:
    """FSDP2 over gloo; LoRA, gradient checkpointing, roll-outs of several chunks, and both scores
    in one network."""
    values = {
        "frames": 10,
        "checkpointing": "true",
        "batch": 2,
        "micro_batch": 1,
        "learning_rate": "1e-4",
    }
    values |= {"checkpoint_every": 1, "rollout_steps": "2", **LORA}
    train(request(tmp_path / "one", "on-policy-tiny-causal", **values, steps=4))
    two = tmp_path / "two"
    train(request(two, "on-policy-tiny-causal", **values, steps=1))
    flags = [
        f"--{n.replace('_', '-')}={v}"
        for n, v in {**SETTINGS, **values, "steps": 3, "asynchronous": True}.items()
    ]
    words = [
        "on-policy-tiny-causal",
        f"--init={CAUSAL}",
        f"--teacher={SMALL}",
        f"--output={two}",
        "--device=cpu",
        *flags,
    ]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "anyflow_deploy.train",
    ]
    done = subprocess.run(
        [*launcher, *words],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    assert "on 2 x cpu" in done.stderr
    assert len(list((two / "checkpoints" / "step-00000003").glob("*.safetensors"))) == 2, (
        "a file of each process"
    )
    train(request(two, "on-policy-tiny-causal", **values, steps=4))
    for ours, theirs in zip(losses(two), losses(tmp_path / "one"), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=2e-5), (key, theirs["step"])
    one = weights_of(tmp_path / "one" / "model")
    assert (
        max(distance(value, one[name]) for name, value in weights_of(two / "model").items()) < 1e-5
    )


@pytest.mark.parametrize("name", ["flow-map-tiny", "on-policy-tiny"])
def test_accumulation_changes_nothing(tmp_path: Path, name: str) -> None:
    """The r = t mean that other samples are scaled to is the global batch's, however it is cut."""
    train(request(tmp_path / "one", name, steps=2, micro_batch=4))
    train(request(tmp_path / "four", name, steps=2, micro_batch=1))
    for ours, theirs in zip(losses(tmp_path / "four"), losses(tmp_path / "one"), strict=True):
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-4), key


def test_a_checkpoint_holds_no_pickle_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    train(request(tmp_path, steps=8, keep=2))
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["step-00000006", "step-00000008"]
    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    stored = json.loads((tmp_path / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert stored["recipe"]["optimizing"]["learning_rate"] == 1e-3 and stored["data"] == {
        "samples": 32
    }


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    train(request(tmp_path))
    file = next((tmp_path / "checkpoints" / "step-00000004").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(
        CheckpointError,
        match=r"step-00000004 cannot be read .* remove it to resume from the one before",
    ):
        train(request(tmp_path))


def test_a_run_does_not_go_on_with_other_settings_or_weights(tmp_path: Path) -> None:
    train(request(tmp_path, steps=2))
    with pytest.raises(CheckpointError, match=r"--guidance 3.0 in it, 2.0 now"):
        train(request(tmp_path, guidance=2.0))
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((SMALL / "config.json").read_text())
    tensors = weights_of(SMALL)
    tensors["proj_out.weight"] *= 1.01
    save_file(tensors, other / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="started from other weights"):
        train(RunSpec(small(), tmp_path, other))


def test_a_run_goes_on_with_another_rate_and_records_it(tmp_path: Path) -> None:
    """What the message about a broken loss advises is possible."""
    train(request(tmp_path, steps=2))
    run = Trainer(request(tmp_path, steps=3, learning_rate=1e-9, clip=0.5, ema=0.0), ALONE)
    parameters = run.stage.optimizer_states["model"].parameters
    before = {name: value.detach().clone() for name, value in parameters.items()}
    run.run()
    assert [json.loads(line) for line in (tmp_path / "changes.jsonl").open()] == [
        {
            "step": 2,
            "changes": {
                "steps": [2, 3],
                "learning_rate": [0.001, 1e-9],
                "clip": [1.0, 0.5],
                "ema": [0.99, 0.0],
            },
        }
    ]
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["optimizing"]["learning_rate"] == 1e-9
    moved = max(float((parameters[name] - before[name]).abs().max()) for name in before)
    assert 0 < moved < 1e-8, "the new rate counts"


def poisoned(latents: Callable[[Tensor], Tensor], step: int) -> Callable[..., Any]:
    class Poisoned(SyntheticLatents):
        def __iter__(self) -> Iterator[Batch]:
            for number, batch in enumerate(super().__iter__()):
                bad = number // 2 == step  # two micro-batches a step
                yield Batch(
                    latents(batch.latents) if bad else batch.latents,
                    batch.text,
                    batch.negative_text,
                    batch.names,
                )

    return lambda data, r, w, part: Poisoned(
        part, (r.frames, w.architecture.in_channels, r.height, r.width), (4, 32)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * float("nan"), "loss, model_gradient not finite"),
        (lambda x: x * 100, "on average"),
    ],
)
def test_a_broken_loss_stops_the_run_before_the_update(
    tmp_path: Path,
    change: Callable[[Tensor], Tensor],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = request(tmp_path, steps=6)
    run = Trainer(given, ALONE, poisoned(change, 3))
    before: dict[str, Tensor] = {}
    original = run._check_loss

    def spy(*args: Any) -> None:
        before.update(
            {
                n: p.detach().clone()
                for n, p in run.stage.optimizer_states["model"].parameters.items()
            }
        )
        original(*args)

    monkeypatch.setattr(run, "_check_loss", spy)
    with pytest.raises(AnyFlowError, match=message) as caught:
        run.run()
    assert "step 3" in str(caught.value) and "synthetic-12" in str(caught.value)
    assert all(
        torch.equal(p, before[n]) for n, p in run.stage.optimizer_states["model"].parameters.items()
    )
    (saved,) = (tmp_path / "failed").glob("*.safetensors")
    assert set(load_file(saved)) == {"latents.0", "latents.1", "text.0", "text.1"}
    assert run.checkpoints.latest() == tmp_path / "checkpoints" / "step-00000002"
    assert not (tmp_path / "model").exists()


def test_sigterm_saves_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Trainer(request(tmp_path, steps=50), ALONE)
    original = run._train_step
    monkeypatch.setattr(
        run,
        "_train_step",
        lambda b: (os.kill(os.getpid(), signal.SIGTERM) if run.step == 2 else None, original(b))[1],
    )
    with pytest.raises(AnyFlowError, match=r"stopped at step 3 on request"):
        run.run()
    assert run.checkpoints.latest() == tmp_path / "checkpoints" / "step-00000003"


@pytest.mark.parametrize("alpha", [None, 1, 8])
def test_lora_is_diffusers_lora_and_the_model_is_diffusers_model(
    tmp_path: Path, alpha: int | None
) -> None:
    """Fault 4: no dropout; the second time embedder is trained, and saved."""
    from diffusers import AnyFlowTransformer3DModel

    settings = {"lora_rank": 4} if alpha is None else {"lora_rank": 4, "lora_alpha": alpha}
    run = Trainer(request(tmp_path, **settings, learning_rate=0.05), ALONE)
    network = run.stage.optimizer_states["model"].network
    assert not [m for m in network.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    run.run()
    with run.stage.optimizer_states["model"].use_average(), torch.no_grad():
        case = load_file(SMALL / "golden.safetensors")
        given = [case[n] for n in ("latents", "timestep", "r_timestep", "text")]
        ours = network(*given)
        base = AnyFlowTransformer3DModel.from_pretrained(SMALL)
        assert distance(base(*given, return_dict=False)[0], ours) > 1e-2, "it learned nothing"
        merged = AnyFlowTransformer3DModel.from_pretrained(tmp_path / "model")
        assert distance(merged(*given, return_dict=False)[0], ours) < 1e-5
        adapters = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
        base.load_lora_adapter(adapters, prefix="transformer")
        assert distance(base(*given, return_dict=False)[0], ours) < 1e-5
    delta = "condition_embedder.delta_embedder.linear_1.weight"
    assert distance(weights_of(tmp_path / "model")[delta], weights_of(SMALL)[delta]) > 1e-4
    assert f"transformer.{delta.removesuffix('.weight')}.lora_B.weight" in adapters
    assert open_checkpoint(tmp_path / "model").shapes() == open_checkpoint(SMALL).shapes()


def test_a_pipeline_comes_out_where_a_pipeline_went_in(tmp_path: Path, tiny_pipeline: Path) -> None:
    from diffusers import AnyFlowFARPipeline, AnyFlowPipeline

    sizes = {
        **SETTINGS,
        "steps": 1,
        "sample_every": 1,
        "frames": 3,
        "width": 12,
        "sample_steps": "1,2",
    }
    train(
        RunSpec(
            override_recipe(get_recipe("flow-map-tiny"), sizes),
            tmp_path / "run",
            tiny_pipeline,
            device="cpu",
        )
    )
    pipe = AnyFlowPipeline.from_pretrained(tmp_path / "run" / "model")
    made = pipe(
        "a red fox", num_inference_steps=2, height=64, width=96, num_frames=5, output_type="latent"
    )
    assert torch.isfinite(torch.as_tensor(made.frames)).all()
    assert (tmp_path / "run" / "samples" / "step-00000001.png").stat().st_size > 5000
    causal = override_recipe(get_recipe("flow-map-tiny-causal"), sizes)
    train(RunSpec(causal, tmp_path / "causal", tmp_path / "run" / "model", device="cpu"))
    assert (
        AnyFlowFARPipeline.from_pretrained(tmp_path / "causal" / "model").scheduler.config.shift
        == 5
    )


def test_wan_is_completed_so_that_it_is_still_wan(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    wan = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        ffn_dim=64,
        text_dim=32,
        freq_dim=32,
        in_channels=4,
        out_channels=4,
    )
    wan.save_pretrained(tmp_path)
    row = get_recipe("teacher-tiny-causal").architecture
    weights = open_initial_weights(tmp_path, False, row)
    from anyflow_deploy.training.model.weight_init import build_network

    network = build_network(
        weights.architecture, {name: weights.read(name) for name in weights.shapes()}
    )
    case = load_file(SMALL / "golden.safetensors")
    z = case["latents"]
    text = case["text"]
    t = torch.tensor([700.0, 40.0])
    times = t[:, None].expand(-1, 3)
    with torch.no_grad():
        theirs = wan(z.transpose(1, 2), t, text, return_dict=False)[0].transpose(1, 2)
        assert distance(network(z, times, times, text), theirs) < 1e-5
    causal = open_initial_weights(tmp_path, True, row)
    far = causal.read("far_patch_embedding.weight")
    near = causal.read("patch_embedding.weight")
    patch = torch.randn(1, 4, 1, 4, 4)
    coarse = torch.nn.functional.conv3d(patch, far)
    fine = torch.nn.functional.conv3d(patch, near, stride=(1, 2, 2)).mean((3, 4), keepdim=True)
    assert torch.allclose(coarse, fine, atol=1e-5)
    with pytest.raises(
        CheckpointError, match="is a causal model and the recipe trains a bidirectional one"
    ):
        open_initial_weights(CAUSAL, False, row)


def test_the_order_of_samples_is_the_same_on_any_number_of_processes() -> None:
    def names(world: int, batch: int, steps: int, position: int = 0) -> list[str]:
        sources = [
            SyntheticLatents(DataShard(rank, world, batch), (1, 2, 4, 4), (2, 3))
            for rank in range(world)
        ]
        for source in sources:
            source.load_state_dict({"samples": position})
        streams = [iter(source) for source in sources]
        found = [name for _ in range(steps) for stream in streams for name in next(stream).names]
        assert {source.state_dict()["samples"] for source in sources} == {
            position + world * batch * steps
        }
        return found

    assert (
        names(1, 4, 2) == names(2, 2, 2) == names(4, 1, 2) == [f"synthetic-{i}" for i in range(8)]
    )
    assert names(2, 1, 2, 4) == names(1, 4, 2)[4:]


@pytest.mark.parametrize("values", [{}, LORA])
@pytest.mark.parametrize("name", ["flow-map-tiny", "flow-map-tiny-causal", "teacher-tiny"])
def test_the_memory_estimate_counts_what_is_trained(name: str, values: dict[str, Any]) -> None:
    chosen = small(name, **values)
    network = build_trained_network(
        RandomWeights(chosen.architecture, "tiny"), chosen, torch.device("cpu"), None
    )
    found = sum(p.numel() for p in trained_parameters(network).values())
    assert count_trained_parameters(chosen, chosen.architecture) == found
