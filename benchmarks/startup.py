"""Measures how long commands take until they answer.

    python benchmarks/startup.py [BUNDLE] [--runs 5] [--imports]

`anyflow-generate --help` and refusals are timed as a user waits for them, `anyflow-serve` until its
first answer (`/health`, which says that the model is being loaded) and until it takes requests.
Without a bundle, a tiny causal one is exported first (random weights).

Each time has its processor time (user and system) beside it, since a busy machine stretches the
clock and not that. The smallest of the runs is reported. `--imports` lists the most expensive
imports of each command, by the processor time of the module and all that it imports.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from common import print_result

from anyflow_deploy import MODELS
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.checkpoints.tiny import save_tiny_pipeline
from anyflow_deploy.export.exporter import export_bundle

START = "from anyflow_deploy.cli.{0} import main; main()"
IMPORTS = """
import importlib._bootstrap as bootstrap, sys, time
load, rows = bootstrap._find_and_load, []
def timed(name, import_):
    if name in sys.modules:
        return load(name, import_)
    start = time.process_time()
    try:
        return load(name, import_)
    finally:
        rows.append((time.process_time() - start, name))
bootstrap._find_and_load = timed
__import__("anyflow_deploy.cli." + sys.argv[1])
for seconds, name in sorted(rows, reverse=True)[:15]:
    print(f"{seconds * 1000:7.1f} ms  {name}", file=sys.stderr)
"""


def time_command(command: str, arguments: list[str], runs: int) -> dict[str, Any]:
    """Run a command that ends by itself; return the smallest times and its exit status."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", START.format(command), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        times.append((time.perf_counter() - start, usage.ru_utime + usage.ru_stime))
    return {
        "seconds": round(min(clock for clock, _ in times), 3),
        "cpu_seconds": round(min(cpu for _, cpu in times), 3),
        "status": os.waitstatus_to_exitcode(status),
    }


def time_server(bundle: Path, runs: int) -> dict[str, Any]:
    """Start `anyflow-serve`; return the smallest times to its first answer and to its readiness."""
    answers, ready = [], []
    for _ in range(runs):
        first, second = start_server(bundle)
        answers.append(first)
        ready.append(second)
    return {
        name: {
            "seconds": round(min(clock for clock, _ in times), 2),
            "cpu_seconds": round(min(cpu for _, cpu in times), 2),
        }
        for name, times in (("first_answer", answers), ("ready", ready))
    }


def start_server(bundle: Path) -> list[tuple[float, float]]:
    """Start a server; return (seconds, processor seconds) at its first answer and readiness."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        start = time.perf_counter()
        command = [
            sys.executable,
            "-c",
            START.format("serve"),
            str(bundle.resolve()),
            "--port",
            "0",
        ]
        with log.open("w") as file:
            server = subprocess.Popen(command, cwd=folder, stderr=file)
        times = []
        try:
            for wanted in ((200, 503), (200,)):
                while answer_status(log) not in wanted:
                    if server.poll() is not None:
                        sys.exit(log.read_text())
                    time.sleep(0.01)
                times.append((time.perf_counter() - start, cpu_seconds(server.pid)))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
        return times


def answer_status(log: Path) -> int | None:
    """Ask a server whose address is in its log; None while it does not answer."""
    address = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
    if address is not None:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{address[0]}/health", timeout=30).status_code
    return None


def cpu_seconds(pid: int) -> float:
    """Return the user and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--imports", action="store_true")
    options = parser.parse_args()
    if options.imports:
        for command in ("generate", "serve"):
            print(f"anyflow-{command}:", file=sys.stderr)
            subprocess.run([sys.executable, "-c", IMPORTS, command], check=True)
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle
        if bundle is None:
            bundle = Path(folder) / "bundle"
            save_tiny_pipeline(MODELS["far-tiny"], Path(folder) / "pipeline")
            export_bundle(open_checkpoint(Path(folder) / "pipeline"), bundle)
        refused = [str(bundle), "--prompt", "x", "--output", "x.mp4", "--frames", "18"]
        result = {
            "help": time_command("generate", ["--help"], options.runs),
            "unknown_flag": time_command("generate", ["--framez", "9"], options.runs),
            "refused_request": time_command("generate", refused, options.runs),
            "serve": time_server(bundle, max(1, options.runs // 2)),
        }
    print_result("startup", result)


if __name__ == "__main__":
    main()
