"""Everything that is worth knowing of a GPU in one command, in minutes: `make gpu`.

    python benchmarks/gpu_suite.py --output gpu.json                 # on a machine with a GPU
    python benchmarks/gpu_suite.py --output gpu.json --tiny --device cpu   # in small, without one

It needs torch (2.11 or newer), diffusers, and whatever backends are to be tried. Each part is a
process of its own with a limit of time, so that a part that crashes or hangs costs only itself. The
result file is written again after every part, and a part that did not run says why.

1. Timed, one after the other: the device's ceilings, a training step, a step and a clip of the 1.3B
   model in diffusers. They need no build, so they are there whatever happens later.
2. Not timed, several at once: golden vectors through every engine, and the builds of the large
   models. This phase ends early enough for the next one.
3. Timed, one after the other: the engines that were built, in turns with diffusers, then with
   torch.compile, and a causal clip.

On a CPU the limits and the budget are four times as long; `--patience` sets another factor.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import describe_machine

HERE = Path(__file__).parent
TAIL = 1500
"""Characters of a failed part's output that are kept."""
SHORTEST = 5
"""Seconds that a part needs at least; with fewer left it is not started."""
RESERVE = 0.3
"""Share of the budget that the builds leave for what is timed after them."""
MODULES = {
    "tensorrt": "tensorrt",
    "tensorrt rtx": "tensorrt_rtx_bindings",
    "torch-tensorrt": "torch_tensorrt",
    "onnxruntime": "onnxruntime",
    "aotinductor": "torch",
}
"""What has to be installed for a backend; the backend itself says what else it lacks."""


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: in the result.
        words: script in this folder, and its arguments.
        limit: seconds after which it is ended.
        module: what has to be installed for it; empty: nothing but torch and diffusers.
    """

    name: str
    words: tuple[str, ...]
    limit: float
    module: str = ""


class Suite:
    """The parts, in three phases, and the clock that they share."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self._started = time.monotonic()
        self._running: set[subprocess.Popen[bytes]] = set()
        self.parts: dict[str, Any] = {}
        self.result: dict[str, Any] = {
            "benchmark": "gpu_suite",
            "machine": describe_machine(),
            "gpu": describe_gpu(),
            "parts": self.parts,
        }
        self._device = ("--device", options.device)
        self._size = ("--tiny", *self._device) if options.tiny else self._device
        if options.layers:
            self._size += ("--layers", str(options.layers))
        self._kept = (*self._size, "--folder", str(folder))
        self._rounds = ("--rounds", "1" if options.tiny else "3")
        self._skipped = options.skip.split(",")

    def seconds_left(self) -> float:
        """Return how much of the budget is left."""
        spent = time.monotonic() - self._started
        return float(self.options.budget * self.options.patience) - spent

    def run(self) -> None:
        """Run every part."""
        for part in self._parts_without_builds():
            self._record(part, self._run_part(part))
        reserve = RESERVE * self.options.budget * self.options.patience
        pool = ThreadPoolExecutor(self.options.jobs)
        # The limit is known when a part starts, not when it is queued
        futures = {
            pool.submit(self._run_part, part, reserve): part
            for part in (*self._builds(), *self._goldens())
        }
        try:
            for future in as_completed(futures):
                self._record(futures[future], future.result())
        finally:  # also where somebody stops it: nothing more is started
            pool.shutdown(wait=False, cancel_futures=True)
        for part in self._parts_with_builds():
            self._record(part, self._run_part(part))
        self.result["seconds"] = round(time.monotonic() - self._started, 1)
        write_result(self.options.output, self.result)

    def end_processes(self) -> None:
        """End what is still running."""
        for process in list(self._running):
            kill_group(process)

    def _record(self, part: Part, found: dict[str, Any]) -> None:
        if found.get("not_run") == "skipped":
            return
        self.parts[part.name] = found
        print(f"{self.seconds_left():6.0f} s left  {part.name}: {summarize(found)}", flush=True)
        write_result(self.options.output, self.result)

    def _parts_without_builds(self) -> list[Part]:
        width, layers = ("tiny", "1") if self.options.tiny else ("1.3b", "4")
        compute = ("--compute", "bfloat16", "--width", width, "--layers", layers)
        return [
            Part("ceilings", ("gpu.py", *self._size, *self._rounds, "--part", "ceilings"), 60),
            Part(
                "train_step",
                ("train_step.py", *self._device, *self._rounds, *compute),
                60,
            ),
            self._whole("whole diffusers", "diffusers", 75, "--skip-diffusers"),
        ]

    def _whole(self, name: str, engines: str, limit: float, *more: str) -> Part:
        words = ("gpu.py", *self._kept, *self._rounds, "--part", "whole", "--engines", engines)
        return Part(name, (*words, *more), limit)

    def _builds(self) -> list[Part]:
        chosen = [("whole", "build", c) for c in split(self.options.engines)]
        chosen += [("causal", "build causal", c) for c in split(self.options.causal_engines)]
        return [
            Part(
                f"{name} {choice}",
                ("gpu.py", *self._kept, "--part", f"build-{kind}", "--engines", choice),
                300,
                module_of(choice),
            )
            for kind, name, choice in chosen
        ]

    def _goldens(self) -> list[Part]:
        script = ("gpu_golden.py", *self._device)
        parts = [
            Part(
                f"golden {choice} {kind}",
                (*script, "--engines", choice, "--kinds", kind),
                240,
                module_of(choice),
            )
            for choice in split(self.options.golden)
            for kind in ("bidirectional", "causal")
        ]
        rtx = MODULES["tensorrt rtx"]
        precisions = "tensorrt:fp32,tensorrt:fp16,tensorrt:bf16,tensorrt:fp8"
        portable = ("--rtx", "portable", "--engines", "tensorrt:fp16", "--kinds", "bidirectional")
        words = (*script, "--rtx", "current", "--engines", precisions)
        return [
            *parts,
            Part("golden TensorRT for RTX", words, 240, rtx),
            Part("golden TensorRT for RTX portable", (*script, *portable), 120, rtx),
        ]

    def _parts_with_builds(self) -> list[Part]:
        whole = ",".join(self._ready("build", "build-whole", self.options.engines))
        causal = ",".join(self._ready("build causal", "build-causal", self.options.causal_engines))
        words = ("gpu.py", *self._kept, *self._rounds, "--part", "causal", "--engines", causal)
        rtx = self._whole(
            "whole TensorRT for RTX", "tensorrt:bf16", 120, "--rtx", "current", "--skip-compile"
        )
        parts = [
            Part(rtx.name, rtx.words, rtx.limit, MODULES["tensorrt rtx"]),
            self._whole(
                "whole beside torch.compile",
                ",".join(name for name in ("diffusers_compile", whole) if name),
                240,
                "--skip-compile",
            ),
        ]
        timed = [
            (self._whole("whole", whole, 120, "--skip-compile"), whole),
            (Part("causal", words, 90), causal),
        ]
        for part, engines in timed:
            if not engines:
                self._record(part, {"not_run": "no engine was built for it"})
        return [*(part for part, engines in timed if engines), *parts]

    def _ready(self, name: str, key: str, choices: str) -> list[str]:
        """Return the engines that were built, and opened, without an accident."""
        if "build" in self._skipped:
            return split(choices)
        builds = {choice: self.parts.get(f"{name} {choice}", {}) for choice in split(choices)}
        return [
            choice
            for choice, found in builds.items()
            if "not_run" not in found.get(key, {}).get(choice, {"not_run": ""})
        ]

    def _run_part(self, part: Part, reserve: float = 0) -> dict[str, Any]:
        """Run a part; returns its JSON, or why there is none."""
        if part.name.split(" ")[0] in self._skipped or part.name in self._skipped:
            return {"not_run": "skipped"}
        if part.module and importlib.util.find_spec(part.module) is None:
            return {"not_run": f"{part.module} is not installed"}
        limit = min(part.limit * self.options.patience, self.seconds_left() - reserve)
        if limit < SHORTEST:
            return {"not_run": "no time was left"}
        started = time.monotonic()
        log = self.options.output.parent / f"{part.name.replace(' ', '_').replace(':', '_')}.log"
        with log.open("w+b") as file:
            words = [sys.executable, str(HERE / part.words[0]), *part.words[1:]]
            process = subprocess.Popen(
                words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            self._running.add(process)
            try:
                status: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                kill_group(process)
                status = None
            self._running.discard(process)
        return read_result(log, status, limit, round(time.monotonic() - started, 1))


def split(choices: str) -> list[str]:
    """Return what is between the commas."""
    return [choice for choice in choices.split(",") if choice]


def module_of(choice: str) -> str:
    """Return what has to be installed for BACKEND:PRECISION."""
    return MODULES.get(choice.split(":")[0], "")


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process with its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_result(log: Path, status: int | None, limit: float, seconds: float) -> dict[str, Any]:
    """Return what a part printed last, or how it ended and the end of what it said."""
    text = log.read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.startswith('{"benchmark"')]
    if status == 0 and lines:
        found = {k: v for k, v in json.loads(lines[-1]).items() if k != "machine"}
        return {"seconds": seconds, **found}
    if status is None:
        reason = f"ended after its limit of {limit:.0f} s"
    elif status < 0:
        reason = f"ended by {signal.Signals(-status).name}"
    else:
        reason = f"exit status {status}"
    return {"not_run": reason, "seconds": seconds, "output": text[-TAIL:]}


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write the result so far, whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(path)


def describe_gpu() -> str:
    """Return what nvidia-smi says of the GPU and its driver."""
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


def summarize(found: dict[str, Any]) -> str:
    """Return one line for the screen."""
    if "not_run" in found:
        return f"{found['not_run']}: {found.get('output', '')[-300:]!r}"
    rest = {key: value for key, value in found.items() if key not in ("benchmark", "seconds")}
    return f"{found['seconds']} s {json.dumps(rest)[:700]}"


def read_options(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments."""
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
        "--patience", type=float, help="multiplies the budget and the limits (GPU: 1, CPU: 4)"
    )
    parser.add_argument(
        "--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="untimed parts at once"
    )
    parser.add_argument("--layers", type=int, help="of the large models, where time is short")
    parser.add_argument(
        "--engines",
        default="aotinductor:bf16,aotinductor:fp8,onnxruntime:fp16,tensorrt:bf16,tensorrt:fp8",
    )
    parser.add_argument(
        "--causal-engines", default="aotinductor:bf16,onnxruntime:fp16,tensorrt:bf16"
    )
    precisions = ("fp32", "bf16", "fp16", "int8", "fp8")
    golden = [f"aotinductor:{precision}" for precision in precisions]
    golden += ["onnxruntime:fp32", "onnxruntime:fp16", "tensorrt:fp32", "tensorrt:fp16"]
    golden += ["tensorrt:bf16", "tensorrt:fp8"]
    parser.add_argument("--golden", default=",".join(golden))
    parser.add_argument("--folder", type=Path, help="keep bundles and engines here")
    parser.add_argument(
        "--skip",
        default="",
        help="parts to leave out: a part's name, or its first word (golden, build, whole)",
    )
    options = parser.parse_args(words)
    if options.patience is None:
        options.patience = 4.0 if options.device == "cpu" else 1.0
    return options


def main(words: Sequence[str] | None = None) -> None:
    """Read the arguments, run, print the result as one JSON line."""
    options = read_options(words)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    with tempfile.TemporaryDirectory() as temporary:
        suite = Suite(options, options.folder or Path(temporary))
        try:
            suite.run()
        finally:
            suite.end_processes()
    print(json.dumps(suite.result))


if __name__ == "__main__":
    main()
