"""One transition: ONNX Runtime on our graph against diffusers' eager transformer.

    python benchmarks/step.py [--layers 2] [--rounds 9]

1.3B width (12 heads x 128, feed-forward 8960, 512 text tokens of 4096), 5 x 15 x 26 = 1,950 video tokens, float32,
random weights, all cores. Both models live in one process and take turns, so that a drifting clock hits both; the ratio
is the median of the rounds' ratios. A third takes turns with them: the bare products, all linear layers and attentions
of one transition in torch with nothing between them. What a model takes beyond that is its overhead; what the processor
can do in float32 is the floor of both. Peak memory is of two further processes that hold one model each.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import finish, python

from anyflow_deploy import MODELS

SHAPE, TEXT = (1, 5, 16, 30, 52), (1, 512, 4096)

_INPUTS = f"""
import numpy as np, os, resource, sys
generator = np.random.default_rng(0)
latents = generator.standard_normal({SHAPE}).astype("float32")
text = generator.standard_normal({TEXT}).astype("float32")
"""
_ONE_ORT = (
    _INPUTS
    + """
from anyflow_deploy import load_engine
engine = load_engine(sys.argv[1])
with engine.start(latents, text) as run:
    run.step(900, 500)
"""
)
_ONE_DIFFUSERS = (
    _INPUTS
    + """
import torch
from diffusers import AnyFlowTransformer3DModel
model = AnyFlowTransformer3DModel.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    times = torch.full((1, 5), 900.0), torch.full((1, 5), 500.0)
    model(torch.from_numpy(latents), *times, torch.from_numpy(text), return_dict=False)
"""
)


def prepared(layers: int, folder: Path) -> tuple[Path, Path]:
    """A checkpoint of 1.3B width as diffusers saves it, and the bundle exported from it."""
    import torch
    from diffusers import AnyFlowTransformer3DModel

    from anyflow_deploy.export.checkpoint import open_checkpoint
    from anyflow_deploy.export.exporter import export_bundle
    from anyflow_deploy.export.random_weights import random_parameter

    architecture = dataclasses.replace(MODELS["1.3b"].architecture, num_layers=layers)
    model = AnyFlowTransformer3DModel(**{k: v for k, v in architecture.as_config().items() if not k.startswith("_")})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_parameter(name, tuple(parameter.shape), 0))
    model.save_pretrained(folder / "checkpoint")
    export_bundle(open_checkpoint(folder / "checkpoint"), folder / "bundle")
    return folder / "checkpoint", folder / "bundle"


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def bare_products(layers: int) -> Callable[[], Any]:
    """The matrix products and attentions of one transition, as torch computes them, and nothing else."""
    import torch
    from torch.nn.functional import linear, scaled_dot_product_attention

    a = MODELS["1.3b"].architecture
    d, tokens, words = a.inner_dim, SHAPE[1] * (SHAPE[3] // 2) * (SHAPE[4] // 2), TEXT[1]
    block = [(tokens, d, d, 6), (words, d, d, 2), (tokens, d, a.ffn_dim, 1), (tokens, a.ffn_dim, d, 1)]
    once = [(words, a.text_dim, d, 1), (words, d, d, 1)]
    shapes = [(*shape[:3], shape[3] * layers) for shape in block] + once
    linears = [(torch.randn(m, k), torch.randn(n, k), times) for m, k, n, times in shapes]
    heads = (1, a.num_attention_heads)
    video, text = torch.randn(*heads, tokens, a.attention_head_dim), torch.randn(*heads, words, a.attention_head_dim)

    def work() -> None:
        with torch.no_grad():
            for x, weight, times in linears:
                for _ in range(times):
                    linear(x, weight)
            for _ in range(layers):
                scaled_dot_product_attention(video, video, video)
                scaled_dot_product_attention(video, text, text)

    return work


def timed(checkpoint: Path, bundle: Path, rounds: int) -> dict[str, Any]:
    """Both in turn; also how far apart their velocities are."""
    import numpy as np
    import torch

    from anyflow_deploy import load_engine, noise
    from anyflow_deploy.engines.metrics import difference
    from anyflow_deploy.export.checkpoint import open_checkpoint
    from anyflow_deploy.export.reference import TorchEngine

    latents, text = noise(SHAPE, 0), noise(TEXT, 1)
    engine = load_engine(bundle)
    ours, ours_bundle = engine.start(latents, text), engine.bundle
    theirs = TorchEngine(open_checkpoint(checkpoint)).start(latents, text)
    works = {
        "onnxruntime": lambda: ours.velocity(900, 500),
        "diffusers": lambda: theirs.velocity(900, 500),
        "bare_products": bare_products(ours_bundle.manifest.architecture.num_layers),
    }
    apart = difference(works["onnxruntime"](), works["diffusers"]())
    for work in (*works.values(), *works.values()):  # ONNX Runtime's arena settles in two runs
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for index in range(rounds):
        for name in sorted(works, reverse=bool(index % 2)):
            times[name].append(seconds(works[name]))
    ratios = np.array(times["diffusers"]) / np.array(times["onnxruntime"])
    medians = {f"{name}_seconds": round(statistics.median(values), 3) for name, values in times.items()}
    bests = {f"{name}_best_seconds": round(min(values), 3) for name, values in times.items()}
    spread = {"speedup_min": round(float(ratios.min()), 2), "speedup_max": round(float(ratios.max()), 2)}
    return {
        **medians, **bests, "speedup": round(float(np.median(ratios)), 2), **spread,
        "relative_l2": apart.relative_l2, "threads": torch.get_num_threads(), "rounds": rounds,
    }  # fmt: skip


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = prepared(options.layers, Path(folder))
        peaks = {
            "onnxruntime_peak_mib": round(python(_ONE_ORT, str(bundle))["peak_mib"]),
            "diffusers_peak_mib": round(python(_ONE_DIFFUSERS, str(checkpoint))["peak_mib"]),
        }
        result = timed(checkpoint, bundle, options.rounds)
    finish("step", {"layers": options.layers, "tokens": 1950, **result, **peaks})


if __name__ == "__main__":
    main()
