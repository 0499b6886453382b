"""Read what a Jetson's kernel says about its chip and its one memory.

On Orin, NVML gives only the GPU's name; on Thor it also lists the memory of each process. Clocks
are under /sys/class/devfreq, memory in /proc/meminfo, the power mode comes from `nvpmodel`. This is
written from NVIDIA's documentation and tested on files modelled on it; it has not run on a Jetson
yet.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from anyflow_deploy.profiling.kernel_files import kernel_text

_GPU = re.compile(r"gpu-gpc-\d+|[0-9a-f]+\.(gpu|ga10b|gv11b)")
"""The GPU's folder in /sys/class/devfreq: gpu-gpc-N on Thor, gpu on JetPack 6, else the chip."""


def describe(root: Path = Path("/")) -> dict[str, str] | None:
    """Return model, power mode (`nvpmodel -q`) and GPU clock of a Jetson; None elsewhere.

    The clock is a range, or one number under `jetson_clocks`.
    """
    model = kernel_text(root / "proc/device-tree/model").strip("\0 ")
    if not re.search(r"jetson|tegra", model, re.IGNORECASE):
        return None
    mode = re.search(r"NV Power Mode:\s*(\S+)", _run_command(["nvpmodel", "-q"]))
    facts = {
        "model": model,
        "power_mode": mode[1] if mode else "unknown (nvpmodel -q said nothing)",
    }
    folder = _gpu_folder(root)
    minimum, maximum = (
        _megahertz(folder / f"{which}_freq") if folder else None for which in ("min", "max")
    )
    if minimum is not None and maximum is not None:
        facts["gpu_clock"] = (
            f"locked at {maximum:.0f} MHz"
            if minimum == maximum
            else f"{minimum:.0f} to {maximum:.0f} MHz"
        )
    return facts


def gpu_clock(root: Path = Path("/")) -> Callable[[], float | None]:
    """Return a function that reads the GPU's clock, MHz; None where the kernel does not say."""
    folder = _gpu_folder(root)
    return lambda: None if folder is None else _megahertz(folder / "cur_freq")


def used_memory(root: Path = Path("/")) -> float | None:
    """Return the bytes of the one memory that all processes and the GPU use.

    Linux's file cache does not count, because Linux would free it. `cudaMemGetInfo` counts it as
    used, and a bundle's files are in it after they were read.
    """
    total = _meminfo("MemTotal", root)
    free = _meminfo("MemAvailable", root)
    return None if total is None or free is None else total - free


def gpu_memory(root: Path = Path("/")) -> float | None:
    """Return the bytes that the GPU uses for all processes; None where that is not counted.

    Orin and older Jetsons count them.
    """
    return _meminfo("NvMapMemUsed", root)


def _gpu_folder(root: Path) -> Path | None:
    folders = sorted((root / "sys/class/devfreq").glob("*"))
    return next((folder for folder in folders if _GPU.fullmatch(folder.name)), None)


def _megahertz(file: Path) -> float | None:
    text = kernel_text(file)
    return int(text) / 1e6 if text.isdecimal() else None


def _meminfo(name: str, root: Path) -> float | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", kernel_text(root / "proc/meminfo"), re.MULTILINE)
    return float(found[1]) * 1024 if found else None


def _run_command(command: list[str]) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
