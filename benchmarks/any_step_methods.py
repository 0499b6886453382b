"""The methods that benchmarks/any_step.py compares: our stages at a tiny size, and consistency
distillation.

The stages of AnyFlow run through `Trainer`, as from the command line, with its checkpoints, so a
benchmark that was stopped resumes. Consistency distillation (Song et al., arXiv 2303.01469) is the
benchmark's own, on the same network, data, optimizer and moving average:

    f(z, t) = z - t/1000 u(z, t, t)       a consistency function: f(z, 0) = z; it starts as
                                          the teacher's guess of what is clean
    z_t -> z_r                            one Euler step of the teacher between neighbours of a
                                          grid of 32
    loss = d(f(z_t, t), sg f(z_r, r))     d is pseudo-Huber, and the target has no average of
                                          its own (arXiv 2310.14189)

Its usual sampler goes to clean, adds new noise for the next lower time, and goes to clean again.

Guidance is off throughout: guided samples differ from the data on purpose, so their distance to it
would say little.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from any_step_distance import VideoSet
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.checkpoints.weights import Weights
from anyflow_deploy.models import Architecture
from anyflow_deploy.schedule import Schedule
from anyflow_deploy.training.chunks import EMPTY_CONTEXT, ChunkPlan, velocity
from anyflow_deploy.training.data.source import Batch, DataShard
from anyflow_deploy.training.data.synthetic import SyntheticLatents
from anyflow_deploy.training.distributed import DistributedContext
from anyflow_deploy.training.losses import add_noise, sigma
from anyflow_deploy.training.model.model_factory import build_frozen_network, build_trained_network
from anyflow_deploy.training.model.network import TrainingTransformer
from anyflow_deploy.training.model.weight_init import build_network, open_initial_weights
from anyflow_deploy.training.optimizer import OptimizerState
from anyflow_deploy.training.recipes import Recipe, get_recipe, override_recipe
from anyflow_deploy.training.rollout import rollout, shortcut
from anyflow_deploy.training.run_spec import RunSpec
from anyflow_deploy.training.save_pretrained import save_pretrained
from anyflow_deploy.training.timestep_sampling import seeded_generator, seeded_normal
from anyflow_deploy.training.trainer import Trainer

SHAPE = (2, 3, 8, 8)
"""(F, C, H, W): two latent frames; the three channels are mean colours."""

TEXT = (6, 32)
"""Words of a caption, and numbers for each."""

NETWORK = Architecture(
    num_attention_heads=2,
    attention_head_dim=32,
    ffn_dim=192,
    num_layers=2,
    text_dim=TEXT[1],
    freq_dim=64,
    in_channels=3,
    out_channels=3,
    rope_max_seq_len=16,
)

WHOLE = ChunkPlan((SHAPE[0],))
ALONE = DistributedContext(0, 1, torch.device("cpu"))
GRID = 32
"""Steps of the grid of consistency distillation. It is the largest number of steps that are
sampled with, so samples use times that were trained."""


@dataclass(frozen=True)
class Size:
    """How much is trained and measured.

    Attributes:
        samples: of the data that is trained on.
        judged: generated, and compared with as many of the data.
        batch: of every optimizer step.
        teacher, flow_map, on_policy: optimizer steps. The full method is `flow_map` steps and then
            `on_policy` steps; the others make as many steps as cost the same.
        seeds: of the distillations.
        shift: of all schedules and of the times that are trained.
        teacher_rate, flow_map_rate, on_policy_rate, consistency_rate: learning rates. Consistency
            distillation has the better of the two that were tried (5e-4, 1.5e-4); the others were
            tried with one each before.
    """

    samples: int = 16384
    judged: int = 1024
    batch: int = 32
    teacher: int = 4000
    flow_map: int = 2000
    on_policy: int = 280
    seeds: int = 3
    shift: float = 3.0
    teacher_rate: float = 2e-3
    flow_map_rate: float = 5e-4
    on_policy_rate: float = 5e-5
    consistency_rate: float = 1.5e-4


TINY = Size(samples=64, judged=16, batch=4, teacher=4, flow_map=2, on_policy=1, seeds=2)


def count_passes(stage_recipe: Recipe) -> dict[str, float]:
    """Count the passes of the network for each sample of an optimizer step, on average.

    A backward counts as two.

    A flow-map step: one with gradient, two without for the half of the batch with r < t. On policy:
    a roll-out with gradient and one without, three scores, one update of the fake score, and a
    flow-map step. Consistency distillation: the teacher, the target, and one with gradient.
    """
    counts = stage_recipe.flow.rollout_steps
    shortcuts = [sum(len(shortcut(n, g, 1.0)) for g in range(n)) / n for n in counts]
    jumps = sum(shortcuts) / len(counts)
    flow_map = 3 + 2 * 0.5
    return {
        "teacher": 3,
        "flow-map": flow_map,
        "on-policy": 3 * jumps + 3 + jumps + 3 + flow_map,
        "consistency": 5,
    }


def settings(stage: str, size: Size, seed: int, **values: Any) -> Recipe:
    """Return the tiny recipe of a stage at the benchmark's size."""
    rates = {
        "teacher": size.teacher_rate,
        "flow-map": size.flow_map_rate,
        "on-policy": size.on_policy_rate,
    }
    steps = {"teacher": size.teacher, "flow-map": size.flow_map, "on-policy": size.on_policy}[stage]
    defaults: dict[str, Any] = {
        "frames": SHAPE[0],
        "height": SHAPE[2],
        "width": SHAPE[3],
        "text_tokens": TEXT[0],
        "batch": size.batch,
        "micro_batch": size.batch,
        "learning_rate": rates[stage],
        "steps": steps,
        "seed": seed,
        "shift": size.shift,
        "guidance": 1.0,
        "real_guidance": 0.0,
        "text_drop": 0.0,
        "ema": 0.99 if stage == "on-policy" else 0.998,
        "ema_start": min(500, steps // 2),
        "sample_every": 0,
        "checkpoint_every": 1000,
        "keep": 1,
    }
    return override_recipe(get_recipe(f"{stage}-tiny"), {**defaults, **values})


class Shapes:
    """A `DataSource` of the synthetic data set's first samples, drawn once and kept in a file."""

    def __init__(self, part: DataShard, file: Path) -> None:
        tensors = load_file(file)
        self._latents = tensors["latents"]
        self._text = tensors["text"]
        self._part = part
        self._position = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next()

    def next(self) -> Batch:
        rows = torch.arange(self._position, self._position + self._part.batch) % len(self._latents)
        self._position += self._part.batch
        names = tuple(f"synthetic-{i}" for i in rows.tolist())
        return Batch(self._latents[rows], self._text[rows], torch.zeros(1, *TEXT), names)

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._position = int(state["samples"])

    def pop_broken_samples(self) -> list[str]:
        return []

    def check(self) -> str:
        return f"{len(self._latents)} moving shapes"


def prepare(work: Path, size: Size) -> None:
    """Write the data and the initial weights.

    The data to train on has seed 0, the data to compare with seed 1, and the data for the floor
    seed 2.
    """
    for name, seed, count in (
        ("train", 0, size.samples),
        ("data", 1, size.judged),
        ("floor", 2, size.judged),
    ):
        file = work / f"{name}.safetensors"
        if not file.exists():
            batch = SyntheticLatents(DataShard(0, 1, 1), SHAPE, TEXT, seed).batch(
                list(range(count))
            )
            save_file({"latents": batch.latents, "text": batch.text}, file)
    start = RandomWeights(NETWORK, "any-step", 0)
    (work / "start").mkdir(exist_ok=True)
    save_file(
        {name: start.read(name) for name in start.shapes()},
        work / "start" / "diffusion_pytorch_model.safetensors",
    )
    (work / "start" / "config.json").write_text(json.dumps(NETWORK.as_config()))


def train_stage(
    work: Path, output: Path, stage_recipe: Recipe, init: Path, teacher: Path | None = None
) -> Path:
    """Run the project's trainer, and return the model's folder.

    A finished run is not repeated.
    """

    def open_shapes(_: str, __: Recipe, ___: Weights, part: DataShard) -> Shapes:
        return Shapes(part, work / "train.safetensors")

    request = RunSpec(stage_recipe, output, init, teacher, device="cpu")
    return run_once(
        output, stage_recipe.optimizing.steps, lambda: Trainer(request, ALONE, open_shapes).run()
    )


def run_once(output: Path, steps: int, run: Any) -> Path:
    """Return the model's folder; call `run` where it is not trained yet.

    The seconds that took are kept beside it.
    """
    previous = read_progress(output)
    if previous["steps"] != steps:
        start = time.perf_counter()
        run()
        progress = {
            "steps": steps,
            "seconds": round(previous["seconds"] + time.perf_counter() - start, 1),
        }
        (output / "done.json").write_text(json.dumps(progress))
    return output / "model"


def read_progress(output: Path) -> dict[str, float]:
    """Return the optimizer steps that a run finished, and the seconds they took."""
    path = output / "done.json"
    progress: dict[str, float] = (
        json.loads(path.read_text()) if path.exists() else {"steps": 0, "seconds": 0}
    )
    return progress


def teacher_run(work: Path, size: Size) -> Path:
    """Train the teacher: flow matching from random weights."""
    return train_stage(work, work / "teacher", settings("teacher", size, 0), work / "start")


def flow_map_run(work: Path, size: Size, seed: int) -> Path:
    """Train the full method's first part, and return a copy of the model at this point.

    It is also the first part of the flow map alone.
    """
    output = work / f"flow-map-{seed}"
    snapshot = output / "first"
    if not snapshot.exists():
        model = train_stage(
            work, output, settings("flow-map", size, seed), work / "teacher" / "model"
        )
        shutil.copytree(model, snapshot)
    return snapshot


def flow_map_alone(work: Path, size: Size, seed: int) -> Path:
    """Continue where `flow_map_run` stopped, at the cost of training on policy."""
    stage_recipe = settings("flow-map", size, seed)
    cost = count_passes(stage_recipe)
    steps = size.flow_map + round(size.on_policy * cost["on-policy"] / cost["flow-map"])
    recipe = settings(
        "flow-map", size, seed, steps=steps, ema_start=stage_recipe.optimizing.ema_start
    )
    return train_stage(work, work / f"flow-map-{seed}", recipe, work / "teacher" / "model")


def full_run(work: Path, size: Size, seed: int) -> Path:
    """Train the full method's second part."""
    stage_recipe = settings("on-policy", size, seed)
    return train_stage(
        work,
        work / f"on-policy-{seed}",
        stage_recipe,
        work / f"flow-map-{seed}" / "first",
        work / "teacher" / "model",
    )


def consistency_run(work: Path, size: Size, seed: int) -> Path:
    """Train consistency distillation at the full method's cost."""
    stage_recipe = settings("flow-map", size, seed)
    cost = count_passes(stage_recipe)
    steps = round(
        (size.flow_map * cost["flow-map"] + size.on_policy * cost["on-policy"])
        / cost["consistency"]
    )
    output = work / f"consistency-{seed}"
    output.mkdir(exist_ok=True)
    return run_once(output, steps, lambda: _consistency(work, output, size, stage_recipe, steps))


def _consistency(work: Path, output: Path, size: Size, base: Recipe, steps: int) -> None:
    stage_recipe = override_recipe(base, {"learning_rate": size.consistency_rate, "steps": steps})
    seed, device = stage_recipe.running.seed, ALONE.device
    weights = open_initial_weights(work / "teacher" / "model", False, NETWORK)
    optimizer_state = OptimizerState(
        build_trained_network(weights, stage_recipe, device, None), stage_recipe.optimizing
    )
    teacher = build_frozen_network(weights, stage_recipe, device, None)
    times = torch.tensor(Schedule.uniform(GRID, size.shift).timesteps)
    data = Shapes(DataShard(0, 1, size.batch), work / "train.safetensors")
    softness = 0.00054 * math.sqrt(math.prod(SHAPE))
    for step in range(steps):
        batch = data.next()
        index = torch.randint(
            GRID, (size.batch,), generator=seeded_generator(seed, "consistency", step)
        )
        t, r = times[index], times[index + 1]
        z = add_noise(
            batch.latents, seeded_normal(batch.latents.shape, seed, "consistency-noise", step), t
        )
        with torch.no_grad():
            lower = z - (sigma(t) - sigma(r)) * velocity(
                teacher, z, t, t, batch.text, WHOLE, EMPTY_CONTEXT
            )
            target = predict_clean(optimizer_state.network, lower, r, batch.text)
        error = (
            (predict_clean(optimizer_state.network, z, t, batch.text) - target)
            .square()
            .flatten(1)
            .sum(1)
        )
        loss = ((error + softness**2).sqrt() - softness).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        if not math.isfinite(optimizer_state.clip_gradients()):
            raise SystemExit(
                f"consistency distillation: the gradient of step {step} is not finite."
            )
        optimizer_state.update()
    with optimizer_state.use_average():
        save_pretrained(output, optimizer_state, ALONE, size.shift, "float32", None)


def predict_clean(network: TrainingTransformer, z: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """Return the consistency function f(z, t), t (B)."""
    return z - sigma(t) * velocity(network, z, t, t, text, WHOLE, EMPTY_CONTEXT)


@torch.no_grad()
def sample_videos(
    model: Path, sampler: str, count: int, text: Tensor, shift: float, seed: int
) -> VideoSet:
    """Generate samples of `count` steps for these captions.

    Args:
        sampler: "ode" follows the instantaneous velocity (the teacher), "jumps" is that of the flow
            map, and "noised" is consistency sampling.
    """
    weights = open_checkpoint(model)
    network = build_network(
        NETWORK, {name: weights.read(name) for name in weights.shapes()}, frozen=True
    )
    pairs = list(Schedule.uniform(count, shift).transitions)
    videos = []
    for number, words in enumerate(text.split(256)):
        z = seeded_normal((len(words), *SHAPE), seed, "judged", number)
        if sampler == "jumps":
            z = rollout(network, z, words, WHOLE, pairs)
        for t, r in pairs if sampler != "jumps" else ():
            source, target = (torch.full((len(z),), s) for s in (t, r))
            if sampler == "ode":
                z = z - (sigma(source) - sigma(target)) * velocity(
                    network, z, source, source, words, WHOLE, EMPTY_CONTEXT
                )
            else:
                clean = predict_clean(network, z, source, words)
                z = (
                    add_noise(clean, seeded_normal(z.shape, seed, "again", number, r), target)
                    if r
                    else clean
                )
        videos.append(z)
    return VideoSet(torch.cat(videos), text)
