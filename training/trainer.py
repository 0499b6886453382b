"""The loop: one for all stages, bidirectional and causal.

    train(Request(recipe("flow-map-tiny"), Path("runs/tiny")))

Before the first step everything that can be checked is checked (`preflight`). A run that finds a checkpoint of its own goes on
from it, on any number of processes; a run that was killed loses what came after its last checkpoint, and makes the same
numbers again.
"""

from __future__ import annotations

import functools
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from anyflow_deploy.checkpoints.weights import Weights
from anyflow_deploy.engines.kv_cache import fitted_chunks
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.training.checkpointing import Checkpoints, read_state
from anyflow_deploy.training.chunks import ChunkPlan, chunk_plan
from anyflow_deploy.training.data.source import Batch, Part
from anyflow_deploy.training.distributed import World, join, leave
from anyflow_deploy.training.losses import Score
from anyflow_deploy.training.metrics_logger import Watch, clock
from anyflow_deploy.training.model.model_factory import frozen_network, trained_network
from anyflow_deploy.training.optimizer import Learner
from anyflow_deploy.training.preflight import (
    check_batch,
    check_disk,
    check_memory,
    check_packages,
    check_resumed,
    quick_fingerprint,
)
from anyflow_deploy.training.recipes import as_dict
from anyflow_deploy.training.run_spec import OpenData, Request, open_data, open_weights, vae_of
from anyflow_deploy.training.sample_grid import ROWS, draw_sheet, sheet_samples
from anyflow_deploy.training.save_pretrained import save_finished
from anyflow_deploy.training.stages import FlowMap, Micro, OnPolicy, Stage, Teacher


def train(request: Request) -> Path:
    """Run, or go on with, what was asked for.

    Returns:
        The folder of the finished model.

    Raises:
        AnyFlowError: bad settings, data or checkpoints (within the first minute); a loss that is not finite or explodes.
    """
    world = join(request.shard, request.device)
    try:
        return Trainer(request, world).run()
    finally:
        leave(world)


class Trainer:
    """One process of a run, see the module's text."""

    def __init__(self, request: Request, world: World, opening: OpenData = open_data) -> None:
        self.request, self.recipe, self.world = request, request.recipe, world
        how, processes = self.recipe.optimizing, world.size
        if how.batch % (how.micro_batch * processes):
            raise AnyFlowError(
                f"--batch {how.batch} does not divide into {processes} processes of --micro-batch {how.micro_batch}. Change one."
            )
        check_packages(self.recipe, request.wandb)
        weights, teacher = open_weights(request)
        a = weights.architecture
        self._opened = functools.partial(opening, request.data, self.recipe, weights)
        self._shown: Batch | None = None
        self.source = self._opened(Part(world.rank, processes, how.micro_batch))
        self.told = [
            f"{self.recipe.name}: {how.steps} steps of {how.batch} samples on {processes} x {world.device.type}",
            f"data {self.source.check()}",
            check_disk(self.recipe, a, request.output),
            check_memory(self.recipe, a, world),
        ]
        self.checkpoints = Checkpoints(
            request.output / "checkpoints", world, self.recipe.running.keep, self.recipe.running.asynchronous
        )
        self.base = quick_fingerprint(weights, teacher)
        found = self.checkpoints.newest()
        state = read_state(found) if found else None
        if state is not None and found is not None:
            check_resumed(state, self.recipe, self.base, found)
        chunks = fitted_chunks(a.chunk_partition, self.recipe.frames) if a.chunk_partition else None
        self.plan = chunk_plan(a, self.recipe.frames, chunks)
        self.architecture = a
        self.stage = self._stage(weights, teacher)
        self.step, self.usual = 0, math.nan
        if state is not None and found is not None:
            self._resume(found, state)
        self._stopping = False

    def run(self) -> Path:
        """Train to the end, and write the model."""
        recipe, world = self.recipe, self.world
        if world.first:
            (self.request.output / "recipe.json").write_text(json.dumps(as_dict(recipe), indent=1))
        watch = Watch(
            self.request.output, recipe.name, self.step, recipe.optimizing.steps, world.first, self.request.wandb, as_dict(recipe)
        )
        for line in self.told:
            watch.say(line)
        before = _on_terminate(self._stop)
        try:
            self._loop(watch)
            self.checkpoints.finish()
            if self._stopping:
                raise AnyFlowError(f"stopped at step {self.step} on request; the same command goes on from there.")
            model = self.stage.learners["model"]
            with model.averaged():
                folder = save_finished(
                    self.request.output, model, world, recipe.flow.shift, recipe.running.save_type, self.request.init
                )
            watch.say(f"model: {folder}")
            return folder
        finally:
            watch.close()
            _on_terminate(before)

    def _loop(self, watch: Watch) -> None:
        running, how = self.recipe.running, self.recipe.optimizing
        batches: Iterator[Batch] | None = None
        while self.step < how.steps and not self._stopping:
            batches = batches or iter(self.source)
            started = clock()
            values = self._one_step(batches)
            watch.step(self.step, values, how.batch, clock() - started)
            self._tell_skipped(watch)
            self.checkpoints.poll()
            self._agree_on_stopping()
            if self.step % running.checkpoint_every == 0 or self.step == how.steps or self._stopping:
                self._save()
            if running.sample_every and self.step % running.sample_every == 0:
                self._sheet(watch)

    def _tell_skipped(self, watch: Watch) -> None:
        """Name broken samples: every process in a file of its own, the first one on the screen, too."""
        if lines := self.source.skipped():
            with (self.request.output / f"skipped-{self.world.rank}.txt").open("a") as file:
                file.writelines(f"step {self.step}: {line}\n" for line in lines)
            watch.say("\n".join(f"skipped {line}" for line in lines))

    def _one_step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Accumulate, check, update."""
        how, world = self.recipe.optimizing, self.world
        together = how.micro_batch * world.size
        shares: dict[str, Tensor] = {}
        seen: list[Batch] = []
        for number in range(how.batch // together):
            batch = next(batches)
            check_batch(batch, self.recipe, self.architecture)
            seen.append(batch)
            first = number * together
            own = first + world.rank * how.micro_batch
            micro = Micro(self.step, first, own, how.micro_batch, together, how.batch, world)
            for name, value in self.stage.accumulate(batch.to(world.device), micro).items():
                shares[name] = shares[name] + value if name in shares else value
        self.stage.finish()
        values = {name: float(world.sum(value.detach().clone())) / world.size for name, value in shares.items()}
        norms = {f"{name}_gradient": learner.gradient_norm() for name, learner in self.stage.learners.items()}
        self._check_loss({**values, **norms}, seen)
        for learner in self.stage.learners.values():
            learner.update()
        self.step += 1
        return {**values, **norms}

    def _check_loss(self, values: dict[str, float], seen: list[Batch]) -> None:
        """Stop before the update that a broken loss would make.

        Raises:
            AnyFlowError: not finite, or exploded; the batch was saved.
        """
        loss, spike = values["loss"], self.recipe.running.spike
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        exploded = spike > 0 and not math.isnan(self.usual) and loss > spike * self.usual
        if not broken and not exploded:
            self.usual = loss if math.isnan(self.usual) else 0.95 * self.usual + 0.05 * loss
            return
        folder = self.request.output / "failed"
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{self.step:08d}-rank-{self.world.rank}.safetensors"
        tensors = {f"{k}.{i}": v.contiguous() for i, b in enumerate(seen) for k, v in (("latents", b.latents), ("text", b.text))}
        names = [name for batch in seen for name in batch.names]
        save_file(tensors, path, metadata={"names": json.dumps(names), "values": json.dumps(values)})
        cause = f"{', '.join(broken)} not finite" if broken else f"loss {loss:.4g}, usually {self.usual:.4g}"
        raise AnyFlowError(
            f"step {self.step}: {cause}. Nothing was updated; the batch ({', '.join(names[:4])}, …) is in {path}. "
            f"Look at it, lower --learning-rate, or (for a loss that is only large) raise --spike; the same command goes on from "
            "the last checkpoint."
        )

    def _stage(self, weights: Weights, teacher: Weights | None) -> Stage:
        recipe, world = self.recipe, self.world
        model = Learner(trained_network(weights, recipe, world.device, world.mesh), recipe.optimizing)
        if teacher is None:
            kind = Teacher if recipe.stage == "teacher" else FlowMap
            return kind(recipe, self.plan, {"model": model})
        fake = Learner(trained_network(teacher, recipe, world.device, world.mesh), recipe.optimizing, averaged=False)
        shared = recipe.adapting.lora_rank > 0
        real = fake.network if shared else frozen_network(teacher, recipe, world.device, world.mesh)
        whole = ChunkPlan((self.plan.frames,))
        scores = (Score(real, whole, without_adapters=shared), Score(fake.network, whole))
        return OnPolicy(recipe, self.plan, {"model": model, "fake": fake}, *scores)

    def _tensors(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": t for name, learner in self.stage.learners.items() for key, t in learner.tensors().items()}

    def _save(self) -> None:
        state: dict[str, Any] = {
            "recipe": as_dict(self.recipe),
            "base": self.base,
            "data": self.source.state_dict(),
            "learners": {name: learner.state() for name, learner in self.stage.learners.items()},
            "reference": _json_number(self.stage.reference),
            "usual": _json_number(self.usual),
        }
        self.checkpoints.save(self.step, self._tensors(), state)

    def _resume(self, path: Path, state: dict[str, Any]) -> None:
        self.checkpoints.load(path, self._tensors())
        self.step = int(state["step"])
        for name, learner in self.stage.learners.items():
            learner.resumed(state["learners"][name])
        self.source.load_state_dict(state["data"])
        self.stage.reference, self.usual = _number(state["reference"]), _number(state["usual"])
        self.told.append(f"goes on from {path}")

    def _sheet(self, watch: Watch) -> None:
        """Draw what the averaged model makes of the first prompts."""
        recipe, world = self.recipe, self.world
        batch = self._sheet_batch()
        model = self.stage.learners["model"]
        with model.averaged():
            steps = recipe.running.sample_steps
            samples = sheet_samples(model.network, batch, self.plan, steps, recipe.flow.shift, recipe.running.seed)
        if world.first:
            path = self.request.output / "samples" / f"step-{self.step:08d}.png"
            draw_sheet(path, samples, batch.captions or batch.names, steps, vae_of(self.request.init))
            watch.picture(self.step, path)

    def _sheet_batch(self) -> Batch:
        """The very first samples, read by a source of its own: the same ones in every sheet, on every process."""
        if self._shown is None:
            self._shown = next(iter(self._opened(Part(0, 1, ROWS)))).to(self.world.device)
        return self._shown

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _agree_on_stopping(self) -> None:
        """A signal may reach one process a step earlier than another."""
        if self.world.size > 1:
            flag = torch.tensor(int(self._stopping), device=self.world.device)
            self._stopping = bool(self.world.sum(flag))


def _on_terminate(handler: Any) -> Any:
    """Set what SIGTERM does; returns what it did. Only the main thread may."""
    try:
        return signal.signal(signal.SIGTERM, handler)
    except ValueError:
        return handler


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
