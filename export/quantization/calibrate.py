"""Calibration: measures how large the inputs of quantized layers become.

8-bit engines round activations on a fixed grid, whose width has to be known beforehand. The time
embedding scales every block's input, so ranges of one schedule are not those of another. Here
ModelOpt's quantizers observe whole rollouts of many schedules (see `rollouts`), prompts and seeds,
in float32. The result is maxima: per tensor, and per input channel of linear layers, which
SmoothQuant needs.

Unless a calibration is thorough, it saves work where the ranges stay the same: several prompts run
as one batch while a forward stays small (`BATCH_TOKENS`), the zeros behind the prompts are computed
once (`prompts.collapse_padding`), and prompts are left out once the ranges stand still (`GROWTH`).

Maxima can be merged in any order, so an interrupted calibration can resume: after each rollout they
are saved in a checkpoint beside the output, with the settings they belong to.

Legend: B prompts of a batch, F latent frames, C channels, H W latent rows and columns, L text
tokens, D text channels.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal
from pathlib import Path
from typing import Any

import numpy as np

from anyflow_deploy.bundle.atomic_io import write_text_atomically
from anyflow_deploy.bundle.outputs import OutputFile
from anyflow_deploy.checkpoints.checkpoint import schedule_shift
from anyflow_deploy.checkpoints.weights import Weights
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.sampler import noise
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.export.quantization.calibration_checkpoint import CalibrationCheckpoint, Maxima
from anyflow_deploy.export.quantization.prompts import CalibrationPrompts, collapse_padding
from anyflow_deploy.export.quantization.rollouts import (
    SWEEPS,
    calibration_schedules,
    chunk_plan,
    count_tokens,
    count_transitions,
    run_rollout,
)
from anyflow_deploy.models import Architecture
from anyflow_deploy.progress import NullProgress, Progress
from anyflow_deploy.quantization.calibration import CALIBRATION, Calibration, TensorRange
from anyflow_deploy.quantization.layers import quantizable_layers
from anyflow_deploy.schedule import Schedule

STEPS = (1, 2, 4, 8)
BATCH_TOKENS = 4096
"""Tokens of a batch's forward. A large model at the size it generates has more of them in one
video, which then runs alone: its memory is what it was without batches."""
GROWTH = 0.01
"""Ranges stand still when no tensor's grew by more than this over the last `STILL_PROMPTS`."""
STILL_PROMPTS = 2
_TOOLS = ("anyflow-deploy", "torch", "nvidia-modelopt")
_LONGEST_NAME = 255  # bytes; what file systems allow at most
_FIVE_DIGITS = Context(prec=5, rounding=ROUND_CEILING)
"""Digits of a range in the file: 14B has 2.4 million ranges."""


@dataclass(frozen=True)
class CalibrationSettings:
    """The prompts, sizes and schedules that a calibration runs.

    Attributes:
        text: prompts and their embeddings.
        shape: (F, C, H, W) of the latents.
        steps: step counts of the uniform schedules; the sweeps run in addition.
        seeds: of the noise, which differs between prompts, too.
        device: torch device.
        checkpoint_path: file that keeps finished rollouts; None for none.
        notify: called with a message for the user: that an unfinished calibration is resumed, or
            why it cannot be; that prompts were left out.
        thorough: run every prompt, alone, with all rows of its text.
    """

    text: CalibrationPrompts
    shape: tuple[int, int, int, int]
    steps: tuple[int, ...] = STEPS
    seeds: tuple[int, ...] = (0,)
    device: str = "cpu"
    checkpoint_path: Path | None = None
    notify: Callable[[str], None] = lambda text: None
    thorough: bool = False


@dataclass(frozen=True)
class _Rollout:
    name: str
    prompts: slice
    seed: int
    schedule: Schedule
    ends_batch: bool


def run_calibration(
    weights: Weights, settings: CalibrationSettings, progress: Progress | None = None
) -> Calibration:
    """Run the rollouts of a calibration, and return the measured ranges.

    Args:
        weights: a checkpoint, or random weights.
        settings: see `CalibrationSettings`.
        progress: shows the progress of the work.

    Raises:
        AnyFlowError: a tensor that became infinite or NaN, by name; or ModelOpt is not installed.
        BackendError: torch cannot use the device.
    """
    progress = progress or NullProgress()
    a = weights.architecture
    shift = schedule_shift(weights)
    with progress.stage("fingerprint of the weights"):
        weights_fingerprint = weights.fingerprint
    text, last_text_count = settings.text.prompt_embeds, 1
    if not settings.thorough:
        text, last_text_count = collapse_padding(text)
    batch = 1 if settings.thorough else choose_batch(a, settings.shape, *text.shape[:2])
    rollouts = list(_list_rollouts(settings, batch, shift))
    checkpoint = CalibrationCheckpoint(
        settings.checkpoint_path, _checkpoint_key(settings, weights_fingerprint, shift, batch)
    )
    finished_names = checkpoint.finished_rollouts
    rollouts_left = [rollout for rollout in rollouts if rollout.name not in finished_names]
    if checkpoint.note or finished_names:
        count = f"{len(rollouts) - len(rollouts_left)} of {len(rollouts)} rollouts"
        settings.notify(checkpoint.note or f"resuming after {count} ({settings.checkpoint_path})")
    if not settings.thorough and stands_still(checkpoint.history, batch):
        rollouts_left = []
    if rollouts_left:
        with progress.stage("loading the network"):
            observed_network = _ObservedNetwork(weights, settings.device, last_text_count)
        total = sum(
            count_transitions(a, settings.shape[0], rollout.schedule) for rollout in rollouts_left
        )
        maxima = checkpoint.maxima
        with progress.stage(f"{len(rollouts_left)} of {len(rollouts)} rollouts", total) as advance:
            for rollout in rollouts_left:
                latents = _rollout_noise(settings, rollout)
                maxima = observed_network.observe(
                    latents, text[rollout.prompts], rollout, advance, maxima
                )
                checkpoint.save(rollout.name, maxima, rollout.ends_batch)
                if not settings.thorough and stands_still(checkpoint.history, batch):
                    break
    return _build_calibration(weights, settings, weights_fingerprint, shift, batch, checkpoint)


def check_calibration(calibration: Calibration, weights: Weights) -> None:
    """Refuse a calibration of other weights.

    Raises:
        AnyFlowError: another architecture, or other weights of the same.
    """
    check_architecture(calibration, weights.architecture)
    if calibration.weights != (actual := weights.fingerprint):
        raise AnyFlowError(
            f"this calibration is of the weights {calibration.weights[:12]}…, and"
            f" {weights.source.location} holds {actual[:12]}…. {_CALIBRATE_ADVICE}"
        )


def check_architecture(calibration: Calibration, a: Architecture) -> None:
    """Refuse a calibration of another architecture; this reads no weights.

    Raises:
        AnyFlowError: another architecture, or a range with another number of channels than its
            layer has.
    """
    config = a.as_config()
    other = calibration.config
    if other != config:
        keys = sorted(
            key for key in other.keys() | config.keys() if other.get(key) != config.get(key)
        )
        changes = ", ".join(
            f"{key} {other.get(key)!r} against {config.get(key)!r}" for key in keys[:3]
        )
        raise AnyFlowError(
            f"the calibration is of another architecture than the weights: {changes}."
            f" {_CALIBRATE_ADVICE}"
        )
    for layer, (inputs, _) in quantizable_layers(a).items():
        tensor_range = calibration.tensors.get(f"{layer}.input")
        if tensor_range is not None and len(tensor_range.channels or ()) != inputs:
            count = len(tensor_range.channels or ())
            raise AnyFlowError(
                f"the calibration has ranges of {count} channels for {layer}.input, which has"
                f" {inputs}. {_CALIBRATE_ADVICE}"
            )


_CALIBRATE_ADVICE = (
    "Ranges hold for the weights they were measured on: calibrate these with anyflow-calibrate."
)


def choose_batch(
    a: Architecture, shape: tuple[int, int, int, int], prompts: int, text_tokens: int
) -> int:
    """Return how many prompts run at once: as many as `BATCH_TOKENS` hold, and at least one.

    `shape` is (F, C, H, W) of the latents.
    """
    return min(prompts, max(1, BATCH_TOKENS // count_tokens(a, shape, text_tokens)))


def stands_still(history: Sequence[Mapping[str, float]], batch: int) -> bool:
    """Return whether no tensor's range grew by more than `GROWTH` over `STILL_PROMPTS`.

    Args:
        history: after each batch, the largest value of every tensor so far.
        batch: prompts of a batch.
    """
    before = len(history) - 1 - math.ceil(STILL_PROMPTS / batch)
    if before < 0:
        return False
    old = history[before]
    return all(
        largest <= (1 + GROWTH) * old.get(name, 0.0) for name, largest in history[-1].items()
    )


def _list_rollouts(settings: CalibrationSettings, batch: int, shift: float) -> Iterator[_Rollout]:
    schedules = calibration_schedules(settings.steps, shift)
    last = (settings.seeds[-1], next(reversed(schedules)))
    for first in range(0, len(settings.text.prompts), batch):
        prompts = slice(first, min(first + batch, len(settings.text.prompts)))
        count = prompts.stop - first
        which = f"prompt {first}" if count == 1 else f"prompts {first} to {prompts.stop - 1}"
        for seed in settings.seeds:
            for name, schedule in schedules.items():
                ends_batch = (seed, name) == last
                yield _Rollout(f"{which}, seed {seed}, {name}", prompts, seed, schedule, ends_batch)


def _rollout_noise(settings: CalibrationSettings, rollout: _Rollout) -> Array:
    """Return the noise of a rollout, (B, F, C, H, W).

    Every prompt has another noise, so eight prompts are also eight samples of the noise.
    """
    return np.concatenate(
        [
            noise((1, *settings.shape), rollout.seed + _SEED_STRIDE * prompt)
            for prompt in range(rollout.prompts.start, rollout.prompts.stop)
        ]
    )


_SEED_STRIDE = 1_000_003  # no seed of `--seeds 0,1,2` equals that of another prompt


class _ObservedNetwork:
    """A network whose quantizers record maxima and round nothing."""

    def __init__(self, weights: Weights, device: str, last_text_count: int) -> None:
        from anyflow_deploy.export.quantization.modelopt_loader import load_modelopt
        from anyflow_deploy.export.torch_engine import TorchEngine

        self._tools = load_modelopt()
        self._engine = TorchEngine(weights, device)
        self._quantizers = self._tools.insert_observers(
            self._engine.network, quantizable_layers(weights.architecture), last_text_count
        )

    def observe(
        self, latents: Array, text: Array, rollout: _Rollout, advance: Any, maxima: Maxima
    ) -> Maxima:
        """Run one rollout, and return the maxima of all rollouts so far."""
        run_rollout(self._engine, latents, text, rollout.schedule, on_step=lambda step: advance(1))
        new_maxima: Maxima = {}
        for name, quantizer in self._quantizers.items():
            largest = quantizer.compute_amax()
            if largest is None:
                continue
            values = largest.float().cpu()
            if not bool(values.isfinite().all()):
                raise AnyFlowError(
                    f"{name} became infinite or NaN at {rollout.name}, which no 8-bit grid can"
                    " represent. Check the checkpoint with anyflow-validate, or calibrate with a"
                    " smaller video."
                )
            new_maxima[name] = values if name not in maxima else values.maximum(maxima[name])
        return {**maxima, **new_maxima}


def _checkpoint_key(
    settings: CalibrationSettings, weights_fingerprint: str, shift: float, batch: int
) -> dict[str, Any]:
    """Return everything that the ranges depend on."""
    return {
        "weights": weights_fingerprint,
        "prompts": list(settings.text.prompts),
        "text": settings.text.source,
        "shape": list(settings.shape),
        "steps": list(settings.steps),
        "seeds": list(settings.seeds),
        "shift": shift,
        "sweeps": [list(sweep.timesteps) for sweep in SWEEPS],
        "batch": batch,
        "still": None if settings.thorough else [GROWTH, STILL_PROMPTS],
    }


def _build_calibration(
    weights: Weights,
    settings: CalibrationSettings,
    weights_fingerprint: str,
    shift: float,
    batch: int,
    checkpoint: CalibrationCheckpoint,
) -> Calibration:
    prompts = list(settings.text.prompts)
    run = len(checkpoint.history) * batch
    if run < len(prompts):
        settings.notify(
            f"the ranges stand still after {run} of {len(prompts)} prompts; the others were left"
            " out. --thorough runs them all."
        )
    return Calibration(
        config=weights.architecture.as_config(),
        weights=weights_fingerprint,
        prompts=prompts[:run],
        prompts_left_out=prompts[run:],
        thorough=settings.thorough,
        batch=batch,
        chunks=list(chunk_plan(weights.architecture, settings.shape[0])),
        steps=list(settings.steps),
        seeds=list(settings.seeds),
        shift=shift,
        shapes=[[1, *settings.shape]],
        sweeps=[list(sweep.timesteps) for sweep in SWEEPS],
        text=settings.text.source,
        tools={tool: importlib.metadata.version(tool) for tool in _TOOLS},
        tensors={
            name: _tensor_range(values.tolist(), name.endswith(".input"))
            for name, values in sorted(checkpoint.maxima.items())
        },
    )


def _tensor_range(values: list[float], channels: bool) -> TensorRange:
    channel_maxima = [round_up(value) for value in values]
    return TensorRange(amax=max(channel_maxima), channels=channel_maxima if channels else None)


def round_up(value: float) -> float:
    """Round a number >= 0 up to five significant digits."""
    return float(_FIVE_DIGITS.plus(Decimal(repr(value))))


def write_calibration(path: Path | OutputFile, calibration: Calibration) -> None:
    """Write a `calibration.json` atomically."""
    write_text_atomically(path, calibration.model_dump_json(by_alias=True) + "\n")


def calibration_checkpoint_path(output: Path) -> Path:
    """Return the path of the checkpoint that belongs to an output."""
    name = f".{output.name or CALIBRATION}.rollouts"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(output.name)).hexdigest()[:16]}.rollouts"
    return output.with_name(name)
