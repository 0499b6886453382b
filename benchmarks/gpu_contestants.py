"""Who runs under `gpu.py`: diffusers' transformer, and engines of bundles that are exported and
built here."""

from __future__ import annotations

import dataclasses
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import describe_failure
from gpu_device import BenchmarkDevice

from anyflow_deploy import AnyFlowError, Bundle, load_bundle, load_engine
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.engines.build import BuildSettings, build_engine, settings_type
from anyflow_deploy.engines.engine import Array, Engine
from anyflow_deploy.engines.engine_folder import load_engine_folder
from anyflow_deploy.engines.registry import BACKENDS
from anyflow_deploy.export.exporter import ExportSettings, export_bundle
from anyflow_deploy.export.quantization.calibrate import CalibrationSettings, run_calibration
from anyflow_deploy.export.quantization.prompts import random_prompt_embeds
from anyflow_deploy.export.torch_run import TorchRun


def cast_to_bf16(model: torch.nn.Module) -> torch.nn.Module:
    """As `from_pretrained(torch_dtype=torch.bfloat16)` loads it: some modules stay in float32."""
    stay = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if not stay & set(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


class Diffusers:
    """diffusers' transformer in bf16 as an engine, eager or compiled."""

    def __init__(self, weights: RandomWeights, device: str, compiled: bool) -> None:
        from diffusers import AnyFlowTransformer3DModel

        config = {
            k: v for k, v in weights.architecture.as_config().items() if not k.startswith("_")
        }
        with torch.device("meta"):
            model = AnyFlowTransformer3DModel(**config)
        model = model.to_empty(device=device).eval().requires_grad_(False)
        # Buffers that the meta device lost
        fresh = AnyFlowTransformer3DModel(**{**config, "num_layers": 1})
        for name, buffer in fresh.named_buffers():
            model.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = (
                buffer.to(device)
            )
        for name, parameter in model.named_parameters():
            parameter.data.copy_(weights.read(name))
        self._model = cast_to_bf16(model)
        if compiled:
            self._model.compile()
        self._device = device

    def start(self, latents: Array, text: Array) -> TorchRun:
        """A run with the state in float32, as our engines keep it."""
        words = torch.from_numpy(text).to(self._device, torch.bfloat16)

        def velocity(z: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self._model(z.to(torch.bfloat16), t, r, words, return_dict=False)[
                0
            ]
            return made.float()

        return TorchRun(velocity, latents, self._device)

    def close(self) -> None:
        """Forget the model."""
        self._model = None


def export_random_bundle(
    weights: RandomWeights, precision: str, folder: Path, device: str
) -> Bundle:
    """A bundle; 8 bits are calibrated here, briefly: speed does not depend on the ranges."""
    # The target cpu refuses bf16, which ONNX Runtime's CPU provider lacks and AOTInductor has
    target = "cpu" if device == "cpu" and precision in ("fp32", "fp16") else "h100"
    settings = ExportSettings(precision, target=target)
    if precision in ("int8", "fp8"):
        a = weights.architecture
        shape = (4 if a.causal else 2, a.in_channels, 16, 16)
        calibration = run_calibration(
            weights,
            CalibrationSettings(
                random_prompt_embeds(weights, ("one",)), shape, steps=(1,), device=device
            ),
        )
        settings = dataclasses.replace(settings, calibration=calibration, base="bf16")
    return export_bundle(weights, folder, settings)


def build_settings(backend: str, provider: str) -> BuildSettings:
    """The defaults; an engine that falls back to wider products is kept, and says so in
    `achieved`."""
    settings = settings_type(backend)(provider=provider)
    return (
        dataclasses.replace(settings, allow_fallback=True)
        if hasattr(settings, "allow_fallback")
        else settings
    )  # type: ignore[call-arg]


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock, and hold it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def open_contestant(
    weights: RandomWeights, choice: str, folder: Path, device: str
) -> tuple[Engine, dict[str, Any]]:
    """Export, build, load; also what that took."""
    backend, precision = choice.split(":")
    kind = "causal" if weights.architecture.causal else "whole"
    path = folder / f"{kind}-{precision}"
    started = time.perf_counter()
    with hold_lock(folder / f"{path.name}.lock"):  # engines of one bundle are built at once
        if path.exists():
            bundle = load_bundle(path, verify=False)
        else:
            bundle = export_random_bundle(weights, precision, path, device)
    exported = time.perf_counter()
    provider = "cuda" if device.startswith("cuda") else "cpu"
    achieved: dict[str, Any] = {}
    if BACKENDS[backend].build_settings is not None:
        place = path / "engines" / f"{backend}-{provider}"
        if place.exists():
            record = load_engine_folder(place, verify=False).record
        else:
            record = build_engine(bundle, backend, build_settings(backend, provider)).record
        achieved = {"build_seconds": record.seconds, "achieved": record.achieved}
    engine = load_engine(bundle, backend, provider)
    return engine, {
        "export_seconds": round(exported - started, 1),
        "engine": engine.description,
        **achieved,
    }


@contextmanager
def contestants(
    names: list[str],
    weights: RandomWeights,
    folder: Path,
    machine: BenchmarkDevice,
    inputs: tuple[Array, Array],
) -> Iterator[tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
    """Everybody who can run here, warmed up; name -> engine, and name -> what is known of it."""
    engines: dict[str, Any] = {}
    known: dict[str, dict[str, Any]] = {}
    for name in names:
        machine.release_memory()
        before = machine.used_bytes()
        print(f"  loading {name}", flush=True)
        try:
            facts: dict[str, Any] = {}
            if name.startswith("diffusers"):
                engine: Any = Diffusers(weights, machine.device, name.endswith("compile"))
            else:
                engine, facts = open_contestant(weights, name, folder, machine.device)
            with engine.start(*inputs) as run:
                facts["first_step_seconds"] = round(
                    machine.seconds(lambda: run.step(1000.0, 500.0)), 3
                )
                machine.seconds(lambda: [run.step(500.0, 400.0) for _ in range(3)])
        except (AnyFlowError, ImportError, RuntimeError) as error:
            known[name] = describe_failure(error)
            print(f"    {known[name]['not_run']}", flush=True)
            continue
        known[name] = {**facts, "memory_gib": round((machine.used_bytes() - before) / 2**30, 2)}
        engines[name] = engine
    try:
        yield engines, known
    finally:
        for engine in engines.values():
            engine.close()
        machine.release_memory()
