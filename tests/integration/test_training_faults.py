"""The seven faults found in the reference and its ports (see docs/how-to/training.md), each held
off by a test."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.training import rollout as rollouts
from anyflow_deploy.training.chunks import (
    EMPTY_CONTEXT,
    ChunkPlan,
    chunk_plan,
    encode_context,
    velocity,
)
from anyflow_deploy.training.losses import DerivativeConfig, derivative, rescale_losses
from anyflow_deploy.training.model.network import TrainingAttention, TrainingTransformer
from anyflow_deploy.training.model.weight_init import build_network
from anyflow_deploy.training.rollout import rollout, shortcut
from anyflow_deploy.training.timestep_sampling import sample_flow_map_times
from tests.conftest import CAUSAL, SMALL


def network(folder: Path, compute_type: torch.dtype = torch.float32) -> TrainingTransformer:
    weights = open_checkpoint(folder)
    return build_network(
        weights.architecture, {name: weights.read(name) for name in weights.shapes()}, compute_type
    )


@pytest.fixture(scope="module")
def causal() -> tuple[TrainingTransformer, Tensor, Tensor, ChunkPlan]:
    case = load_file(CAUSAL / "golden.safetensors")
    model = network(CAUSAL)
    noise = case["latents_bcthw"].transpose(1, 2)[..., :8, :8].contiguous()
    return model, noise, case["text"], chunk_plan(model.architecture, noise.shape[1])


def gradients(model: TrainingTransformer, loss: Tensor, keep: bool = False) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward(retain_graph=keep)  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def farthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys() and a
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-6)) for n in a)


def test_1_gradients_of_every_chunk_are_those_without_checkpointing(
    causal: tuple[TrainingTransformer, Tensor, Tensor, ChunkPlan],
) -> None:
    """A cache that is written in place has changed by the time a middle chunk is computed again."""
    model, noise, text, plan = causal
    found = []
    for on, offload in ((False, False), (True, False), (True, True)):
        model.set_gradient_checkpointing(on, offload)
        made = rollout(model, noise, text, plan, shortcut(4, 1, 5.0))
        losses = [
            made[:, a:b].square().mean() for a, b in map(plan.frame_range, range(len(plan.chunks)))
        ]
        found.append([gradients(model, loss, keep=True) for loss in losses])
    model.set_gradient_checkpointing(False)
    for plain, again, offloaded in zip(*found, strict=True):
        assert farthest(again, plain) < 1e-5
        assert farthest(offloaded, plain) < 1e-5


def test_2_times_and_differences_stay_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 steps by 4 above 512: t + 5 and t - 5 would be 8 apart."""
    model = network(SMALL, torch.bfloat16)
    case = load_file(SMALL / "golden.safetensors")
    asked: list[tuple[Tensor, Tensor]] = []
    original = TrainingTransformer.embed_conditions
    # The place where times enter the network
    monkeypatch.setattr(
        TrainingTransformer,
        "embed_conditions",
        lambda self, t, r: (asked.append((t, r)), original(self, t, r))[1],
    )
    embedded: list[torch.dtype] = []
    model.condition_embedder.time_embedder.linear_1.register_forward_hook(
        lambda _m, x, y: embedded.extend((x[0].dtype, y.dtype))
    )
    z = case["latents"]
    text = case["text"]
    t = torch.tensor([777.0, 513.0])
    for compute in (torch.bfloat16, torch.float32):
        result = derivative(
            model,
            z,
            z.flip(0),
            t,
            t - 300,
            text,
            ChunkPlan((3,)),
            EMPTY_CONTEXT,
            DerivativeConfig(compute=compute),
        )
        assert result.dtype == torch.float32
        times, targets = asked.pop()
        assert times.dtype == targets.dtype == torch.float32
        assert torch.equal(times[:2] - times[2:], torch.full((2, 3), 10.0))
    assert set(embedded) == {torch.float32}
    assert model.blocks[0].attn1.to_q.compute_type == torch.bfloat16  # type: ignore[union-attr]  # as before


def test_2_float32_products_make_the_difference_exact_in_a_bfloat16_run() -> None:
    """Divided by 0.01, the rounding of bfloat16 products is a hundred times itself."""
    case = load_file(SMALL / "golden.safetensors")
    z = case["latents"]
    text = case["text"]
    t = torch.tensor([777.0, 513.0])

    def change(model: TrainingTransformer, compute: torch.dtype) -> Tensor:
        return derivative(
            model,
            z,
            z.flip(0),
            t,
            t - 300,
            text,
            ChunkPlan((3,)),
            EMPTY_CONTEXT,
            DerivativeConfig(compute=compute),
        )

    exact = change(network(SMALL), torch.float32)
    near = change(network(SMALL, torch.bfloat16), torch.float32)
    far = change(network(SMALL, torch.bfloat16), torch.bfloat16)
    assert float((near - exact).norm() / exact.norm()) < 1e-4
    assert float((far - exact).norm() / exact.norm()) > 2e-3


def test_3_a_batch_without_r_equal_t_is_not_divided_by_its_empty_mean() -> None:
    losses = torch.tensor([2.0, 0.5], requires_grad=True)
    none = torch.zeros(2, dtype=torch.bool)
    assert torch.equal(rescale_losses(losses, none, torch.tensor(float("nan"))), losses)
    scaled = rescale_losses(losses, none, torch.tensor(3.0))
    assert torch.equal(scaled, torch.tensor([3.0, 3.0]))
    scaled.sum().backward()
    assert torch.allclose(losses.grad, torch.tensor([1.5, 6.0]))  # type: ignore[arg-type]  # scaled, not replaced
    assert rescale_losses(torch.zeros(1), none[:1], torch.tensor(3.0)).isfinite().all()


@pytest.mark.parametrize("count", [1, 2, 3, 32])
def test_3_the_buckets_have_their_shares_for_any_global_batch(count: int) -> None:
    same = clean = total = 0
    for step in range(200):
        t, r = sample_flow_map_times(count, 5.0, 0, step)
        assert bool((t >= r).all() and (r >= 0).all() and (t <= 1000).all())
        diffusion = t == r
        assert not bool((diffusion[1:] & ~diffusion[:-1]).any()), (
            "r = t first: the others are scaled to their mean"
        )
        same = same + int(diffusion.sum())
        clean = clean + int(((r == 0) & ~diffusion).sum())
        total = total + count
        if count == 32:
            assert (int(diffusion.sum()), int((r == 0).sum())) == (16, 8)
    assert abs(same / total - 0.5) < 0.07 and abs(clean / total - 0.25) < 0.07


@pytest.mark.parametrize(("steps", "index"), [(1, 0), (2, 1), (50, 0), (50, 17), (50, 49)])
def test_5_a_rollout_of_any_length_ends_clean_in_three_transitions(steps: int, index: int) -> None:
    """A port stops at the gradient step and hands on what is still noisy."""
    pairs = shortcut(steps, index, 5.0)
    assert len(pairs) <= 3
    assert pairs[0][0] == 1000 and pairs[-1][1] == 0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(pairs))


def test_5_gradient_flows_through_all_three_transitions(
    causal: tuple[TrainingTransformer, Tensor, Tensor, ChunkPlan],
) -> None:
    model, noise, text, _ = causal
    taken: list[Tensor] = []
    hook = model.register_forward_hook(lambda _m, _i, u: (u.retain_grad(), taken.append(u))[0])
    rollout(
        model, noise[:, :1], text, ChunkPlan((1,), 3), shortcut(8, 3, 5.0)
    ).square().mean().backward()  # type: ignore[no-untyped-call]
    hook.remove()
    assert len(taken) == 3
    assert all(u.grad is not None and bool(u.grad.abs().sum() > 0) for u in taken)


def test_6_every_chunk_walks_the_same_times(
    causal: tuple[TrainingTransformer, Tensor, Tensor, ChunkPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schedule that is shifted inside the loop over chunks is shifted again for each."""
    model, noise, text, plan = causal
    walked: list[tuple[float, float]] = []
    original = rollouts._denoise_chunk

    def spy(*given: object) -> Tensor:
        hook = model.register_forward_pre_hook(
            lambda _m, x: walked.append((float(x[1][0, 0]), float(x[2][0, 0])))
        )
        made = original(*given)  # type: ignore[arg-type]
        hook.remove()
        return made

    monkeypatch.setattr(rollouts, "_denoise_chunk", spy)
    pairs = shortcut(4, 1, 5.0)
    with torch.no_grad():
        rollout(model, noise, text, plan, pairs)
    rounded = [(round(t, 3), round(r, 3)) for t, r in walked]
    assert rounded == [(round(t, 3), round(r, 3)) for t, r in pairs] * len(plan.chunks)


def test_7_causal_attention_has_a_backward_on_the_cpu_and_is_the_masked_one(
    causal: tuple[TrainingTransformer, Tensor, Tensor, ChunkPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """flex_attention has none; runs of queries on their own keys have, and compute what a dense
    mask does."""
    model, x, text, whole = causal
    plan = whole.head(4)
    start, stop = plan.window
    t = torch.tensor([700.0])

    def found() -> dict[str, Tensor]:
        u = velocity(
            model, x[:, start:stop], t, 0 * t, text, plan, encode_context(model, x, text, plan)
        )
        return gradients(model, u.square().mean())

    in_runs = found()
    original = TrainingAttention.forward

    def masked(
        self: TrainingAttention,
        h: Tensor,
        memory: tuple[Tensor, Tensor],
        batch: int,
        rotation: object = None,
        spans: object = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        if spans is None:
            return original(self, h, memory, batch, rotation, bias=bias)  # type: ignore[arg-type]
        mask = torch.zeros(h.shape[0] // batch, memory[0].shape[1], dtype=torch.bool)
        for (a, b), keys in spans:  # type: ignore[attr-defined]
            for first, last in keys:
                mask[a:b, first:last] = True
        scores = torch.nn.functional.scaled_dot_product_attention
        with monkeypatch.context() as patch:
            patch.setattr(
                torch.nn.functional,
                "scaled_dot_product_attention",
                lambda *q, **k: scores(*q, attn_mask=mask, **k),
            )
            return original(self, h, memory, batch, rotation)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainingAttention, "forward", masked)
    assert farthest(in_runs, found()) < 1e-4
