"""The stages of training: for each, what one optimizer step draws and which losses it computes.

The trainer calls `accumulate` for each micro-batch and then updates every optimizer state. A stage
keeps no state of its own but `reference`, the running mean loss of r = t samples, for the rare step
without one.

Random numbers are drawn for the global batch of the step, by sample number (`timestep_sampling`):
micro-batch m of W processes with b samples each holds the samples m W b … (m + 1) W b - 1, and this
process has those from m W b + rank b on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from anyflow_deploy.training.chunks import ChunkPlan
from anyflow_deploy.training.data.source import Batch
from anyflow_deploy.training.distributed import DistributedContext
from anyflow_deploy.training.losses import (
    DerivativeConfig,
    NoisePair,
    Score,
    dmd_gradient,
    dmd_losses,
    flow_map_losses,
    flow_matching_losses,
    rescale_losses,
)
from anyflow_deploy.training.optimizer import OptimizerState
from anyflow_deploy.training.recipes import Recipe
from anyflow_deploy.training.rollout import rollout, sample_shortcut
from anyflow_deploy.training.timestep_sampling import (
    sample_flow_map_times,
    sample_logit_normal_times,
    sample_uniform_times,
    seeded_generator,
    seeded_normal,
)

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """The position of a micro-batch within its step.

    Attributes:
        step: of the optimizer.
        global_first: number of the first sample of all processes' micro-batches within the step.
        local_first: number of this process's first sample.
        count: samples of this process.
        global_count: samples of all processes.
        step_count: samples of the step.
        world: this process among the others.
    """

    step: int
    global_first: int
    local_first: int
    count: int
    global_count: int
    step_count: int
    world: DistributedContext

    def local_rows(self, values: Tensor) -> Tensor:
        """Return this process's rows of values for the global batch."""
        return values[self.local_first : self.local_first + self.count].to(self.world.device)

    def noise(self, like: Tensor, seed: int, purpose: str) -> Tensor:
        """Return standard normal noise of a tensor's shape (B, …), on the device.

        Each sample has noise of its own, the same on whichever process it is computed.
        """
        shape = like.shape[1:]
        noise = [
            seeded_normal(shape, seed, purpose, self.step, self.local_first + i)
            for i in range(self.count)
        ]
        return torch.stack(noise).to(self.world.device)

    def mean(self, losses: Tensor) -> Tensor:
        """Return this micro-batch's share of the mean over the global batch.

        FSDP averages over processes.
        """
        return losses.sum() * self.world.size / self.step_count


class Stage(Protocol):
    """A stage of training.

    Attributes:
        optimizer_states: by name; "model" is the result of the run.
        reference: mean loss of r = t samples so far; NaN before the first, or where the stage needs
            none.
    """

    optimizer_states: dict[str, OptimizerState]
    reference: float

    def accumulate(self, batch: Batch, micro: MicroBatch) -> Losses:
        """Backpropagate one micro-batch, and return its shares of the step's mean losses.

        They have no gradient.
        """
        ...

    def finish(self) -> None:
        """Complete a step after its last micro-batch."""
        ...


def sample_chunk_plan(plan: ChunkPlan, long_context: float, seed: int, step: int) -> ChunkPlan:
    """Draw the chunks of one step, the same on all processes.

    They are the first window, or (long context) a later one.
    """
    extra = len(plan.chunks) - plan.limit
    random = seeded_generator(seed, "chunks", step)
    if extra <= 0 or float(torch.rand((), generator=random)) >= long_context:
        return plan.head(min(plan.limit, len(plan.chunks)))
    return plan.head(plan.limit + 1 + int(torch.randint(extra, (), generator=random)))


@dataclass
class Teacher:
    """Flow matching with some prompts dropped: a score, and the start of the flow map."""

    recipe: Recipe
    plan: ChunkPlan
    optimizer_states: dict[str, OptimizerState]
    reference: float = math.nan

    def accumulate(self, batch: Batch, micro: MicroBatch) -> Losses:
        """Backpropagate one micro-batch, and return its share of the loss."""
        flow, seed = self.recipe.flow, self.recipe.running.seed
        plan = sample_chunk_plan(self.plan, flow.long_context, seed, micro.step)
        start, stop = plan.window
        drop_text = (
            micro.local_rows(
                torch.rand(micro.step_count, generator=seeded_generator(seed, "drop", micro.step))
            )
            < flow.text_drop
        )
        text = torch.where(drop_text[:, None, None], batch.negative_text, batch.text)
        clean = batch.latents[:, : plan.frames]
        pair = NoisePair(
            clean, micro.noise(clean[:, start:stop], seed, "noise"), text, batch.negative_text
        )
        t = micro.local_rows(
            sample_logit_normal_times(micro.step_count, flow.shift, seed, "teacher", micro.step)
        )
        loss = micro.mean(
            flow_matching_losses(self.optimizer_states["model"].network, pair, t, plan)
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": loss.detach()}

    def finish(self) -> None:
        """Do nothing: this stage needs no reference loss."""


@dataclass
class FlowMap:
    """Forward flow-map training."""

    recipe: Recipe
    plan: ChunkPlan
    optimizer_states: dict[str, OptimizerState]
    reference: float = math.nan
    _sums: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def accumulate(self, batch: Batch, micro: MicroBatch) -> Losses:
        """Backpropagate one micro-batch, and return its share of the loss."""
        loss = self.loss(batch, micro)
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": loss.detach()}

    def loss(self, batch: Batch, micro: MicroBatch) -> Tensor:
        """Return this micro-batch's share of the balanced flow-map loss."""
        flow, seed = self.recipe.flow, self.recipe.running.seed
        plan = sample_chunk_plan(self.plan, flow.long_context, seed, micro.step)
        start, stop = plan.window
        times, targets = sample_flow_map_times(micro.step_count, flow.shift, seed, micro.step)
        global_slice = slice(micro.global_first, micro.global_first + micro.global_count)
        moving = times[global_slice] != targets[global_slice]
        t, r = micro.local_rows(times), micro.local_rows(targets)
        clean = batch.latents[:, : plan.frames]
        pair = NoisePair(
            clean, micro.noise(clean[:, start:stop], seed, "noise"), batch.text, batch.negative_text
        )
        derivative_config = DerivativeConfig(
            flow.derivative, flow.epsilon, getattr(torch, flow.derivative_type)
        )
        network = self.optimizer_states["model"].network
        losses = flow_map_losses(
            network,
            pair,
            t,
            r,
            plan,
            flow.guidance,
            flow.shift,
            derivative_config,
            bool(moving.any()),
        )
        diffusion = t == r
        if not bool(moving.all()):
            self._add_reference_losses(losses.detach()[diffusion], micro.world)
        return micro.mean(
            rescale_losses(losses, diffusion, losses.new_tensor(self._reference_mean()))
        )

    def finish(self) -> None:
        """Update the reference loss with the step's r = t samples."""
        if self._sums[1]:
            mean = self._reference_mean()
            self.reference = (
                mean if math.isnan(self.reference) else 0.9 * self.reference + 0.1 * mean
            )
        self._sums = [0.0, 0.0]

    def _add_reference_losses(self, losses: Tensor, world: DistributedContext) -> None:
        """Add losses of r = t samples to their sum.

        They come first in a step, so the other samples are scaled with the mean of all of them.
        """
        totals = world.sum(
            torch.stack((losses.sum(), losses.new_tensor(float(len(losses))))).double()
        )
        self._sums = [old + float(new) for old, new in zip(self._sums, totals, strict=True)]

    def _reference_mean(self) -> float:
        return self._sums[0] / self._sums[1] if self._sums[1] else self.reference


@dataclass
class OnPolicy:
    """Flow-map backward simulation and distribution matching, together with stage 1's loss.

    Attributes:
        optimizer_states: "model" and "fake".
        real, fake: the scores; each step gives them its plan.
    """

    recipe: Recipe
    plan: ChunkPlan
    optimizer_states: dict[str, OptimizerState]
    real: Score
    fake: Score
    reference: float = math.nan

    def __post_init__(self) -> None:
        self._flow_map = FlowMap(self.recipe, self.plan, self.optimizer_states, self.reference)

    def accumulate(self, batch: Batch, micro: MicroBatch) -> Losses:
        """Backpropagate one micro-batch, and return its shares of the losses."""
        self._flow_map.reference = self.reference
        flow, seed = self.recipe.flow, self.recipe.running.seed
        plan = sample_chunk_plan(self.plan, flow.long_context, seed, micro.step)
        losses = {
            "dmd": self._accumulate_dmd(batch, micro, plan),
            "fake": self._accumulate_fake_score(batch, micro, plan),
        }
        if flow.flow_map_weight:
            loss = self._flow_map.loss(batch, micro)
            (flow.flow_map_weight * loss).backward()  # type: ignore[no-untyped-call]
            losses["flow_map"] = loss.detach()
        return {
            "loss": (
                losses["dmd"]
                + flow.flow_map_weight * losses.get("flow_map", torch.zeros_like(losses["dmd"]))
            ),
            **losses,
        }

    def finish(self) -> None:
        """Update the reference loss with the step's r = t samples."""
        self._flow_map.finish()
        self.reference = self._flow_map.reference

    def _accumulate_dmd(self, batch: Batch, micro: MicroBatch, plan: ChunkPlan) -> Tensor:
        """Backpropagate the DMD loss of one roll-out."""
        flow, seed = self.recipe.flow, self.recipe.running.seed
        sample = self._sample_rollout(batch, micro, plan, "generator")
        scores = [score.for_plan(plan) for score in (self.real, self.fake)]
        window = scores[0].plan.window
        noise = micro.noise(sample[:, window[0] : window[1]], seed, "dmd-noise")
        t = micro.local_rows(sample_uniform_times(micro.step_count, flow.shift, seed, micro.step))
        pair = NoisePair(sample.detach(), noise, batch.text, batch.negative_text)
        gradient = dmd_gradient(
            scores[0], scores[1], pair.clean, noise, t, pair, flow.real_guidance
        )
        loss = micro.mean(dmd_losses(sample, gradient, window))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _accumulate_fake_score(self, batch: Batch, micro: MicroBatch, plan: ChunkPlan) -> Tensor:
        """Backpropagate the fake score's flow matching on another roll-out."""
        flow, seed = self.recipe.flow, self.recipe.running.seed
        with torch.no_grad():
            sample = self._sample_rollout(batch, micro, plan, "fake")
        score = self.fake.for_plan(plan)
        start, stop = score.plan.window
        pair = NoisePair(
            sample,
            micro.noise(sample[:, start:stop], seed, "fake-noise"),
            batch.text,
            batch.negative_text,
        )
        t = micro.local_rows(
            sample_logit_normal_times(micro.step_count, flow.shift, seed, "fake", micro.step)
        )
        loss = micro.mean(flow_matching_losses(score.network, pair, t, score.plan))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _sample_rollout(
        self, batch: Batch, micro: MicroBatch, plan: ChunkPlan, purpose: str
    ) -> Tensor:
        flow, seed = self.recipe.flow, self.recipe.running.seed
        noise = micro.noise(batch.latents[:, : plan.frames], seed, f"{purpose}-start")
        pairs = sample_shortcut(flow.rollout_steps, flow.shift, seed, f"{purpose}-{micro.step}")
        return rollout(self.optimizer_states["model"].network, noise, batch.text, plan, pairs)
