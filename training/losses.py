"""The losses (AnyFlow, arXiv 2605.13724), each for a batch of samples.

Tests compare them with the authors' code.

**Flow matching** (teacher, fake score): u(z_t, t, t) should be noise - x.

**Flow map**: the average velocity u(z_t, t, r) should be v - (t - r) du/dt, v = noise - x, where
du/dt follows the straight path through x and noise. A central difference or a Jacobian-vector
product gives it, without gradient. Classifier-free guidance g is fused in: the prediction is
compared as (u_cond + (g - 1) sg(u_uncond)) / g, and du/dt is divided by g.

**Distribution matching** (DMD): the gradient at a generated sample is the difference between the
clean samples that the fake score and the guided real score predict from its noised form.

du/dt is only computed for samples with r < t: half of a batch has r = t, where (t - r) is zero.

Everything here is float32 except the network's large products. With `DerivativeConfig.compute =
float32` those of du/dt are, too: the difference is divided by 0.01, which would multiply the
rounding of bfloat16 products by 100.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyflow_deploy.schedule import TRAIN_TIMESTEPS
from anyflow_deploy.training.chunks import ChunkPlan, Context, encode_context, velocity
from anyflow_deploy.training.model.lora import disable_adapters
from anyflow_deploy.training.model.network import TrainingTransformer
from anyflow_deploy.training.timestep_sampling import time_weight


@dataclass(frozen=True)
class NoisePair:
    """Clean samples and the noise that is mixed in, with their text.

    Attributes:
        clean: latents of the whole plan, float32 (B, F, C, H, W).
        noise: of the plan's window, float32 (B, Fw, C, H, W).
        text, negative: prompt embeddings (B, L, D) each.
    """

    clean: Tensor
    noise: Tensor
    text: Tensor
    negative: Tensor

    def target(self, plan: ChunkPlan) -> Tensor:
        """Return the window's clean frames, (B, Fw, C, H, W)."""
        start, stop = plan.window
        return self.clean[:, start:stop]


@dataclass(frozen=True)
class DerivativeConfig:
    """The method that computes du/dt.

    Attributes:
        method: "central" or "jvp".
        epsilon: half the width of the central difference, in timesteps.
        compute: type of the network's large products in it.
    """

    method: str = "central"
    epsilon: float = 5.0
    compute: torch.dtype = torch.float32


def add_noise(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return z_t = (1 - s) x + s n; t is float32 (B), in timesteps."""
    s = sigma(t)
    return (1 - s) * clean + s * noise


def sigma(t: Tensor) -> Tensor:
    """Return t (B) as s = t/1000, (B, 1, 1, 1, 1)."""
    return (t / TRAIN_TIMESTEPS)[:, None, None, None, None]


def flow_matching_losses(
    network: TrainingTransformer, pair: NoisePair, t: Tensor, plan: ChunkPlan
) -> Tensor:
    """Return the mean squared error of the instantaneous velocity, for each sample: (B)."""
    clean = pair.target(plan)
    u = velocity(
        network,
        add_noise(clean, pair.noise, t),
        t,
        t,
        pair.text,
        plan,
        encode_context(network, pair.clean, pair.text, plan),
    )
    return (u - (pair.noise - clean)).square().flatten(1).mean(1)


def flow_map_losses(
    network: TrainingTransformer,
    pair: NoisePair,
    t: Tensor,
    r: Tensor,
    plan: ChunkPlan,
    guidance: float,
    shift: float,
    derivative_config: DerivativeConfig,
    moving: bool | None = None,
) -> Tensor:
    """Return the weighted flow-map loss of each sample, before `rescale_losses`: (B).

    Args:
        t, r: float32 (B), timesteps.
        guidance: g of the fusion; 1 for none.
        moving: whether any process has a sample with r < t in this batch. Then all processes call
            the network equally often, as FSDP needs. None looks at this batch alone.
    """
    clean = pair.target(plan)
    z, v = add_noise(clean, pair.noise, t), pair.noise - clean
    context = encode_context(network, pair.clean, pair.text, plan)
    u = velocity(network, z, t, r, pair.text, plan, context)
    with torch.no_grad():
        rows = r < t
        du_dt = torch.zeros_like(v)
        if bool(rows.any()) if moving is None else moving:
            indices = (
                rows.nonzero()[:, 0]
                if bool(rows.any())
                else torch.zeros(1, dtype=torch.int64, device=t.device)
            )
            point = (z[indices], v[indices], t[indices], r[indices], pair.text[indices])
            du_dt[indices] = derivative(
                network, *point, plan, context.detach().rows(indices), derivative_config
            )
        target = v - (sigma(t) - sigma(r)) * du_dt / guidance
        if guidance != 1:
            unconditional = velocity(
                network,
                z,
                t,
                r,
                pair.negative,
                plan,
                encode_context(network, pair.clean, pair.negative, plan),
            )
            target = guidance * target + (1 - guidance) * unconditional
    # (u + (g - 1) u_uncond) / g - target, written so that the gradient flows through the same
    # division
    error = (u - target) / guidance
    return error.square().flatten(1).mean(1) * time_weight(t, shift)


def derivative(
    network: TrainingTransformer,
    z: Tensor,
    v: Tensor,
    t: Tensor,
    r: Tensor,
    text: Tensor,
    plan: ChunkPlan,
    context: Context,
    derivative_config: DerivativeConfig,
) -> Tensor:
    """Return du/ds along the straight path, d(z, s) = (v, 1), at fixed r; without gradient.

    Times, states and the difference are float32 whatever the network computes in: t +- 5 in
    bfloat16 would be 8 apart, not 10.
    """
    with torch.no_grad(), network.override_compute_type(derivative_config.compute):
        if derivative_config.method == "jvp":
            tangents = (v.contiguous(), torch.full_like(t, TRAIN_TIMESTEPS))
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
                result: Tensor = torch.func.jvp(
                    lambda state, time: velocity(network, state, time, r, text, plan, context),
                    (z, t),
                    tangents,
                )[1]
            return result
        step = torch.full_like(t, derivative_config.epsilon)
        half_width = sigma(step)
        velocities = velocity(
            network,
            torch.cat((z + half_width * v, z - half_width * v)),
            torch.cat((t + step, t - step)),
            r.repeat(2),
            text.repeat(2, 1, 1),
            plan,
            context.rows(torch.arange(len(t), device=t.device).repeat(2)),
        )
        forward_velocity, backward_velocity = velocities.chunk(2)
        return (forward_velocity - backward_velocity) / (2 * half_width)


def rescale_losses(losses: Tensor, diffusion: Tensor, reference: Tensor) -> Tensor:
    """Scale each r != t sample so that its loss is the reference: (B), same gradient direction.

    Args:
        losses: from `flow_map_losses`, (B).
        diffusion: bool (B), samples with r = t.
        reference: mean loss of the r = t samples of the global batch, without gradient. Where it is
            not finite, because there was none yet, nothing is scaled.
    """
    tiny = torch.finfo(losses.dtype).tiny
    factor = torch.where(
        diffusion | ~reference.isfinite(),
        torch.ones_like(losses),
        reference / losses.detach().clamp(min=tiny),
    )
    return losses * factor


@dataclass(frozen=True)
class Score:
    """A frozen or fake score: the instantaneous velocity of a network, u(z, t, t).

    Attributes:
        network: bidirectional, or causal (then it sees the sample itself as clean context).
        plan: of that network.
        without_adapters: use the frozen base of a network whose adapters are the other score.
    """

    network: TrainingTransformer
    plan: ChunkPlan
    without_adapters: bool = False

    def for_plan(self, plan: ChunkPlan) -> Score:
        """Return the same score for samples of this plan.

        A bidirectional score sees all their frames as one chunk.
        """
        score_plan = plan if self.network.architecture.causal else ChunkPlan((plan.frames,))
        return replace(self, plan=score_plan)

    def predict_clean(self, z: Tensor, t: Tensor, sample: Tensor, text: Tensor) -> Tensor:
        """Return the clean sample that the network predicts from z_t, in the plan's window."""
        with disable_adapters(self.network) if self.without_adapters else contextlib.nullcontext():
            context = encode_context(self.network, sample, text, self.plan)
            return z - sigma(t) * velocity(self.network, z, t, t, text, self.plan, context)


@torch.no_grad()
def dmd_gradient(
    real: Score,
    fake: Score,
    sample: Tensor,
    noise: Tensor,
    t: Tensor,
    texts: NoisePair,
    guidance: float,
) -> Tensor:
    """Return the normalised gradient of distribution matching at generated samples.

    `(fake - real) / mean|x - real|`, `real = cond + g (cond - uncond)`, each the clean sample that
    a score predicts from z_t.

    Args:
        sample: generated, (B, F, C, H, W), all frames.
        noise: of the scores' window.
        t: float32 (B), timesteps.
        texts: its `text` and `negative` are used.
        guidance: g of the real score.

    Returns:
        The gradient at the window's frames, (B, Fw, C, H, W).
    """
    start, stop = real.plan.window
    x = sample[:, start:stop]
    z = add_noise(x, noise, t)
    conditional = real.predict_clean(z, t, sample, texts.text)
    target = conditional + guidance * (
        conditional - real.predict_clean(z, t, sample, texts.negative)
    )
    scale = (x - target).abs().flatten(1).mean(1).clamp(min=1e-8)
    return (fake.predict_clean(z, t, sample, texts.text) - target) / scale[
        :, None, None, None, None
    ]


def dmd_losses(sample: Tensor, gradient: Tensor, window: tuple[int, int]) -> Tensor:
    """Return mse(x, sg(x - gradient)) of each sample's window: (B).

    Its value says how large the gradient is.
    """
    x = sample[:, window[0] : window[1]]
    return (x - (x - gradient).detach()).square().flatten(1).mean(1)
