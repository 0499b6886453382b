"""The stages that lead from nothing to the two `shapes` pipelines, each with its own folder.

    text-encoder, vae      FOLDER/parts/     trained for themselves
    base                   FOLDER/base/      a pipeline: those two, and an untrained transformer
    latents                FOLDER/latents/   shards of encoded videos
    teacher                FOLDER/teacher/           recipe teacher-shapes
    flow-map               FOLDER/flow-map/          recipe flow-map-shapes
    on-policy              FOLDER/on-policy/         recipe on-policy-shapes
    shapes                 FOLDER/shapes/            the result, 16 bits
    teacher-causal … far-shapes                      the same for the causal model

A stage whose result is there is skipped, one that was stopped resumes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anyflow_deploy.models import MODELS
from anyflow_deploy.progress import Progress
from anyflow_deploy.training.recipes import get_recipe, override_recipe
from anyflow_deploy.training.run_spec import RunSpec


@dataclass(frozen=True)
class ShapesJob:
    """The settings of all stages.

    Attributes:
        folder: of all results.
        seed: of weights, scenes and noise.
        scenes, shard_scenes: videos of the training data, and of one shard; the first is a
            multiple of the second, which is one of 10.
        text_encoder_steps, vae_steps, decoder_steps: of those parts; the VAE's decoder is trained
            alone in the end.
        statistics_scenes: that the latents' mean and deviation are measured on.
        compute: type of large products, "float32" or "bfloat16".
        device: of the transformers, "cpu" or "cuda"; None for CUDA where there is any.
        settings: of every recipe, by name, such as {"steps": "100"}.
    """

    folder: Path
    seed: int = 0
    scenes: int = 4000
    shard_scenes: int = 250
    text_encoder_steps: int = 1000
    vae_steps: int = 4000
    decoder_steps: int = 1500
    statistics_scenes: int = 64
    compute: str = "float32"
    device: str | None = None
    settings: dict[str, str] = dataclasses.field(default_factory=dict)


def stages(job: ShapesJob) -> dict[str, Callable[[Progress], None]]:
    """Return the stages by name, in order."""
    return {
        "base": lambda progress: _make_base(job, progress),
        "latents": lambda progress: _make_latents(job, progress),
        "teacher": lambda _: _train(job, "teacher", "base"),
        "flow-map": lambda _: _train(job, "flow-map", "teacher"),
        "on-policy": lambda _: _train(job, "on-policy", "flow-map", "teacher"),
        "shapes": lambda _: _pack(job, "shapes", "on-policy"),
        "teacher-causal": lambda _: _train(job, "teacher-causal", "teacher"),
        "flow-map-causal": lambda _: _train(job, "flow-map-causal", "teacher-causal"),
        "on-policy-causal": lambda _: _train(job, "on-policy-causal", "flow-map-causal", "teacher"),
        "far-shapes": lambda _: _pack(job, "far-shapes", "on-policy-causal"),
    }


def _make_base(job: ShapesJob, progress: Progress) -> None:
    """Train text encoder and VAE, and put them into a pipeline."""
    from anyflow_deploy.training.shapes.base_pipeline import build_base_pipeline, save_pipeline
    from anyflow_deploy.training.shapes.text_encoder import (
        CaptionReader,
        build_caption_tokenizer,
        build_text_encoder,
        train_text_encoder,
    )
    from anyflow_deploy.training.shapes.vae import VaeRun, build_vae, train_vae

    if (job.folder / "base").is_dir():
        return
    parts = job.folder / "parts"
    tokenizer = build_caption_tokenizer()
    encoder = build_text_encoder(len(tokenizer), job.seed)
    reader = CaptionReader(encoder, tokenizer, job.seed)
    train_text_encoder(reader, parts, job.seed, job.text_encoder_steps, progress)
    vae = build_vae(job.seed)
    run = VaeRun(
        parts,
        job.seed,
        job.vae_steps,
        job.decoder_steps,
        getattr(torch, job.compute),
        job.statistics_scenes,
    )
    train_vae(vae, run, progress)
    pipeline = build_base_pipeline(MODELS["shapes"], vae, encoder, tokenizer, job.seed)
    save_pipeline(pipeline, job.folder / "base")


def _make_latents(job: ShapesJob, progress: Progress) -> None:
    import diffusers

    from anyflow_deploy.training.shapes.latents import write_shards

    pipeline = diffusers.AnyFlowPipeline.from_pretrained(job.folder / "base")
    compute: Any = getattr(torch, job.compute)
    counts = (job.scenes, job.shard_scenes)
    write_shards(pipeline, job.folder / "latents", job.seed, counts, progress, compute)


def _train(job: ShapesJob, stage: str, init: str, teacher: str | None = None) -> None:
    from anyflow_deploy.training.trainer import train

    if (job.folder / stage / "model").is_dir():
        return
    size, causal = (stage.removesuffix("-causal"), stage.endswith("-causal"))
    recipe = get_recipe(f"{size}-shapes{'-causal' if causal else ''}")
    settings = {"seed": str(job.seed), "compute": job.compute, **job.settings}
    start = job.folder / init if init == "base" else job.folder / init / "model"
    train(
        RunSpec(
            override_recipe(recipe, settings),
            job.folder / stage,
            start,
            None if teacher is None else job.folder / teacher / "model",
            str(job.folder / "latents"),
            device=job.device,
        )
    )


def _pack(job: ShapesJob, name: str, stage: str) -> None:
    from anyflow_deploy.training.shapes.packing import pack_pipeline

    if not (job.folder / name).is_dir():
        pack_pipeline(job.folder / stage / "model", job.folder / name)
