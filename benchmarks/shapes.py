"""How good the `shapes` models are: agreement with prompts, and distance to real videos.

    python benchmarks/shapes.py runs/shapes [--prompts 100] [--seeds 3] [--picture FILE]

The folder is that of `python -m anyflow_deploy.shapes`. Prompts are held out: each names a pair of
colour and shape that training never showed. For every number of steps, each model makes a video of
each prompt; the reader (training/shapes/reader.py) tells what it shows. The models:

    teacher      guided, by Euler steps
    flow-map     the flow map before training on policy
    full         the full method: what ships

Distances are Fréchet distances to real videos of the same prompts, over random features of latents
(any_step_distance.py) and of pixels. Error bars are the deviation over seeds of the noise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from any_step_distance import VideoSet, distances, features, frechet
from common import print_result
from numpy.typing import NDArray
from torch import Tensor

from anyflow_deploy.training.shapes.evaluation import (
    Sampler,
    load_sampler,
    measure_agreement,
)
from anyflow_deploy.training.shapes.latents import encode_scenes
from anyflow_deploy.training.shapes.scenes import Scene, make_scene

COUNTS = (1, 2, 4, 8, 16, 32)
FRAMES = 5
GUIDANCE = 2.0
MODELS = {"teacher": "teacher/model", "flow-map": "flow-map/model", "full": "shapes"}
PROMPT_SEED = 1000


def held_out_scenes(count: int) -> list[Scene]:
    """Return scenes that no training data shows; not those of the training seed either."""
    return [make_scene(PROMPT_SEED, index, held_out=True) for index in range(count)]


def measure(
    sampler: Sampler, scenes: list[Scene], steps: int, seed: int, real: dict[str, VideoSet]
) -> dict[str, Any]:
    """Make a video of each prompt, and measure all of them."""
    latents = sampler.sample([scene.caption for scene in scenes], steps, seed, FRAMES)
    videos = sampler.decode(latents)
    agreement = measure_agreement(scenes, videos)
    text = real["latents"].text
    pixels = VideoSet(pixel_frames(videos), text)
    return {
        "agreement": agreement.share,
        "questions": agreement.by_question,
        "kinds": agreement.by_kind,
        "frechet_latents": distances(VideoSet(latents, text), real["latents"])["frechet"],
        "frechet_pixels": frechet_pixels(pixels, real["pixels"]),
    }


def pixel_frames(videos: NDArray[Any]) -> Tensor:
    """Return four frames of each video, a quarter as large: float32 (B, 4, 3, 16, 24)."""
    frames = torch.from_numpy(videos[:, ::5]).permute(0, 1, 4, 2, 3).float() / 255
    small = torch.nn.functional.avg_pool2d(frames.flatten(0, 1), 4)
    return small.unflatten(0, frames.shape[:2])


def frechet_pixels(generated: VideoSet, real: VideoSet) -> float:
    """Return the Fréchet distance over random features of pixels and caption."""
    first, second = features(generated), features(real)
    unit = second.std(0)
    unit = unit.clamp(min=float(unit.median()) / 4)
    return frechet(first / unit, second / unit)


def real_videos(sampler: Sampler, scenes: list[Scene], seed: int) -> dict[str, VideoSet]:
    """Encode the prompts' own scenes, and decode them: what the best model would make."""
    latents = torch.cat(
        [
            encode_scenes(sampler.pipeline.vae, seed, first, 10, 17, held_out=True)
            for first in range(0, len(scenes), 10)
        ]
    )
    text = sampler.embed([make_scene(seed, i, held_out=True).caption for i in range(len(scenes))])
    text = text[:, :32]
    return {
        "latents": VideoSet(latents, text),
        "pixels": VideoSet(pixel_frames(sampler.decode(latents)), text),
    }


def summary(values: list[float]) -> list[float]:
    """Return mean and deviation over seeds."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return [round(statistics.fmean(values), 4), round(spread, 4)]


def draw(path: Path, counts: list[int], rows: dict[str, Any]) -> None:
    """Draw agreement and both distances by number of steps, a line for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {
        "agreement": "videos that show what was asked for",
        "frechet_latents": "Fréchet distance of latents",
        "frechet_pixels": "Fréchet distance of pixels",
    }
    names = list(dict.fromkeys(key.split()[0] for key in rows))
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        for name in names:
            mean, spread = zip(*(rows[f"{name} {count}"][key] for count in counts), strict=True)
            style = {"linestyle": "--", "color": "0.4"} if name == "teacher" else {}
            axes.errorbar(counts, mean, spread, marker="o", capsize=3, label=name, **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, map(str, counts))
        axes.set(xlabel="steps", ylabel=label)
        axes.grid(alpha=0.3)
        if key == "agreement":
            axes.set_ylim(0, 1)
        else:
            axes.set_yscale("log")
    panels[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--steps", default=",".join(map(str, COUNTS)))
    options = parser.parse_args()
    import diffusers

    start = time.perf_counter()
    pipeline = diffusers.AnyFlowPipeline.from_pretrained(options.runs / "base")
    scenes = held_out_scenes(options.prompts)
    counts = [int(count) for count in options.steps.split(",")]
    rows: dict[str, Any] = {}
    real: dict[str, VideoSet] = {}
    for name in options.models.split(","):
        guidance = GUIDANCE if name == "teacher" else 1.0
        sampler = load_sampler(options.runs / MODELS[name], pipeline, guidance)
        real = real or real_videos(sampler, scenes, PROMPT_SEED)
        for count in counts:
            found = [measure(sampler, scenes, count, seed, real) for seed in range(options.seeds)]
            rows[f"{name} {count}"] = {
                **{
                    key: summary([one[key] for one in found])
                    for key in ("agreement", "frechet_latents", "frechet_pixels")
                },
                **{
                    group: {
                        key: round(statistics.fmean([one[group][key] for one in found]), 3)
                        for key in found[0][group]
                    }
                    for group in ("questions", "kinds")
                },
            }
            print(name, count, rows[f"{name} {count}"], flush=True)
    if options.picture is not None:
        draw(options.picture, counts, rows)
    seconds = round(time.perf_counter() - start)
    print_result("shapes", {"prompts": options.prompts, "seconds": seconds, "rows": rows})


if __name__ == "__main__":
    main()
