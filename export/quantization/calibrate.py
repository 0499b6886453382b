"""Calibration: measures how large the inputs of quantized layers become.

8-bit engines round activations on a fixed grid, whose width has to be known beforehand. The time
embedding scales every block's input, so ranges of one schedule are not those of another. Here
ModelOpt's quantizers observe whole rollouts of many schedules (see `rollouts`), prompts and seeds,
in float32. The result is maxima: per tensor, and per input channel of linear layers, which
SmoothQuant needs.

Maxima can be merged in any order, so an interrupted calibration can resume: after each rollout they
are saved in a checkpoint beside the output, with the settings they belong to.

Legend: F latent frames, C channels, H W latent rows and columns, L text tokens, D text channels.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal
from pathlib import Path
from typing import Any

from anyflow_deploy.bundle.atomic_io import write_text_atomically
from anyflow_deploy.bundle.outputs import OutputFile
from anyflow_deploy.checkpoints.checkpoint import schedule_shift
from anyflow_deploy.checkpoints.weights import Weights
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.sampler import noise
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.export.quantization.calibration_checkpoint import CalibrationCheckpoint, Maxima
from anyflow_deploy.export.quantization.prompts import CalibrationPrompts
from anyflow_deploy.export.quantization.rollouts import (
    SWEEPS,
    calibration_schedules,
    count_transitions,
    run_rollout,
)
from anyflow_deploy.models import Architecture
from anyflow_deploy.progress import NullProgress, Progress
from anyflow_deploy.quantization.calibration import CALIBRATION, Calibration, TensorRange
from anyflow_deploy.quantization.layers import quantizable_layers
from anyflow_deploy.schedule import Schedule

STEPS = (1, 2, 4, 8)
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
            why it cannot be.
    """

    text: CalibrationPrompts
    shape: tuple[int, int, int, int]
    steps: tuple[int, ...] = STEPS
    seeds: tuple[int, ...] = (0,)
    device: str = "cpu"
    checkpoint_path: Path | None = None
    notify: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class _Rollout:
    name: str
    prompt: int
    seed: int
    schedule: Schedule


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
    rollouts = list(_list_rollouts(settings, shift))
    checkpoint = CalibrationCheckpoint(
        settings.checkpoint_path, _checkpoint_key(settings, weights_fingerprint, shift)
    )
    maxima = checkpoint.maxima
    finished_names = checkpoint.finished_rollouts
    rollouts_left = [rollout for rollout in rollouts if rollout.name not in finished_names]
    if checkpoint.note or finished_names:
        count = f"{len(rollouts) - len(rollouts_left)} of {len(rollouts)} rollouts"
        settings.notify(checkpoint.note or f"resuming after {count} ({settings.checkpoint_path})")
    if rollouts_left:
        with progress.stage("loading the network"):
            observed_network = _ObservedNetwork(weights, settings.device)
        total = sum(
            count_transitions(a, settings.shape[0], rollout.schedule) for rollout in rollouts_left
        )
        with progress.stage(f"{len(rollouts_left)} of {len(rollouts)} rollouts", total) as advance:
            for rollout in rollouts_left:
                latents = _rollout_noise(settings, rollout)
                text = settings.text.prompt_embeds[rollout.prompt][None]
                maxima = observed_network.observe(latents, text, rollout, advance, maxima)
                checkpoint.save(rollout.name, maxima)
    return _build_calibration(weights, settings, weights_fingerprint, shift, maxima)


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


def _list_rollouts(settings: CalibrationSettings, shift: float) -> Iterator[_Rollout]:
    for prompt in range(len(settings.text.prompts)):
        for seed in settings.seeds:
            for name, schedule in calibration_schedules(settings.steps, shift).items():
                yield _Rollout(f"prompt {prompt}, seed {seed}, {name}", prompt, seed, schedule)


def _rollout_noise(settings: CalibrationSettings, rollout: _Rollout) -> Array:
    """Return the noise of a rollout.

    Every prompt has another noise, so eight prompts are also eight samples of the noise.
    """
    return noise((1, *settings.shape), rollout.seed + _SEED_STRIDE * rollout.prompt)


_SEED_STRIDE = 1_000_003  # no seed of `--seeds 0,1,2` equals that of another prompt


class _ObservedNetwork:
    """A network whose quantizers record maxima and round nothing."""

    def __init__(self, weights: Weights, device: str) -> None:
        from anyflow_deploy.export.quantization.modelopt_loader import load_modelopt
        from anyflow_deploy.export.torch_engine import TorchEngine

        self._tools = load_modelopt()
        self._engine = TorchEngine(weights, device)
        self._quantizers = self._tools.insert_observers(
            self._engine.network, quantizable_layers(weights.architecture)
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
    settings: CalibrationSettings, weights_fingerprint: str, shift: float
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
    }


def _build_calibration(
    weights: Weights,
    settings: CalibrationSettings,
    weights_fingerprint: str,
    shift: float,
    maxima: Maxima,
) -> Calibration:
    return Calibration(
        config=weights.architecture.as_config(),
        weights=weights_fingerprint,
        prompts=list(settings.text.prompts),
        steps=list(settings.steps),
        seeds=list(settings.seeds),
        shift=shift,
        shapes=[[1, *settings.shape]],
        sweeps=[list(sweep.timesteps) for sweep in SWEEPS],
        text=settings.text.source,
        tools={tool: importlib.metadata.version(tool) for tool in _TOOLS},
        tensors={
            name: _tensor_range(values.tolist(), name.endswith(".input"))
            for name, values in sorted(maxima.items())
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
