"""One GPU, everything that runs on it: milliseconds per step, per clip and to the first chunk, side
by side.

    python benchmarks/gpu.py                        # 1.3B, 480x832, 81 frames (32,760 tokens)
    python benchmarks/gpu.py --tiny --device cpu    # the same on a toy, to see that it works

Contestants, in turns within each round, random weights, the same noise and embeddings:

- `diffusers`: its transformer, eager, bf16; `diffusers_compile`: the same under torch.compile.
- `BACKEND_PRECISION` for each of --engines: a bundle exported here, built here, run through
  `load_engine`.

A backend that is missing on the machine is named in the result with its reason, and the others go
on.

1. A step: time of `--repeats` transitions and one synchronization, divided; medians over rounds,
  ratios per round.
2. A clip at 1, 2, 4, 8 steps, without text encoder and VAE.
3. A causal clip at 4 steps (the released chunk plan): seconds to its first chunk, seconds of the
   whole, frames per second, against diffusers' `AnyFlowFARPipeline` with the same weights.
4. What the device can do: the matrix products and attentions of one step alone (the floor of a
   step; its share of a contestant's time is how close that comes), the rate of one large product,
   and of a copy.

Memory is what the device has less of after a contestant's first steps than before it was loaded
(allocator's blocks included), so it is comparable between runtimes.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import print_result

from anyflow_deploy import (
    MODELS,
    AnyFlowError,
    Architecture,
    Bundle,
    Schedule,
    load_bundle,
    load_engine,
    noise,
    sample,
    stream,
)
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.engines.build import BuildSettings, build_engine, settings_type
from anyflow_deploy.engines.engine import Array, Engine
from anyflow_deploy.engines.engine_folder import load_engine_folder
from anyflow_deploy.engines.registry import BACKENDS
from anyflow_deploy.export.exporter import ExportSettings, export_bundle
from anyflow_deploy.export.quantization.calibrate import CalibrationSettings, run_calibration
from anyflow_deploy.export.quantization.prompts import random_prompt_embeds
from anyflow_deploy.export.torch_run import TorchRun

STEPS, CAUSAL_STEPS, FRAMES_PER_LATENT = (1, 2, 4, 8), 4, 4
ENGINES = "aotinductor:bf16,aotinductor:fp8,tensorrt:bf16,tensorrt:fp8"

Work = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Size:
    """What is run.

    Attributes:
        model, causal: rows of the model table.
        latents, causal_latents: (1, F, C, H, W).
        text: (1, L, D).
        peak: side of the large product, elements of the copy.
    """

    model: Architecture
    causal: Architecture
    latents: tuple[int, ...]
    causal_latents: tuple[int, ...]
    text: tuple[int, ...]
    peak: tuple[int, int]


def sizes(tiny: bool, layers: int | None) -> Size:
    """The released 1.3B at 480p, or toys."""
    if tiny:
        model = MODELS["tiny"].architecture
        causal = MODELS["far-tiny"].architecture
        frames = sum(causal.chunk_partition or ())
        video = (1, 3, 16, 8, 12)
        clip = (1, frames, 16, 8, 16)
        words = 32
        peak = (256, 1 << 20)
    else:
        model = MODELS["1.3b"].architecture
        causal = MODELS["far-1.3b"].architecture
        video = (1, 21, 16, 60, 104)
        clip = (1, 21, 16, 60, 104)
        words = 512
        peak = (8192, 1 << 29)
    if layers is not None:
        model, causal = (dataclasses.replace(a, num_layers=layers) for a in (model, causal))
    return Size(model, causal, video, clip, (1, words, model.text_dim), peak)


class BenchmarkDevice:
    """The device: waits for it, and knows how much of its memory is taken."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.cuda = device.startswith("cuda")

    def wait(self) -> None:
        """Until everything queued is done."""
        if self.cuda:
            torch.cuda.synchronize()

    def used_bytes(self) -> int:
        """Bytes in use by anybody; 0 on the CPU, where benchmarks/memory.py measures processes."""
        if not self.cuda:
            return 0
        free, total = torch.cuda.mem_get_info()
        return total - free

    def release_memory(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def seconds(self, work: Work) -> float:
        """Wall time of a piece of work, done."""
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started

    def describe(self) -> dict[str, Any]:
        """Name, driver's and CUDA's versions, clocks' neighbours."""
        if not self.cuda:
            return {"device": "cpu", "threads": torch.get_num_threads()}
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }


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
    settings = ExportSettings(
        precision, target="cpu" if device == "cpu" and precision != "bf16" else "h100"
    )
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


def open_contestant(
    weights: RandomWeights, choice: str, folder: Path, device: str
) -> tuple[Engine, dict[str, Any]]:
    """Export, build, load; also what that took."""
    backend, precision = choice.split(":")
    kind = "causal" if weights.architecture.causal else "whole"
    path = folder / f"{kind}-{precision}"
    started = time.perf_counter()
    bundle = (
        load_bundle(path, verify=False)
        if path.exists()
        else export_random_bundle(weights, precision, path, device)
    )
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
    size: Size,
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
            known[name] = {"not_run": str(error).split("\n")[0][:300]}
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


def steps_in_turn(
    engines: dict[str, Any],
    inputs: tuple[Array, Array],
    machine: BenchmarkDevice,
    rounds: int,
    repeats: int,
) -> Any:
    """Seconds of a step by contestant, one for each round."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for index in range(rounds):
        for name in sorted(engines, reverse=bool(index % 2)):
            with engines[name].start(*inputs) as run:
                work = lambda run=run: [run.step(900.0, 500.0) for _ in range(repeats)]  # noqa: E731
                times[name].append(machine.seconds(work) / repeats)
    return times


def clips_in_turn(
    engines: dict[str, Any], inputs: tuple[Array, Array], machine: BenchmarkDevice, rounds: int
) -> dict[str, Any]:
    """Median milliseconds of a clip by contestant and number of steps."""
    times: dict[str, dict[int, list[float]]] = {name: {n: [] for n in STEPS} for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            for n in STEPS:
                work = lambda engine=engine, n=n: sample(engine, *inputs, Schedule.uniform(n))  # noqa: E731
                times[name][n].append(machine.seconds(work))
    return {
        name: {str(n): milliseconds(values) for n, values in rows.items()}
        for name, rows in times.items()
    }


def milliseconds(values: list[float]) -> float:
    """The median."""
    return round(1e3 * statistics.median(values), 3)


def floor_seconds(
    a: Architecture, size: Size, machine: BenchmarkDevice, rounds: int
) -> dict[str, float]:
    """The products and attentions of one step with nothing between them, one layer timed and
    multiplied; and the peaks."""
    from torch.nn.functional import linear, scaled_dot_product_attention

    d, words = a.inner_dim, size.text[1]
    tokens = size.latents[1] * (size.latents[3] // 2) * (size.latents[4] // 2)
    make = lambda *shape: torch.randn(*shape, device=machine.device, dtype=torch.bfloat16)  # noqa: E731
    shapes = (
        [(tokens, d, d)] * 6
        + [(words, d, d)] * 2
        + [(tokens, d, a.ffn_dim), (tokens, a.ffn_dim, d)]
    )
    pairs = {shape: (make(shape[0], shape[1]), make(shape[2], shape[1])) for shape in set(shapes)}
    heads = (1, a.num_attention_heads)
    video = make(*heads, tokens, a.attention_head_dim)
    text = make(*heads, words, a.attention_head_dim)

    def products() -> None:
        for shape in shapes:
            linear(*pairs[shape])

    def attentions() -> None:
        scaled_dot_product_attention(video, video, video)
        scaled_dot_product_attention(video, text, text)

    side, elements = size.peak
    square = make(side, side)
    source = make(elements)
    target = make(elements)
    works: dict[str, Work] = {
        "products": products,
        "attentions": attentions,
        "square": lambda: square @ square,
        "copy": lambda: target.copy_(source),
    }
    found = {}
    with torch.no_grad():
        for name, work in works.items():
            machine.seconds(work)
            found[name] = statistics.median(machine.seconds(work) for _ in range(rounds))
    return {
        "products_ms_per_step": round(1e3 * found["products"] * a.num_layers, 3),
        "attentions_ms_per_step": round(1e3 * found["attentions"] * a.num_layers, 3),
        "large_product_tflops": round(2 * side**3 / found["square"] / 1e12, 1),
        "copy_gb_per_second": round(2 * 2 * elements / found["copy"] / 1e9, 1),
    }


def whole(
    options: argparse.Namespace, size: Size, folder: Path, machine: BenchmarkDevice
) -> dict[str, Any]:
    """The bidirectional part."""
    weights = RandomWeights(size.model, "1.3b")
    inputs = noise(size.latents, 0), noise(size.text, 1)
    floor = floor_seconds(size.model, size, machine, options.rounds)
    bound = floor["products_ms_per_step"] + floor["attentions_ms_per_step"]
    theirs = (
        []
        if options.skip_diffusers
        else ["diffusers"]
        if options.skip_compile
        else ["diffusers", "diffusers_compile"]
    )
    names = [*theirs, *options.engines.split(",")]
    with contestants(names, weights, size, folder, machine, inputs) as (engines, known):
        times = steps_in_turn(engines, inputs, machine, options.rounds, options.repeats)
        clips = clips_in_turn(engines, inputs, machine, max(1, options.rounds // 2))
    base = next((n for n in ("diffusers_compile", "diffusers") if n in times), None)
    for name, values in times.items():
        step = milliseconds(values)
        known[name] |= {
            "step_ms": step,
            "clip_ms": clips[name],
            "floor_share": round(bound / step, 3),
        }
        if base is not None:
            known[name][f"times_as_fast_as_{base}"] = round(
                float(np.median(np.array(times[base]) / np.array(values))), 2
            )
    return {"floor": floor, "contestants": known}


def causal(
    options: argparse.Namespace, size: Size, folder: Path, machine: BenchmarkDevice
) -> dict[str, Any]:
    """One clip of the causal model for every engine, and diffusers' pipeline."""
    weights = RandomWeights(size.causal, "far-1.3b")
    latents = noise(size.causal_latents, 0)
    text = noise(size.text, 1)
    frames = (latents.shape[1] - 1) * FRAMES_PER_LATENT + 1
    result: dict[str, Any] = {}
    for name in options.engines.split(","):
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
            result[name] = {"not_run": str(error).split("\n")[0][:300]}
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
        times = diffusers_clips(weights, latents, text, machine, options.rounds)
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


def device_ceilings(
    options: argparse.Namespace, size: Size, folder: Path, machine: BenchmarkDevice
) -> dict[str, float]:
    """The floor of a step and the device's rates, alone."""
    return floor_seconds(size.model, size, machine, options.rounds)


def build_ahead(
    architecture: Architecture,
    name: str,
    options: argparse.Namespace,
    folder: Path,
    machine: BenchmarkDevice,
) -> Any:
    """Export and build what a later run with the same --folder measures."""
    result: dict[str, Any] = {}
    for choice in options.engines.split(","):
        try:
            engine, result[choice] = open_contestant(
                RandomWeights(architecture, name), choice, folder, machine.device
            )
            engine.close()
        except (AnyFlowError, ImportError, RuntimeError) as error:
            result[choice] = {"not_run": str(error).split("\n")[0][:300]}
    return result


PARTS: dict[str, Callable[[argparse.Namespace, Size, Path, BenchmarkDevice], Any]] = {
    "whole": whole,
    "causal": causal,
    "ceilings": device_ceilings,
    "build-whole": lambda options, size, folder, machine: build_ahead(
        size.model, "1.3b", options, folder, machine
    ),
    "build-causal": lambda options, size, folder, machine: build_ahead(
        size.causal, "far-1.3b", options, folder, machine
    ),
}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--engines", default=ENGINES, help="backend:precision, …")
    parser.add_argument(
        "--layers", type=int, help="fewer than the model has, where minutes are short"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2, help="steps between two synchronizations")
    parser.add_argument(
        "--part",
        choices=tuple(PARTS),
        help="only this one; build-… fills --folder and measures nothing",
    )
    parser.add_argument("--skip-compile", action="store_true")
    parser.add_argument("--skip-diffusers", action="store_true")
    parser.add_argument(
        "--folder", type=Path, help="keep bundles and engines here, and use those that are there"
    )
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(
            "torch sees no CUDA device here. To see that the program works: --tiny --device cpu"
        )
    machine = BenchmarkDevice(options.device)
    size = sizes(options.tiny, options.layers)
    result: dict[str, Any] = {
        "device": machine.describe(),
        "rounds": options.rounds,
        "layers": size.model.num_layers,
    }
    result["tokens"] = size.latents[1] * (size.latents[3] // 2) * (size.latents[4] // 2)
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True, parents=True)
        for name in [options.part] if options.part else ["whole", "causal"]:
            print(f"{name}:", flush=True)
            result[name] = PARTS[name](options, size, folder, machine)
    print_result("gpu", result)


if __name__ == "__main__":
    main()
