"""Measures a `shapes` transformer: does a video show what its prompt asks for?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.pipelines.vae import LoadedVae, decode_video
from anyflow_deploy.schedule import TRAIN_TIMESTEPS, Schedule
from anyflow_deploy.training.chunks import EMPTY_CONTEXT, ChunkPlan, fit_chunk_plan, velocity
from anyflow_deploy.training.model.network import TrainingTransformer
from anyflow_deploy.training.model.weight_init import build_network
from anyflow_deploy.training.rollout import Transition, rollout
from anyflow_deploy.training.shapes.latents import embed_captions
from anyflow_deploy.training.shapes.reader import compare, read_video
from anyflow_deploy.training.shapes.scenes import Scene
from anyflow_deploy.training.timestep_sampling import seeded_normal

_BATCH = 25


@dataclass(frozen=True)
class Sampler:
    """A transformer with the rest of its pipeline.

    Attributes:
        network: the transformer.
        pipeline: of diffusers, for its VAE and text encoder.
        guidance: scale of classifier-free guidance; 1 for a flow map, which has it built in.
        shift: of the schedule.
    """

    network: TrainingTransformer
    pipeline: Any
    guidance: float
    shift: float

    @torch.no_grad()
    def sample(self, captions: Sequence[str], steps: int, seed: int, frames: int) -> Tensor:
        """Generate latents, float32 (B, F, C, H, W); prompt i has noise of (seed, i).

        Args:
            captions: one for each video.
            steps: number of steps.
            seed: of the noise.
            frames: latent frames.
        """
        a = self.network.architecture
        plan = fit_chunk_plan(a, frames)
        transitions = list(Schedule.uniform(steps, self.shift).transitions)
        parts = []
        for first in range(0, len(captions), _BATCH):
            some = list(captions[first : first + _BATCH])
            shape = (frames, a.in_channels, 8, 12)
            noise = torch.stack(
                [seeded_normal(shape, seed, "evaluation", first + i) for i in range(len(some))]
            )
            text = self.embed(some)
            if self.guidance == 1:
                parts.append(rollout(self.network, noise, text, plan, transitions))
            else:
                parts.append(self._sample_guided(noise, text, transitions, plan))
        return torch.cat(parts)

    def embed(self, captions: list[str]) -> Tensor:
        """Return prompt embeddings, float32 (B, 512, D)."""
        return embed_captions(self.pipeline, captions)

    def _sample_guided(
        self, z: Tensor, text: Tensor, transitions: list[Transition], plan: ChunkPlan
    ) -> Tensor:
        """Follow the guided instantaneous velocity by Euler steps; bidirectional models only."""
        negative = self.embed([""]).expand_as(text)
        for t, r in transitions:
            time = torch.full((len(z),), t)
            u = velocity(self.network, z, time, time, text, plan, EMPTY_CONTEXT)
            free = velocity(self.network, z, time, time, negative, plan, EMPTY_CONTEXT)
            u = free + self.guidance * (u - free)
            z = z - (t - r) / TRAIN_TIMESTEPS * u
        return z

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Decode latents to uint8 (B, frames, height, width, 3)."""
        vae = LoadedVae(self.pipeline.vae)
        return np.concatenate([decode_video(vae, part.numpy()) for part in torch.split(latents, 5)])


def load_sampler(folder: Path, pipeline: Any, guidance: float = 1.0) -> Sampler:
    """Load the transformer of a pipeline folder.

    Args:
        folder: in diffusers' layout.
        pipeline: of diffusers, for the other parts.
        guidance: see `Sampler`.
    """
    weights = open_checkpoint(folder)
    tensors = {name: weights.read(name).float() for name in weights.shapes()}
    network = build_network(weights.architecture, tensors).requires_grad_(False)
    network.merges_padding = True
    return Sampler(network, pipeline, guidance, float(pipeline.scheduler.config.shift))


@dataclass(frozen=True)
class Agreement:
    """How many videos show what their prompts ask for.

    Attributes:
        share: of the videos of which all is right.
        by_question: share of right answers to each question, among the videos it was asked of.
        by_kind: share of right videos of each kind of scene.
    """

    share: float
    by_question: dict[str, float]
    by_kind: dict[str, float]


def measure_agreement(scenes: Sequence[Scene], videos: NDArray[np.uint8]) -> Agreement:
    """Compare videos with the scenes of their prompts.

    Args:
        scenes: one for each video.
        videos: uint8 (B, frames, height, width, 3).
    """
    answers = [
        compare(scene, read_video(video)) for scene, video in zip(scenes, videos, strict=True)
    ]
    right = [all(answer.values()) for answer in answers]
    questions = sorted({question for answer in answers for question in answer})
    kinds = sorted({scene.kind for scene in scenes})
    return Agreement(
        float(np.mean(right)),
        {q: float(np.mean([a[q] for a in answers if q in a])) for q in questions},
        {
            kind: float(np.mean([r for r, s in zip(right, scenes, strict=True) if s.kind == kind]))
            for kind in kinds
        },
    )
