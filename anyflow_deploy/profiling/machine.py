"""Read what identifies the machine, and what may disturb a measurement on it.

That is clocks, governors, power modes and other load. Everything is read from files of the kernel,
under a root that tests replace. Missing files are left out.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from anyflow_deploy.profiling import jetson
from anyflow_deploy.profiling.kernel_files import kernel_text
from anyflow_deploy.profiling.memory import own_cpu_seconds
from anyflow_deploy.profiling.nvml import NvmlGpu

PACKAGES = (
    "anyflow-deploy",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "tensorrt",
    "tensorrt-rtx-cu12",
    "tensorrt-rtx-cu13",
    "torch-tensorrt",
    "diffusers",
    "numpy",
)


SAMPLED_CORES = 16
"""Number of cores whose clock is read."""


def describe(gpu: NvmlGpu | None, root: Path = Path("/")) -> dict[str, Any]:
    """Describe the machine: processor, memory, governor, power mode, GPU, versions."""
    cpuinfo = kernel_text(root / "proc/cpuinfo")
    name = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    total = re.search(r"^MemTotal:\s+(\d+) kB", kernel_text(root / "proc/meminfo"), re.MULTILINE)
    facts: dict[str, Any] = {
        "cpu": name[1].strip() if name else platform.machine(),
        "cores": cores(),
        "memory_bytes": int(total[1]) * 1024 if total else None,
        "virtual": "hypervisor" in cpuinfo,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
        "governor": governor(root),
        "jetson": jetson.describe(root),
        "gpu": None if gpu is None else gpu.describe(),
    }
    return {key: value for key, value in facts.items() if value is not None}


def cores() -> int:
    """Count the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Return the versions of the installed packages that take part."""
    result = {}
    for name in PACKAGES:
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            continue
    return result


def governor(root: Path = Path("/")) -> str | None:
    """Return how the kernel chooses the processor's clock; "performance" keeps it high."""
    return kernel_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None


def cpu_clock(root: Path = Path("/")) -> Callable[[], float | None]:
    """Return a function that reads the mean clock of the first cores, MHz.

    It returns None where the kernel does not say. It reads only some cores, because each reading
    interrupts the core, and a hundred of them would disturb the measurement.
    """
    files = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))[
        :SAMPLED_CORES
    ]
    few = (os.cpu_count() or 1) <= SAMPLED_CORES

    def read() -> float | None:
        try:
            if files:
                return sum(int(file.read_text()) for file in files) / len(files) / 1000
            rows = (
                re.findall(
                    r"^cpu MHz\s*:\s*([\d.]+)", kernel_text(root / "proc/cpuinfo"), re.MULTILINE
                )
                if few
                else []
            )
        except (OSError, ValueError):
            return None
        return sum(map(float, rows)) / len(rows) if rows else None

    return read


def cpu_temperature(root: Path = Path("/")) -> Callable[[], float | None] | None:
    """Return a function that reads the hottest thermal zone, °C; None without zones."""
    files = sorted((root / "sys/class/thermal").glob("thermal_zone*/temp"))

    def read() -> float | None:
        values = [
            int(text) / 1000
            for file in files
            if (text := kernel_text(file)).lstrip("-").isdecimal()
        ]
        return max(values, default=None)

    return read if files else None


def throttle_counts(root: Path = Path("/")) -> dict[str, int]:
    """Count how often the hardware has slowed down: heat (Intel), over-current (Jetson)."""
    counts: dict[str, int] = {}
    for file in sorted(
        (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/*_throttle_count")
    ):
        key = f"processor temperature ({file.name.removesuffix('_throttle_count')})"
        counts[key] = counts.get(key, 0) + int(kernel_text(file) or 0)
    for file in sorted((root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt")):
        counts[f"over-current {file.name.removesuffix('_event_cnt')}"] = int(kernel_text(file) or 0)
    return counts


class OtherLoad:
    """Measures how many cores other programs keep busy, from its creation on.

    That is the kernel's busy time less this process's own.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._busy = _busy_seconds(root)
        self._own = own_cpu_seconds()
        self._wall = time.perf_counter()

    def cores(self) -> float | None:
        """Return the mean number of busy cores; None where the kernel does not say."""
        busy = _busy_seconds(self._root)
        seconds = time.perf_counter() - self._wall
        if busy is None or self._busy is None or seconds <= 0:
            return None
        return max(0.0, (busy - self._busy - (own_cpu_seconds() - self._own)) / seconds)


def _busy_seconds(root: Path) -> float | None:
    """Sum user, nice, system, interrupt and stolen time of all cores, without idle and wait."""
    match = re.match(r"cpu\s+([\d ]+)", kernel_text(root / "proc/stat"))
    if match is None:
        return None
    user, nice, system, _idle, _wait, irq, soft, steal, *_ = [int(n) for n in match[1].split()] + [
        0
    ] * 8
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
