"""Losses, their gradients and the roll-out, against what the authors' own code computed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.training.chunks import ChunkPlan, chunk_plan, encode_context
from anyflow_deploy.training.losses import (
    DerivativeConfig,
    NoisePair,
    Score,
    add_noise,
    derivative,
    dmd_gradient,
    flow_map_losses,
    rescale_losses,
)
from anyflow_deploy.training.model.network import TrainingTransformer
from anyflow_deploy.training.model.weight_init import build_network
from anyflow_deploy.training.rollout import rollout, shortcut
from anyflow_deploy.training.timestep_sampling import shift_times

FOLDER = Path(os.environ.get("ANYFLOW_GOLDEN", Path(__file__).parents[1] / "golden"))
LIMIT = 1e-4
"""Relative, float32; 1e-6 to 3e-6 was measured."""

GUIDANCE, SHIFT = 3.0, 5.0


def network(kind: str, tensors: dict[str, Tensor] | None = None) -> TrainingTransformer:
    weights = open_checkpoint(FOLDER / kind)
    return build_network(
        weights.architecture, tensors or {name: weights.read(name) for name in weights.shapes()}
    )


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.double()).norm() / b.double().norm())


def frames_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def flow_map(
    kind: str,
    case: dict[str, Tensor],
    plan: ChunkPlan,
    noise: Tensor,
    difference: DerivativeConfig,
    checkpointing: bool = False,
) -> tuple[Tensor, TrainingTransformer]:
    model = network(kind)
    model.set_gradient_checkpointing(checkpointing)
    diffusion = case["is_diffusion"].bool()
    t, r = (1000 * shift_times(case[name], SHIFT) for name in ("t_unshifted", "r_unshifted"))
    negative = case["negative_text"].expand_as(case["text"])
    pair = NoisePair(
        frames_first(case["clean_bcthw"])[:, : plan.frames], noise, case["text"], negative
    )
    losses = flow_map_losses(model, pair, t, r, plan, GUIDANCE, SHIFT, difference)
    loss = rescale_losses(losses, diffusion, losses.detach()[diffusion].mean()).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss, model


def test_flow_map_bidirectional() -> None:
    case = load_file(FOLDER / "training_flow_map_bidirectional.safetensors")
    frames = case["clean_bcthw"].shape[2]
    loss, model = flow_map(
        "bidirectional", case, ChunkPlan((frames,)), case["noise_btchw"], DerivativeConfig()
    )
    assert abs(loss.item() / float(case["loss"]) - 1) < LIMIT
    gradients = {name[5:]: value for name, value in case.items() if name.startswith("grad.")}
    assert len(gradients) >= 4
    for name, value in gradients.items():
        assert distance(model.get_parameter(name).grad, value) < LIMIT, name  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["bidirectional", "causal"])
def test_jvp_is_the_limit_of_the_central_difference(kind: str) -> None:
    """Over a narrow interval: in 10 timesteps the fastest time frequency turns by more than a
    circle, on random networks too."""
    case = load_file(FOLDER / f"training_flow_map_{kind}.safetensors")
    model = network(kind)
    chunks = (case["clean_bcthw"].shape[2],) if kind == "bidirectional" else (1, 3, 3)
    plan = ChunkPlan(chunks, len(chunks))
    x = frames_first(case["clean_bcthw"])[:2, : plan.frames]
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([600.0, 250.0])
    r = torch.tensor([400.0, 0.0])
    text = case["text"][:2]
    with torch.no_grad():
        seen = encode_context(model, x, text, plan)
    exact = derivative(model, x, v, t, r, text, plan, seen, DerivativeConfig("jvp"))
    assert (
        distance(
            derivative(model, x, v, t, r, text, plan, seen, DerivativeConfig("central", 0.05)),
            exact,
        )
        < 2e-3
    )
    assert (
        distance(
            derivative(model, x, v, t, r, text, plan, seen, DerivativeConfig("central", 5.0)), exact
        )
        > 2e-2
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("context", ["short", "long"])
def test_flow_map_causal(context: str, checkpointing: bool) -> None:
    case = load_file(FOLDER / "training_flow_map_causal.safetensors")
    lengths = sorted(int(name.split(".")[1]) for name in case if name.startswith("loss."))
    chunks = lengths[0] if context == "short" else lengths[-1]
    plan = chunk_plan(
        open_checkpoint(FOLDER / "causal").architecture, case["clean_bcthw"].shape[2]
    ).head(chunks)
    loss, model = flow_map(
        "causal", case, plan, case[f"noise_btchw.{chunks}"], DerivativeConfig(), checkpointing
    )
    assert abs(loss.item() / float(case[f"loss.{chunks}"]) - 1) < LIMIT
    prefix = f"grad.{chunks}."
    gradients = {
        name[len(prefix) :]: value for name, value in case.items() if name.startswith(prefix)
    }
    assert len(gradients) >= 4
    assert ("far_patch_embedding.weight" in gradients) == (context == "long")
    for name, value in gradients.items():
        assert distance(model.get_parameter(name).grad, value) < LIMIT, name  # type: ignore[arg-type]


def test_dmd_gradient() -> None:
    case = load_file(FOLDER / "training_dmd.safetensors")
    fake = {name[11:]: value for name, value in case.items() if name.startswith("fake_score.")}
    plan = ChunkPlan((case["pred_btchw"].shape[1],))
    scores = (Score(network("bidirectional"), plan), Score(network("bidirectional", fake), plan))
    x = case["pred_btchw"]
    noise = case["noise_btchw"]
    t = case["timesteps"]
    assert distance(add_noise(x, noise, t), case["noisy_btchw"]) < 1e-6
    pair = NoisePair(x, noise, case["text"], case["negative_text"].expand_as(case["text"]))
    assert distance(dmd_gradient(*scores, x, noise, t, pair, GUIDANCE), case["kl_grad"]) < LIMIT


def rollouts() -> list[tuple[int, int]]:
    names = load_file(FOLDER / "causal" / "golden.safetensors")
    return [
        (int(n.split("_")[2]), int(n.split("_")[3]))
        for n in sorted(names)
        if n.startswith("shortcut_")
    ]


@pytest.mark.parametrize(("steps", "index"), rollouts())
@torch.no_grad()
def test_rollout(steps: int, index: int) -> None:
    case = load_file(FOLDER / "causal" / "golden.safetensors")
    model = network("causal")
    noise = frames_first(case["latents_bcthw"])
    plan = chunk_plan(model.architecture, noise.shape[1])
    made = rollout(model, noise, case["text"], plan, shortcut(steps, index, SHIFT))
    assert distance(made.transpose(1, 2), case[f"shortcut_bcthw_{steps}_{index}"]) < 1e-5


@torch.no_grad()
def test_rollout_of_every_step_is_a_sample() -> None:
    from anyflow_deploy.schedule import Schedule

    for kind, layout in (("causal", "_bcthw"), ("bidirectional", "")):
        case = load_file(FOLDER / kind / "golden.safetensors")
        model = network(kind)
        noise = case[f"latents{layout}"]
        noise = frames_first(noise) if layout else noise
        plan = chunk_plan(model.architecture, noise.shape[1])
        made = rollout(
            model, noise, case["text"], plan, list(Schedule.uniform(4, SHIFT).transitions)
        )
        made = made.transpose(1, 2) if layout else made
        assert distance(made, case[f"sample{layout}_4"]) < 1e-5
