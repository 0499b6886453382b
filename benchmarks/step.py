"""One transition: ONNX Runtime on our graph against diffusers' eager transformer.

    python benchmarks/step.py [--layers 2] [--rounds 9] [--aotinductor]

1.3B width (12 heads x 128, feed-forward 8960, 512 text tokens of 4096), 5 x 15 x 26 = 1,950 video
tokens, float32, random weights, all cores. Both models are in one process and take turns, so that a
changing clock rate affects both; the ratio is the median of the rounds' ratios. The bare products
take turns with them: all linear layers and attentions of one transition in torch, with nothing
between them. The time beyond that is a model's overhead. Peak memory is that of two further
processes that hold one model each. With --aotinductor our bundle is also compiled for torch (with
--max-autotune if that is given), and takes its turn, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import print_result, run_python

from anyflow_deploy import MODELS
from anyflow_deploy.engines.engine_folder import load_engine_folder

SHAPE = (1, 5, 16, 30, 52)
TEXT = (1, 512, 4096)

_INPUTS = f"""
import numpy as np, os, resource, sys
generator = np.random.default_rng(0)
latents = generator.standard_normal({SHAPE}).astype("float32")
text = generator.standard_normal({TEXT}).astype("float32")
"""
_ONE_OURS = (
    _INPUTS
    + """
from anyflow_deploy import load_engine
engine = load_engine(sys.argv[1], sys.argv[2])
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


def prepare_models(layers: int, folder: Path) -> tuple[Path, Path]:
    """Save a checkpoint of 1.3B width with diffusers, and export a bundle from it."""
    import torch
    from diffusers import AnyFlowTransformer3DModel

    from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
    from anyflow_deploy.checkpoints.random_weights import random_parameter
    from anyflow_deploy.export.exporter import export_bundle

    architecture = dataclasses.replace(MODELS["1.3b"].architecture, num_layers=layers)
    model = AnyFlowTransformer3DModel(
        **{k: v for k, v in architecture.as_config().items() if not k.startswith("_")}
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_parameter(name, tuple(parameter.shape), 0))
    model.save_pretrained(folder / "checkpoint")
    export_bundle(open_checkpoint(folder / "checkpoint"), folder / "bundle")
    return folder / "checkpoint", folder / "bundle"


def seconds(work: Callable[[], Any]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bare_products(layers: int) -> Callable[[], Any]:
    """Return a function that computes the products and attentions of one transition in torch."""
    import torch
    from torch.nn.functional import linear, scaled_dot_product_attention

    a = MODELS["1.3b"].architecture
    d = a.inner_dim
    tokens = SHAPE[1] * (SHAPE[3] // 2) * (SHAPE[4] // 2)
    text_tokens = TEXT[1]
    block = [
        (tokens, d, d, 6),
        (text_tokens, d, d, 2),
        (tokens, d, a.ffn_dim, 1),
        (tokens, a.ffn_dim, d, 1),
    ]
    conditioning = [(text_tokens, a.text_dim, d, 1), (text_tokens, d, d, 1)]
    shapes = [(*shape[:3], shape[3] * layers) for shape in block] + conditioning
    linears = [(torch.randn(m, k), torch.randn(n, k), times) for m, k, n, times in shapes]
    heads = (1, a.num_attention_heads)
    video = torch.randn(*heads, tokens, a.attention_head_dim)
    text = torch.randn(*heads, text_tokens, a.attention_head_dim)

    def work() -> None:
        with torch.no_grad():
            for x, weight, times in linears:
                for _ in range(times):
                    linear(x, weight)
            for _ in range(layers):
                scaled_dot_product_attention(video, video, video)
                scaled_dot_product_attention(video, text, text)

    return work


def compile_bundle(bundle: Path, max_autotune: bool) -> dict[str, Any]:
    """Build the bundle's AOTInductor engine, and measure the build.

    It runs in a process of its own: a child's peak is at least its parent's size when it began.
    """
    arguments = [str(bundle), "--backend", "aotinductor"]
    if max_autotune:
        arguments.append("--max-autotune")
    build = run_python("from anyflow_deploy.cli.build import main; main()", *arguments)
    record = load_engine_folder(bundle / "engines" / "aotinductor-cpu").record
    size = sum(file.bytes for file in record.files.values())
    return {
        "aotinductor_build_seconds": record.seconds,
        "aotinductor_build_peak_mib": round(build["peak_mib"]),
        "aotinductor_engine_mb": round(size / 1e6, 2),
    }


def time_in_turns(
    checkpoint: Path, bundle: Path, rounds: int, backends: Sequence[str]
) -> dict[str, Any]:
    """Time all in turn, and compare their velocities."""
    import numpy as np
    import torch

    from anyflow_deploy import load_bundle, load_engine, noise
    from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
    from anyflow_deploy.engines.metrics import difference
    from anyflow_deploy.export.diffusers_engine import DiffusersEngine

    latents, text = noise(SHAPE, 0), noise(TEXT, 1)
    runs = {name: load_engine(bundle, name).start(latents, text) for name in backends}
    runs["diffusers"] = DiffusersEngine(open_checkpoint(checkpoint)).start(latents, text)
    works: dict[str, Callable[[], Any]] = {
        name: functools.partial(run.velocity, 900, 500) for name, run in runs.items()
    }
    exact = works["diffusers"]()
    distances = {
        f"{name}_relative_l2": difference(works[name](), exact).relative_l2 for name in backends
    }
    works["bare_products"] = bare_products(load_bundle(bundle).manifest.architecture.num_layers)
    for work in (*works.values(), *works.values()):  # ONNX Runtime's arena settles in two runs
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for index in range(rounds):
        for name in sorted(works, reverse=bool(index % 2)):
            times[name].append(seconds(works[name]))
    medians = {
        f"{name}_seconds": round(statistics.median(values), 3) for name, values in times.items()
    }
    bests = {f"{name}_best_seconds": round(min(values), 3) for name, values in times.items()}
    speedups = {}
    for name in backends:
        ratios = np.array(times["diffusers"]) / np.array(times[name])
        prefix = "" if name == "onnxruntime" else f"{name}_"
        ratios_by_key = {
            "speedup": np.median(ratios),
            "speedup_min": ratios.min(),
            "speedup_max": ratios.max(),
        }
        speedups |= {
            f"{prefix}{key}": round(float(value), 2) for key, value in ratios_by_key.items()
        }
    return {
        **medians,
        **bests,
        **speedups,
        **distances,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--aotinductor", action="store_true")
    parser.add_argument("--max-autotune", action="store_true")
    options = parser.parse_args()
    backends = ["onnxruntime", *(["aotinductor"] if options.aotinductor else [])]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = prepare_models(options.layers, Path(folder))
        build_result = compile_bundle(bundle, options.max_autotune) if options.aotinductor else {}
        peaks = {
            f"{name}_peak_mib": round(run_python(_ONE_OURS, str(bundle), name)["peak_mib"])
            for name in backends
        }
        peaks["diffusers_peak_mib"] = round(run_python(_ONE_DIFFUSERS, str(checkpoint))["peak_mib"])
        result = time_in_turns(checkpoint, bundle, options.rounds, backends)
    print_result(
        "step", {"layers": options.layers, "tokens": 1950, **result, **build_result, **peaks}
    )


if __name__ == "__main__":
    main()
