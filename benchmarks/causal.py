"""Our stream of a causal model against diffusers' AnyFlowFARPipeline, and the effect of a window.

    python benchmarks/causal.py [--layers 2] [--rounds 3]

1.3B width, few layers, random weights, float32, 128x128 pixels (64 tokens a latent frame), 4 steps,
512 text tokens (what both pad prompts to), all cores.

1. The released chunk plan (21 latent frames): whole clips in turn, the same noise and embeddings;
   the ratio is the median of the rounds' ratios. Text encoder and VAE are left out on both sides.
2. 42 chunks with a window of 8 compressed chunks: seconds of chunk 40 over seconds of chunk 10
   (medians over rounds and over three neighbours each), with and without the window, and the
   distance between the two videos.
3. Tokens sent through the network for the cache alone, at 480x832: ours against the reference's
  re-encoding.

(diffusers' class attends to padding where tokens are not a multiple of 128, so the two clips
differ; see docs/how-to/streaming.md.)
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import print_result

from anyflow_deploy import MODELS, Schedule, load_engine, noise, stream
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.engines.engine import BundleEngine
from anyflow_deploy.engines.kv_cache import CachePlan, cache_plan
from anyflow_deploy.engines.metrics import difference
from anyflow_deploy.export.exporter import export_bundle

SIDE, STEPS, WINDOW = 16, 4, 8
TEXT = (1, 512, 4096)
LONG = (1, *(3,) * 41)


def diffusers_pipeline(weights: RandomWeights) -> Any:
    """Return diffusers' pipeline around its own transformer with the same weights."""
    from diffusers import (
        AnyFlowFARPipeline,
        AnyFlowFARTransformer3DModel,
        FlowMapEulerDiscreteScheduler,
    )

    config = {k: v for k, v in weights.architecture.as_config().items() if not k.startswith("_")}
    model = AnyFlowFARTransformer3DModel(**config).eval()
    model.load_state_dict({name: weights.read(name) for name in weights.shapes()})
    parts = {"tokenizer": None, "text_encoder": None, "vae": None}
    pipeline = AnyFlowFARPipeline(
        transformer=model, scheduler=FlowMapEulerDiscreteScheduler(shift=5.0), **parts
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def clips(engine: BundleEngine, pipeline: Any, rounds: int) -> dict[str, Any]:
    """Time whole clips in turn."""
    import torch

    latents = noise((1, 21, 16, SIDE, SIDE), 0)
    text = noise(TEXT, 1)
    tensors = torch.from_numpy(latents).permute(0, 2, 1, 3, 4), torch.from_numpy(text)

    def ours() -> None:
        for _ in stream(engine, latents, text, Schedule.uniform(STEPS)):
            pass

    def theirs() -> None:
        pipeline(
            prompt_embeds=tensors[1],
            latents=tensors[0],
            height=8 * SIDE,
            width=8 * SIDE,
            num_frames=81,
            num_inference_steps=STEPS,
            output_type="latent",
        )

    times: dict[str, list[float]] = {"stream": [], "diffusers": []}
    ours()
    for _ in range(rounds):
        for name, work in (("stream", ours), ("diffusers", theirs)):
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    ratios = np.array(times["diffusers"]) / np.array(times["stream"])
    medians = {
        f"{name}_clip_seconds": round(statistics.median(values), 2)
        for name, values in times.items()
    }
    return {
        **medians,
        "speedup": round(float(np.median(ratios)), 2),
        "speedup_min": round(float(ratios.min()), 2),
    }


def long_video(
    engine: BundleEngine, window: int | None, rounds: int
) -> tuple[list[float], list[np.ndarray]]:
    """Return the median seconds of each chunk of a long video, and its latents.

    The seconds include writing the cache.
    """
    latents = noise((1, sum(LONG), 16, SIDE, SIDE), 0)
    text = noise(TEXT, 1)
    seconds: list[list[float]] = []
    for _ in range(rounds):
        seconds.append([])
        chunk_latents = []
        start = time.perf_counter()
        for chunk in stream(
            engine, latents, text, Schedule.uniform(1), chunk_plan=LONG, window=window
        ):
            seconds[-1].append(time.perf_counter() - start)
            chunk_latents.append(chunk.latents)
            start = time.perf_counter()
    return [statistics.median(values) for values in zip(*seconds, strict=True)], chunk_latents


def growth(seconds: list[float]) -> float:
    """Return the ratio of chunk 40 to chunk 10, each the median of itself and its neighbours."""
    return round(statistics.median(seconds[39:42]) / statistics.median(seconds[9:12]), 3)


def reference_tokens(plan: CachePlan) -> int:
    """Count the tokens that the reference encodes for its cache.

    After every chunk it encodes all older ones compressed and the last two in full.
    """
    total = 0
    for count in range(1, len(plan.chunks)):
        compressed, full = plan.cached_tokens(count)
        total += compressed + full
    return total


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    architecture = dataclasses.replace(MODELS["far-1.3b"].architecture, num_layers=options.layers)
    weights = RandomWeights(architecture, "far-1.3b width")
    with tempfile.TemporaryDirectory() as folder:
        engine = load_engine(export_bundle(weights, Path(folder) / "bundle"))
        result = clips(engine, diffusers_pipeline(weights), options.rounds)
        window_seconds, window_latents = long_video(engine, WINDOW, options.rounds)
        full_seconds, full_latents = long_video(engine, None, options.rounds)
    distances = [
        difference(a, b).relative_l2 for a, b in zip(window_latents, full_latents, strict=True)
    ]
    plan = cache_plan(MODELS["far-1.3b"].architecture, None, 60, 104)
    print_result(
        "causal",
        {
            "layers": options.layers,
            "steps": STEPS,
            "rounds": options.rounds,
            **result,
            "chunk_40_over_10_windowed": growth(window_seconds),
            "chunk_40_over_10_unlimited": growth(full_seconds),
            "window": WINDOW,
            "window_relative_l2_chunk_10_20_40": [
                round(distances[chunk], 4) for chunk in (10, 20, 40)
            ],
            "cache_tokens_per_clip_480p": plan.encoded_tokens,
            "cache_tokens_per_clip_480p_reference": reference_tokens(plan),
        },
    )


if __name__ == "__main__":
    main()
