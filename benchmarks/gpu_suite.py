"""Runs all benchmarks of a GPU in one command, in minutes: `make gpu`.

    python benchmarks/gpu_suite.py --output gpu.json                 # on a machine with a GPU
    python benchmarks/gpu_suite.py --output gpu.json --tiny --device cpu   # toy sizes, on the CPU

It needs torch (2.11 or newer), diffusers, and the backends to be measured. Each part is a process
of its own with a time limit, so that a part that crashes or hangs does not affect the others. The
result file is written again after every part, and a part that did not run says why.

1. Timed, one after the other: the device's ceilings, a training step, a step and a clip of the 1.3B
   model in diffusers. They need no build, so a crash of an engine cannot cost them.
2. Not timed, several at once: the builds of the large models, and golden vectors through every
   engine. This phase ends early enough for the next one.
3. Timed, one after the other: the engines that were built, in turns with diffusers, then with
   torch.compile, and a causal clip beside diffusers'.

On a CPU the limits and the budget are four times as long; `--patience` sets another factor.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import describe_machine

HERE = Path(__file__).parent
TAIL = 1500
"""Characters of a failed part's output that are kept."""
SHORTEST = 5
"""Seconds that a part needs at least; with fewer left it is not started."""
RESERVE = 0.2
"""Share of the budget that the builds leave for what is timed after them."""
MODULES = {
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "torch-tensorrt": "torch_tensorrt",
    "onnxruntime": "onnxruntime",
    "aotinductor": "torch",
}
"""What has to be installed for a backend; the backend itself says what else it lacks."""


@dataclass(frozen=True)
class Part:
    """One benchmark process.

    Attributes:
        name: in the result.
        arguments: script in this folder, and its arguments.
        limit: seconds after which it is killed.
        module: what has to be installed for it; empty: nothing but torch and diffusers.
        not_run: why it cannot run, where that is known already.
    """

    name: str
    arguments: tuple[str, ...]
    limit: float
    module: str = ""
    not_run: str = ""


class Suite:
    """The parts, in three phases, and the clock that they share."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self._start = time.monotonic()
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
        self._folder_options = (*self._size, "--folder", str(folder))
        self._rounds = ("--rounds", "1" if options.tiny else "3")
        self._skip_names = options.skip.split(",")

    def seconds_left(self) -> float:
        """Return how much of the budget is left."""
        spent = time.monotonic() - self._start
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
        finally:
            # Also after Ctrl-C: no further part starts
            pool.shutdown(wait=False, cancel_futures=True)
        for part in self._parts_with_builds():
            self._record(part, self._run_part(part))

    def finish(self) -> None:
        """Kill what still runs, give every part without an outcome a reason, write the result."""
        for process in list(self._running):
            kill_group(process)
        parts = (*self._parts_without_builds(), *self._builds(), *self._goldens())
        for part in (*parts, *self._parts_with_builds()):
            if not self._is_skipped(part):
                self.parts.setdefault(part.name, {"not_run": "the suite was ended before it"})
        self.result["seconds"] = round(time.monotonic() - self._start, 1)
        write_result(self.options.output, self.result)

    def _is_skipped(self, part: Part) -> bool:
        return bool({part.name, part.name.split(" ")[0]} & set(self._skip_names))

    def _record(self, part: Part, outcome: dict[str, Any]) -> None:
        if outcome.get("not_run") == "skipped":
            return
        self.parts[part.name] = outcome
        print(f"{self.seconds_left():6.0f} s left  {part.name}: {summarize(outcome)}", flush=True)
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
        arguments = ("gpu.py", *self._folder_options, *self._rounds, "--part", "whole")
        return Part(name, (*arguments, "--engines", engines, *more), limit)

    def _builds(self) -> list[Part]:
        chosen = [("whole", "build", c) for c in split(self.options.engines)]
        chosen += [("causal", "build causal", c) for c in split(self.options.causal_engines)]
        return [
            Part(
                f"{name} {choice}",
                ("gpu.py", *self._folder_options, "--part", f"build-{kind}", "--engines", choice),
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
        portable = ("--target", "any", "--engines", "tensorrt-rtx:fp16", "--kinds", "bidirectional")
        name = "golden tensorrt-rtx:fp16 portable"
        return [*parts, Part(name, (*script, *portable), 120, MODULES["tensorrt-rtx"])]

    def _parts_with_builds(self) -> list[Part]:
        whole = ",".join(self._ready("build", "build-whole", self.options.engines))
        causal = ",".join(self._ready("build causal", "build-causal", self.options.causal_engines))
        arguments = ("gpu.py", *self._folder_options, *self._rounds, "--part", "causal")
        names = ",".join(name for name in ("diffusers_compile", whole) if name)
        parts = [
            Part("causal", (*arguments, "--engines", causal), 90),
            self._whole("whole beside torch.compile", names, 240, "--skip-compile"),
        ]
        with_engines = self._whole("whole", whole, 120, "--skip-compile")
        if not whole:
            with_engines = replace(with_engines, not_run="no engine was built for it")
        return [with_engines, *parts]

    def _ready(self, name: str, key: str, choices: str) -> list[str]:
        """Return the engines that were built, and opened, without an accident."""
        if "build" in self._skip_names:
            return split(choices)
        builds = {choice: self.parts.get(f"{name} {choice}", {}) for choice in split(choices)}
        return [
            choice
            for choice, outcome in builds.items()
            if "not_run" not in outcome.get(key, {}).get(choice, {"not_run": ""})
        ]

    def _run_part(self, part: Part, reserve: float = 0) -> dict[str, Any]:
        """Run a part, and return its JSON, or the reason why there is none."""
        if self._is_skipped(part):
            return {"not_run": "skipped"}
        if part.not_run:
            return {"not_run": part.not_run}
        if part.module and importlib.util.find_spec(part.module) is None:
            return {"not_run": f"{part.module} is not installed"}
        limit = min(part.limit * self.options.patience, self.seconds_left() - reserve)
        if limit < SHORTEST:
            return {"not_run": "no time was left"}
        start = time.monotonic()
        log = self.options.output.parent / f"{part.name.replace(' ', '_').replace(':', '_')}.log"
        with log.open("w+b") as file:
            command = [sys.executable, str(HERE / part.arguments[0]), *part.arguments[1:]]
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            self._running.add(process)
            try:
                status: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                kill_group(process)
                status = None
            self._running.discard(process)
        return read_result(log, status, limit, round(time.monotonic() - start, 1))


def check_installed() -> None:
    """Check that the package is installed: exports and engines record its version.

    Raises:
        SystemExit: it is only on the path, with the command that installs it.
    """
    try:
        importlib.metadata.version("anyflow-deploy")
    except importlib.metadata.PackageNotFoundError:
        sys.exit(
            "anyflow-deploy is not installed here, and no engine could be built. Run, in the"
            " checkout: python3 -m pip install --no-deps --no-build-isolation -e ."
        )


def split(choices: str) -> list[str]:
    """Return the names between the commas."""
    return [choice for choice in choices.split(",") if choice]


def module_of(choice: str) -> str:
    """Return the module that BACKEND:PRECISION needs."""
    return MODULES.get(choice.split(":")[0], "")


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_result(log: Path, status: int | None, limit: float, seconds: float) -> dict[str, Any]:
    """Return the JSON that a part printed, or how it ended and the end of its output."""
    text = log.read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.startswith('{"benchmark"')]
    if status == 0 and lines:
        outcome = {k: v for k, v in json.loads(lines[-1]).items() if k != "machine"}
        return {"seconds": seconds, **outcome}
    if status is None:
        reason = f"killed after its limit of {limit:.0f} s"
    elif status < 0:
        reason = f"ended by {signal.Signals(-status).name}"
    else:
        reason = f"exit status {status}"
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


def summarize(outcome: dict[str, Any]) -> str:
    """Return one line for the screen."""
    if "not_run" in outcome:
        return f"{outcome['not_run']}: {outcome.get('output', '')[-300:]!r}"
    rest = {key: value for key, value in outcome.items() if key not in ("benchmark", "seconds")}
    return f"{outcome['seconds']} s {json.dumps(rest)[:700]}"


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
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
        default="aotinductor:bf16,aotinductor:fp8,onnxruntime:fp16,tensorrt:bf16,tensorrt:fp8,"
        "tensorrt-rtx:bf16",
    )
    parser.add_argument(
        "--causal-engines",
        default="aotinductor:bf16,onnxruntime:fp16,tensorrt:bf16,tensorrt-rtx:bf16",
    )
    precisions = {
        "aotinductor": ("fp32", "bf16", "fp16", "int8", "fp8"),
        "onnxruntime": ("fp32", "fp16"),
        "tensorrt": ("fp32", "fp16", "bf16", "fp8"),
        "tensorrt-rtx": ("fp32", "fp16", "bf16", "fp8"),
    }
    golden = [f"{backend}:{name}" for backend, names in precisions.items() for name in names]
    parser.add_argument("--golden", default=",".join(golden))
    parser.add_argument("--folder", type=Path, help="keep bundles and engines here")
    parser.add_argument(
        "--skip",
        default="",
        help="parts to leave out: a part's name, or its first word (golden, build, whole)",
    )
    options = parser.parse_args(arguments)
    if options.patience is None:
        options.patience = 4.0 if options.device == "cpu" else 1.0
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, run, print the result as one JSON line."""
    options = read_options(arguments)
    check_installed()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    with tempfile.TemporaryDirectory() as temporary:
        suite = Suite(options, options.folder or Path(temporary))
        try:
            suite.run()
        finally:
            suite.finish()
    print(json.dumps(suite.result))


if __name__ == "__main__":
    main()
