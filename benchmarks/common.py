"""Functions that the benchmarks share."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from anyflow_deploy.doctor.machine import probe_processor


def describe_machine() -> dict[str, Any]:
    """Return what identifies a measurement: processor, cores, memory, versions, date."""
    names = (
        line.split(":")[1].strip()
        for line in _lines("/proc/cpuinfo")
        if line.startswith("model name")
    )
    cpu = next(names, platform.machine())
    memory = next(
        (int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0
    )
    packages = ("anyflow-deploy", "torch", "onnx", "onnxruntime", "diffusers")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu,
        "instructions": probe_processor().facts["flags"],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**20, 1),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages if _is_installed(name)},
    }


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def run_process(command: Sequence[str], **options: Any) -> dict[str, Any]:
    """Run a command, and return its seconds, peak memory (MiB) and standard output.

    The peak is the resident memory of the command and its children.

    Raises:
        SystemExit: when it fails, with what it said.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        list(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    errors: list[str] = []
    assert process.stderr is not None and process.stdout is not None
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))  # type: ignore[union-attr]
    reader.start()
    output = process.stdout.read()
    reader.join()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{errors[0][-3000:]}")
    return {
        "seconds": time.perf_counter() - start,
        "peak_mib": usage.ru_maxrss / 1024,
        "output": output,
        "errors": errors[0],
    }


def run_python(code: str, *arguments: str) -> dict[str, Any]:
    """Run a piece of Python like `run_process`."""
    return run_process([sys.executable, "-c", code, *arguments])


def gpu_name(device: str) -> str:
    """Return the GPU's name of a torch device, or the device itself."""
    if not device.startswith("cuda"):
        return device
    import torch

    return torch.cuda.get_device_name(device)


def describe_failure(error: Exception, characters: int = 300) -> dict[str, str]:
    """Say why something did not run, for the result: the first line of the error."""
    return {"not_run": str(error).split("\n")[0][:characters]}


def print_result(name: str, result: dict[str, Any]) -> None:
    """Print the result as one JSON line, which is the last."""
    print(json.dumps({"benchmark": name, "machine": describe_machine(), **result}))
