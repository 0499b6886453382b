"""Runs all benchmarks of a GPU in one command, in minutes: `make gpu`.

    python benchmarks/gpu_suite.py --output gpu.json                 # on a machine with a GPU
    python benchmarks/gpu_suite.py --output gpu.json --tiny --device cpu   # toy sizes, on the CPU

It needs torch (2.11 or newer), diffusers, and the backends to be measured. Each part is a process
of its own with a time limit, so that a part that crashes or hangs does not affect the others; the
result file is written again after every part.

The parts that are not timed run first, several at once: golden vectors through every engine, and
the builds of the large models. The timed parts follow one after the other: the device's ceilings, a
step and a clip of the 1.3B model beside diffusers, a causal clip, a training step, and the same
beside torch.compile.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import describe_machine

HERE = Path(__file__).parent
TAIL = 1500
"""Characters of a failed part's output that are kept."""


@dataclass(frozen=True)
class Part:
    """One benchmark process.

    Attributes:
        name: in the result.
        arguments: script in this folder, and its arguments.
        limit: seconds after which it is killed.
    """

    name: str
    arguments: tuple[str, ...]
    limit: float


def list_parts(options: argparse.Namespace, folder: Path) -> tuple[list[Part], list[Part]]:
    """Return the parts that run at once, and those that run alone."""
    device = ("--device", options.device)
    size = ("--tiny", *device) if options.tiny else device
    folder_options = (*size, "--folder", str(folder))
    rounds = ("--rounds", "1" if options.tiny else "3")
    whole_part = ("gpu.py", *folder_options, *rounds, "--part", "whole")
    whole_engines = options.engines
    causal = options.causal_engines
    cpu = options.device == "cpu"
    golden = [
        Part(f"golden {choice}", ("gpu_golden.py", *device, "--engines", choice), 240)
        for choice in options.golden.split(",")
        if choice
    ]
    builds = [
        *(
            Part(
                f"build {c}",
                ("gpu.py", *folder_options, "--part", "build-whole", "--engines", c),
                300,
            )
            for c in whole_engines.split(",")
        ),
        *(
            Part(
                f"build causal {c}",
                ("gpu.py", *folder_options, "--part", "build-causal", "--engines", c),
                300,
            )
            for c in causal.split(",")
        ),
    ]
    width = ("--width", "half" if cpu else "1.3b", "--compute", "float32" if cpu else "bfloat16")
    timed_parts = [
        Part("ceilings", ("gpu.py", *size, *rounds, "--part", "ceilings"), 60),
        Part(
            "whole",
            (*whole_part, "--engines", whole_engines, "--skip-compile"),
            120,
        ),
        Part(
            "causal",
            ("gpu.py", *folder_options, *rounds, "--part", "causal", "--engines", causal),
            90,
        ),
        Part(
            "train_step",
            ("train_step.py", *device, *rounds, *width, "--layers", "1" if options.tiny else "4"),
            60,
        ),
    ]
    compile_part = Part(
        "whole beside torch.compile",
        (*whole_part, "--engines", whole_engines),
        240,
    )
    if not cpu:
        timed_parts.append(compile_part)
    if options.rtx or importlib.util.find_spec("tensorrt_rtx_bindings"):
        names = ("fp32", "fp16", "bf16", "fp8")
        precisions = ",".join(f"tensorrt-rtx:{name}" for name in names)
        golden.append(
            Part(
                "golden TensorRT for RTX",
                ("gpu_golden.py", *device, "--engines", precisions),
                240,
            )
        )
        portable = (
            "gpu_golden.py",
            *device,
            "--target",
            "any",
            "--engines",
            "tensorrt-rtx:fp16",
            "--kinds",
            "bidirectional",
        )
        golden.append(Part("golden TensorRT for RTX portable", portable, 120))
        step = (
            "gpu.py",
            *folder_options,
            *rounds,
            "--part",
            "whole",
            "--engines",
            "tensorrt-rtx:bf16",
            "--skip-compile",
        )
        timed_parts.insert(2, Part("whole TensorRT for RTX", step, 240))
    skip_names = options.skip.split(",")
    return (
        [p for p in (*golden, *builds) if p.name.split(" ")[0] not in skip_names],
        [p for p in timed_parts if p.name not in skip_names],
    )


def run_part(part: Part, seconds_left: float, logs: Path) -> dict[str, Any]:
    """Run a part, and return its JSON, or the reason why there is none."""
    limit = min(part.limit, seconds_left)
    if limit < 5:
        return {"not_run": "no time was left"}
    start = time.monotonic()
    log = logs / f"{part.name.replace(' ', '_').replace(':', '_')}.log"
    with log.open("w+b") as file:
        command = [sys.executable, str(HERE / part.arguments[0]), *part.arguments[1:]]
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
    seconds = round(time.monotonic() - start, 1)
    text = log.read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.startswith('{"benchmark"')]
    if status == 0 and lines:
        return {
            "seconds": seconds,
            **{k: v for k, v in json.loads(lines[-1]).items() if k != "machine"},
        }
    reason = (
        f"ended after its limit of {limit:.0f} s" if status is None else f"exit status {status}"
    )
    return {"not_run": reason, "seconds": seconds, "output": text[-TAIL:]}


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write the results so far atomically."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(path)


def describe_gpu() -> str:
    """Return nvidia-smi's description of the GPU and its driver."""
    query = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit",
        "--format=csv,noheader",
    ]
    try:
        return subprocess.run(
            query, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {error}"


def run_all(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run every part."""
    begin = time.monotonic()
    seconds_left = lambda: options.budget - (time.monotonic() - begin)  # noqa: E731
    logs = options.output.parent
    untimed_parts, timed_parts = list_parts(options, folder)
    parts: dict[str, Any] = {}
    result = {
        "benchmark": "gpu_suite",
        "machine": describe_machine(),
        "gpu": describe_gpu(),
        "parts": parts,
    }
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {
            part.name: pool.submit(run_part, part, seconds_left(), logs) for part in untimed_parts
        }
        for name, future in futures.items():
            parts[name] = future.result()
            print(f"{seconds_left():6.0f} s left  {name}: {summarize(parts[name])}", flush=True)
            write_result(options.output, result)
    for part in timed_parts:
        parts[part.name] = run_part(part, seconds_left(), logs)
        print(
            f"{seconds_left():6.0f} s left  {part.name}: {summarize(parts[part.name])}", flush=True
        )
        write_result(options.output, result)
    result["seconds"] = round(time.monotonic() - begin, 1)
    write_result(options.output, result)
    return result


def summarize(result: dict[str, Any]) -> str:
    """Return one line for the screen."""
    if "not_run" in result:
        return f"{result['not_run']}: {result.get('output', '')[-300:]!r}"
    rest = {key: value for key, value in result.items() if key not in ("benchmark", "seconds")}
    return f"{result['seconds']} s {json.dumps(rest)[:700]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, run, print the result as one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("gpu.json"),
        help="result file; logs of the parts lie beside it",
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--budget", type=float, default=480, help="seconds for everything")
    parser.add_argument(
        "--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="untimed parts at once"
    )
    parser.add_argument("--engines", default="aotinductor:bf16,aotinductor:fp8")
    parser.add_argument("--causal-engines", default="aotinductor:bf16")
    parser.add_argument(
        "--golden",
        default="aotinductor:fp32,aotinductor:bf16,aotinductor:fp16,aotinductor:int8,aotinductor:fp8",
    )
    parser.add_argument("--folder", type=Path, help="keep bundles and engines here")
    parser.add_argument(
        "--skip", default="", help="parts to leave out: golden, build, or a timed part's name"
    )
    parser.add_argument(
        "--rtx",
        action="store_true",
        help="try TensorRT for RTX even if it does not seem to be installed",
    )
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        result = run_all(options, options.folder or Path(temporary))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
