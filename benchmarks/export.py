"""Measures the time and peak memory of an export, beside a plain copy of the same bytes.

    python benchmarks/export.py [--folder DIR]

1. The 14B graph traced and written as ONNX, without weights (limits: 120 s, 2 GiB).
2. A 1.3B-size checkpoint of random float32 weights (5.7 GB, in shards) exported to fp16 (limit: 3
   GiB), beside a plain copy: the same number of bytes read, written in blocks and synced.

Every measurement is a process of its own; peaks are the operating system's. It needs 15 GB of disk
in --folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from common import print_result, run_python

_TRACE = """
import time
started = time.perf_counter()
from anyflow_deploy import MODELS
from anyflow_deploy.export.onnx_graph import onnx_from_traced
from anyflow_deploy.export.trace import trace_graph
from anyflow_deploy.shape_ranges import widest_ranges
architecture = MODELS["14b"].architecture
graph = trace_graph("transition", architecture, widest_ranges(architecture), "fp16", fused=False)
model = onnx_from_traced(graph, 20)
assert len(model.graph.initializers) > 1000
print(time.perf_counter() - started)
"""
_EXPORT = """
import contextlib, json, sys, time
from pathlib import Path
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.export.exporter import ExportSettings, export_bundle

class Clock:
    seconds = {}
    @contextlib.contextmanager
    def stage(self, name, total=None):
        started = time.perf_counter()
        yield lambda amount: None
        self.seconds[name.split(" (")[0]] = round(time.perf_counter() - started, 1)

settings = ExportSettings("fp16", overwrite=True)
export_bundle(open_checkpoint(sys.argv[1]), Path(sys.argv[2]), settings, Clock())
print(json.dumps(Clock.seconds))
"""
_SHARD = 2_000_000_000
_BLOCK = 64 << 20


def save_random_checkpoint(folder: Path, name: str) -> int:
    """Save a sharded float32 checkpoint in diffusers' layout, and return its size in bytes."""
    import torch

    from anyflow_deploy import MODELS
    from anyflow_deploy.checkpoints.checkpoint import STEM
    from anyflow_deploy.checkpoints.random_weights import RandomWeights
    from anyflow_deploy.checkpoints.safetensors_stream import build_header

    weights = RandomWeights(MODELS[name].architecture, name)
    shards: list[list[str]] = [[]]
    size = 0
    for parameter, shape in weights.shapes().items():
        shards[-1].append(parameter)
        size += 4 * torch.Size(shape).numel()
        if size > _SHARD * len(shards):
            shards.append([])
    folder.mkdir()
    weight_map = {}
    for index, names in enumerate(shards, 1):
        file_name = f"{STEM}-{index:05d}-of-{len(shards):05d}.safetensors"
        head, _ = build_header({n: ("F32", weights.shapes()[n]) for n in names}, {"format": "pt"})
        with (folder / file_name).open("wb") as file:
            file.write(head)
            for parameter in names:
                file.write(memoryview(weights.read(parameter).numpy()).cast("B"))
                weight_map[parameter] = file_name
            os.fsync(file.fileno())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(weights.architecture.as_config()))
    return size


def copy_seconds(checkpoint: Path, bytes_to_write: int, folder: Path) -> float:
    """Time reading all of the checkpoint and writing `bytes_to_write` bytes, synced.

    Any export takes at least that long.
    """
    start = time.perf_counter()
    block = bytearray(_BLOCK)
    with (folder / "copy").open("wb", buffering=0) as target:
        for path in sorted(checkpoint.glob("*.safetensors")):
            with path.open("rb", buffering=0) as source:
                while count := source.readinto(block):
                    share = min(count, bytes_to_write)
                    target.write(memoryview(block)[:share])
                    bytes_to_write -= share
        os.fsync(target.fileno())
    (folder / "copy").unlink()
    return time.perf_counter() - start


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=None, help="folder for 15 GB of files")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    trace = run_python(_TRACE)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        size = save_random_checkpoint(folder / "checkpoint", "1.3b")
        rounds = []
        for _ in range(options.rounds):
            export = run_python(_EXPORT, str(folder / "checkpoint"), str(folder / "bundle"))
            stages = json.loads(export["output"])
            bytes_to_write = (folder / "bundle" / "weights.safetensors").stat().st_size
            copy_time = copy_seconds(folder / "checkpoint", bytes_to_write, folder)
            writing_time = stages["writing weights"]
            rounds.append((export["seconds"], export["peak_mib"], writing_time, copy_time))
        seconds, peaks, writing, copies = zip(*rounds, strict=True)
    print_result(
        "export",
        {
            "trace_14b_seconds": round(float(trace["output"]), 1),
            "trace_14b_peak_mib": round(trace["peak_mib"]),
            "checkpoint_bytes": size,
            "bundle_bytes": bytes_to_write,
            "rounds": options.rounds,
            "export_seconds": round(statistics.median(seconds), 1),
            "export_peak_mib": round(max(peaks)),
            "export_stages": stages,
            "writing_seconds": round(statistics.median(writing), 1),
            "plain_copy_seconds": round(statistics.median(copies), 1),
        },
    )


if __name__ == "__main__":
    main()
