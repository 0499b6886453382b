"""The training loop: one for all stages, bidirectional and causal.

    train(RunSpec(get_recipe("flow-map-tiny"), Path("runs/tiny")))

Before the first step everything that can be checked is checked (`preflight`). A run that finds a
checkpoint of its own resumes from it, on any number of processes. A run that was killed loses the
steps after its last checkpoint, and computes the same numbers again.
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
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.training.checkpointing import CheckpointManager, read_state
from anyflow_deploy.training.chunks import ChunkPlan, fit_chunk_plan
from anyflow_deploy.training.data.source import Batch, DataShard
from anyflow_deploy.training.distributed import (
    DistributedContext,
    init_distributed,
    shutdown_distributed,
)
from anyflow_deploy.training.losses import Score
from anyflow_deploy.training.metrics_logger import MetricsLogger, clock
from anyflow_deploy.training.model.model_factory import build_frozen_network, build_trained_network
from anyflow_deploy.training.optimizer import OptimizerState
from anyflow_deploy.training.preflight import (
    check_batch,
    check_disk,
    check_memory,
    check_packages,
    check_resume,
    quick_fingerprint,
    record_changes,
)
from anyflow_deploy.training.recipes import recipe_to_dict
from anyflow_deploy.training.run_spec import (
    OpenData,
    RunSpec,
    find_vae_pipeline,
    open_data,
    open_weights,
)
from anyflow_deploy.training.sample_grid import ROWS, draw_sample_grid, generate_grid_samples
from anyflow_deploy.training.save_pretrained import save_pretrained
from anyflow_deploy.training.stages import FlowMap, MicroBatch, OnPolicy, Stage, Teacher


def train(spec: RunSpec) -> Path:
    """Start a run, or resume it from its last checkpoint.

    Returns:
        The folder of the finished model.

    Raises:
        AnyFlowError: invalid settings, data or checkpoints (within the first minute); a loss that
            is not finite, or far above its mean.
    """
    world = init_distributed(spec.shard, spec.device)
    try:
        return Trainer(spec, world).run()
    finally:
        shutdown_distributed(world)


class Trainer:
    """One process of a run."""

    def __init__(
        self, spec: RunSpec, world: DistributedContext, data_opener: OpenData = open_data
    ) -> None:
        self.spec = spec
        self.recipe = spec.recipe
        self.world = world
        optimizer_config = self.recipe.optimizing
        processes = world.size
        if optimizer_config.batch % (optimizer_config.micro_batch * processes):
            raise AnyFlowError(
                f"--batch {optimizer_config.batch} does not divide into {processes} processes of"
                f" --micro-batch {optimizer_config.micro_batch}. Change one."
            )
        check_packages(self.recipe, spec.wandb)
        weights, teacher = open_weights(spec)
        a = weights.architecture
        self._open_source = functools.partial(data_opener, spec.data, self.recipe, weights)
        self._grid_batch: Batch | None = None
        self.source = self._open_source(
            DataShard(world.rank, processes, optimizer_config.micro_batch)
        )
        self.startup_lines = [
            (
                f"{self.recipe.name}: {optimizer_config.steps} steps of {optimizer_config.batch}"
                f" samples on {processes} x {world.device.type}"
            ),
            f"data {self.source.check()}",
            check_disk(self.recipe, a, spec.output),
            check_memory(self.recipe, a, world),
        ]
        self.checkpoints = CheckpointManager(
            spec.output / "checkpoints",
            world,
            self.recipe.running.keep,
            self.recipe.running.asynchronous,
        )
        self.base = quick_fingerprint(weights, teacher)
        latest = self.checkpoints.latest()
        state = read_state(latest) if latest else None
        self._changes: dict[str, tuple[Any, Any]] = {}
        if state is not None and latest is not None:
            self._changes = check_resume(state, self.recipe, self.base, latest)
        self.plan = fit_chunk_plan(a, self.recipe.frames)
        self.architecture = a
        self.stage = self._build_stage(weights, teacher)
        self.step = 0
        self.mean_loss = math.nan
        if state is not None and latest is not None:
            self._resume(latest, state)
        self._stop_requested = False

    def run(self) -> Path:
        """Train to the last step, and write the model."""
        recipe = self.recipe
        world = self.world
        if world.is_main:
            (self.spec.output / "recipe.json").write_text(
                json.dumps(recipe_to_dict(recipe), indent=1)
            )
            record_changes(self.spec.output, self.step, self._changes)
        logger = MetricsLogger(
            self.spec.output,
            recipe.name,
            self.step,
            recipe.optimizing.steps,
            world.is_main,
            self.spec.wandb,
            recipe_to_dict(recipe),
        )
        for line in self.startup_lines:
            logger.log(line)
        previous_handler = _set_sigterm_handler(self._stop)
        try:
            self._loop(logger)
            self.checkpoints.finish()
            if self._stop_requested:
                raise AnyFlowError(
                    f"stopped at step {self.step} on request; the same command resumes from there."
                )
            model = self.stage.optimizer_states["model"]
            with model.use_average():
                folder = save_pretrained(
                    self.spec.output,
                    model,
                    world,
                    recipe.flow.shift,
                    recipe.running.save_type,
                    self.spec.init,
                )
            logger.log(f"model: {folder}")
            return folder
        finally:
            logger.close()
            _set_sigterm_handler(previous_handler)

    def _loop(self, logger: MetricsLogger) -> None:
        run_config = self.recipe.running
        optimizer_config = self.recipe.optimizing
        batches: Iterator[Batch] | None = None
        while self.step < optimizer_config.steps and not self._stop_requested:
            batches = batches or iter(self.source)
            start_time = clock()
            values = self._train_step(batches)
            logger.step(self.step, values, optimizer_config.batch, clock() - start_time)
            self._log_broken_samples(logger)
            self.checkpoints.poll()
            self._sync_stop_request()
            if (
                self.step % run_config.checkpoint_every == 0
                or self.step == optimizer_config.steps
                or self._stop_requested
            ):
                self._save()
            if run_config.sample_every and self.step % run_config.sample_every == 0:
                self._log_sample_grid(logger)

    def _log_broken_samples(self, logger: MetricsLogger) -> None:
        """Log broken samples, on the terminal and in a file of each process."""
        if lines := self.source.pop_broken_samples():
            with (self.spec.output / f"skipped-{self.world.rank}.txt").open("a") as file:
                file.writelines(f"step {self.step}: {line}\n" for line in lines)
            logger.log("\n".join(f"skipped {line}" for line in lines))

    def _train_step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Accumulate gradients, check the loss, and update the weights."""
        optimizer_config = self.recipe.optimizing
        world = self.world
        global_count = optimizer_config.micro_batch * world.size
        shares: dict[str, Tensor] = {}
        step_batches: list[Batch] = []
        for number in range(optimizer_config.batch // global_count):
            batch = next(batches)
            check_batch(batch, self.recipe, self.architecture)
            step_batches.append(batch)
            first = number * global_count
            local_first = first + world.rank * optimizer_config.micro_batch
            micro = MicroBatch(
                self.step,
                first,
                local_first,
                optimizer_config.micro_batch,
                global_count,
                optimizer_config.batch,
                world,
            )
            for name, value in self.stage.accumulate(batch.to(world.device), micro).items():
                shares[name] = shares[name] + value if name in shares else value
        self.stage.finish()
        values = {
            name: float(world.sum(value.detach().clone())) / world.size
            for name, value in shares.items()
        }
        norms = {
            f"{name}_gradient": optimizer_state.clip_gradients()
            for name, optimizer_state in self.stage.optimizer_states.items()
        }
        self._check_loss({**values, **norms}, step_batches)
        for optimizer_state in self.stage.optimizer_states.values():
            optimizer_state.update()
        self.step += 1
        return {**values, **norms}

    def _check_loss(self, values: dict[str, float], step_batches: list[Batch]) -> None:
        """Raise before the update if the loss is broken.

        Raises:
            AnyFlowError: a value is not finite, or the loss is far above its mean. The batch has
                been saved.
        """
        loss = values["loss"]
        spike = self.recipe.running.spike
        broken_names = [name for name, value in values.items() if not math.isfinite(value)]
        is_spike = spike > 0 and not math.isnan(self.mean_loss) and loss > spike * self.mean_loss
        if not broken_names and not is_spike:
            self.mean_loss = (
                loss if math.isnan(self.mean_loss) else 0.95 * self.mean_loss + 0.05 * loss
            )
            return
        folder = self.spec.output / "failed"
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{self.step:08d}-rank-{self.world.rank}.safetensors"
        tensors = {
            f"{k}.{i}": v.contiguous()
            for i, b in enumerate(step_batches)
            for k, v in (("latents", b.latents), ("text", b.text))
        }
        names = [name for batch in step_batches for name in batch.names]
        save_file(
            tensors, path, metadata={"names": json.dumps(names), "values": json.dumps(values)}
        )
        cause = (
            f"{', '.join(broken_names)} not finite"
            if broken_names
            else f"loss {loss:.4g}, on average {self.mean_loss:.4g}"
        )
        raise AnyFlowError(
            f"step {self.step}: {cause}. Nothing was updated; the batch ({', '.join(names[:4])}, …)"
            f" is in {path}. Check it, lower --learning-rate, or (for a loss that is only large)"
            " raise --spike; the same command, also with another rate, resumes from the last"
            " checkpoint."
        )

    def _build_stage(self, weights: Weights, teacher: Weights | None) -> Stage:
        recipe = self.recipe
        world = self.world
        model = OptimizerState(
            build_trained_network(weights, recipe, world.device, world.mesh), recipe.optimizing
        )
        if teacher is None:
            kind = Teacher if recipe.stage == "teacher" else FlowMap
            return kind(recipe, self.plan, {"model": model})
        fake = OptimizerState(
            build_trained_network(teacher, recipe, world.device, world.mesh),
            recipe.optimizing,
            use_average=False,
        )
        share_base = recipe.adapting.lora_rank > 0
        real = (
            fake.network
            if share_base
            else build_frozen_network(teacher, recipe, world.device, world.mesh)
        )
        whole_plan = ChunkPlan((self.plan.frames,))
        scores = (
            Score(real, whole_plan, without_adapters=share_base),
            Score(fake.network, whole_plan),
        )
        return OnPolicy(recipe, self.plan, {"model": model, "fake": fake}, *scores)

    def _state_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": t
            for name, optimizer_state in self.stage.optimizer_states.items()
            for key, t in optimizer_state.tensors().items()
        }

    def _save(self) -> None:
        state: dict[str, Any] = {
            "recipe": recipe_to_dict(self.recipe),
            "base": self.base,
            "data": self.source.state_dict(),
            "learners": {
                name: optimizer_state.state()
                for name, optimizer_state in self.stage.optimizer_states.items()
            },
            "reference": _json_number(self.stage.reference),
            "usual": _json_number(self.mean_loss),
        }
        self.checkpoints.save(self.step, self._state_tensors(), state)

    def _resume(self, path: Path, state: dict[str, Any]) -> None:
        self.checkpoints.load(path, self._state_tensors())
        self.step = int(state["step"])
        for name, optimizer_state in self.stage.optimizer_states.items():
            optimizer_state.load_state(state["learners"][name])
        self.source.load_state_dict(state["data"])
        self.stage.reference = _number_from_json(state["reference"])
        self.mean_loss = _number_from_json(state["usual"])
        changes = "".join(f", {n} {old} -> {new}" for n, (old, new) in self._changes.items())
        self.startup_lines.append(f"resumes from {path}{changes}")

    def _log_sample_grid(self, logger: MetricsLogger) -> None:
        """Draw samples of the averaged model for the first prompts."""
        recipe = self.recipe
        world = self.world
        batch = self._sample_grid_batch()
        model = self.stage.optimizer_states["model"]
        with model.use_average():
            steps = recipe.running.sample_steps
            samples = generate_grid_samples(
                model.network, batch, self.plan, steps, recipe.flow.shift, recipe.running.seed
            )
        if world.is_main:
            path = self.spec.output / "samples" / f"step-{self.step:08d}.png"
            draw_sample_grid(
                path,
                samples,
                batch.captions or batch.names,
                steps,
                find_vae_pipeline(self.spec.init),
            )
            logger.log_image(self.step, path)

    def _sample_grid_batch(self) -> Batch:
        """Return the first samples of the data.

        A source of its own reads them, so they are the same in every grid and on every process.
        """
        if self._grid_batch is None:
            self._grid_batch = next(iter(self._open_source(DataShard(0, 1, ROWS)))).to(
                self.world.device
            )
        return self._grid_batch

    def _stop(self, *_: object) -> None:
        self._stop_requested = True

    def _sync_stop_request(self) -> None:
        """Share the request to stop, which may reach one process a step earlier than another."""
        if self.world.size > 1:
            flag = torch.tensor(int(self._stop_requested), device=self.world.device)
            self._stop_requested = bool(self.world.sum(flag))


def _set_sigterm_handler(handler: Any) -> Any:
    """Set the handler of SIGTERM, and return the previous one.

    Only the main thread may do that; on others it does nothing.
    """
    try:
        return signal.signal(signal.SIGTERM, handler)
    except ValueError:
        return handler


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number_from_json(value: float | None) -> float:
    return math.nan if value is None else float(value)
