"""The causal part of `gpu.py`: a clip of the released chunk plan, and its first chunk."""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from common import describe_failure
from gpu_contestants import cast_to_bf16, open_contestant
from gpu_device import BenchmarkDevice, milliseconds
from gpu_size import Size

from anyflow_deploy import AnyFlowError, Schedule, noise, stream
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.engines.engine import Array, Engine

CAUSAL_STEPS, FRAMES_PER_LATENT = 4, 4


def causal(
    options: argparse.Namespace, size: Size, folder: Path, machine: BenchmarkDevice
) -> dict[str, Any]:
    """One clip of the causal model for every engine, and diffusers' pipeline."""
    weights = RandomWeights(size.causal, "far-1.3b")
    latents = noise(size.causal_latents, 0)
    text = noise(size.text, 1)
    frames = (latents.shape[1] - 1) * FRAMES_PER_LATENT + 1
    result: dict[str, Any] = {}
    for name in filter(None, options.engines.split(",")):
        machine.release_memory()
        before = machine.used_bytes()
        print(f"  causal {name}", flush=True)
        try:
            engine, facts = open_contestant(weights, name, folder, machine.device)
            with closing(engine):
                measure_stream(engine, latents, text, machine)
                first, total = zip(
                    *(
                        measure_stream(engine, latents, text, machine)
                        for _ in range(options.rounds)
                    ),
                    strict=True,
                )
                facts["memory_gib"] = round((machine.used_bytes() - before) / 2**30, 2)
        except (AnyFlowError, ImportError, RuntimeError) as error:
            result[name] = describe_failure(error)
            continue
        fps = round(frames / statistics.median(total), 2)
        result[name] = {
            **facts,
            "first_chunk_ms": milliseconds(first),
            "clip_ms": milliseconds(total),
            "fps": fps,
        }
    if not options.skip_diffusers:
        print("  causal diffusers", flush=True)
        try:
            times = diffusers_clips(weights, latents, text, machine, options.rounds)
        except (ImportError, RuntimeError) as error:  # the engines' numbers stay
            result["diffusers"] = describe_failure(error)
            return result
        result["diffusers"] = {
            "clip_ms": milliseconds(times),
            "fps": round(frames / statistics.median(times), 2),
        }
    return result


def measure_stream(
    engine: Engine, latents: Array, text: Array, machine: BenchmarkDevice
) -> tuple[float, float]:
    """Seconds to the first chunk and to the last."""
    machine.wait()
    started, first = time.perf_counter(), 0.0
    for chunk in stream(engine, latents, text, Schedule.uniform(CAUSAL_STEPS)):
        first = first or time.perf_counter() - started
        del chunk
    return first, time.perf_counter() - started


def diffusers_clips(
    weights: RandomWeights, latents: Array, text: Array, machine: BenchmarkDevice, rounds: int
) -> list[float]:
    """Seconds of a clip of diffusers' pipeline, latents only, bf16."""
    from causal import diffusers_pipeline

    pipeline = diffusers_pipeline(weights)
    pipeline.transformer = cast_to_bf16(pipeline.transformer)
    pipeline.to(machine.device)
    z = torch.from_numpy(latents).permute(0, 2, 1, 3, 4).to(machine.device, torch.bfloat16)
    words = torch.from_numpy(text).to(machine.device, torch.bfloat16)
    sides = {
        "height": 8 * latents.shape[3],
        "width": 8 * latents.shape[4],
        "num_frames": (latents.shape[1] - 1) * 4 + 1,
    }

    def clip() -> None:
        pipeline(
            prompt_embeds=words,
            latents=z,
            num_inference_steps=CAUSAL_STEPS,
            output_type="latent",
            **sides,
        )

    clip()
    return [machine.seconds(clip) for _ in range(rounds)]
