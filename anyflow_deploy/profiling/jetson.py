"""A Jetson: one chip, one memory, and what its kernel says where NVML has nothing to say.

On Orin NVML gives the GPU's name and refuses the rest; on Thor it also lists what processes take of
the memory. Clocks are under /sys/class/devfreq, memory in /proc/meminfo, the power mode comes from
`nvpmodel`. Written after NVIDIA's documentation and tested on files made up after it; not run on a
Jetson yet.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from anyflow_deploy.profiling.kernel_files import kernel_text

_GPU = re.compile(r"gpu-gpc-\d+|[0-9a-f]+\.(gpu|ga10b|gv11b)")
"""The GPU's folder under /sys/class/devfreq: on Thor, and on older ones (JetPack 6: gpu, JetPack 5:
the chip's name)."""


def describe(root: Path = Path("/")) -> dict[str, str] | None:
    """Model, power mode (`nvpmodel -q`) and the range of the GPU's clock (one number under
    `jetson_clocks`); None elsewhere."""
    model = kernel_text(root / "proc/device-tree/model").strip("\0 ")
    if not re.search(r"jetson|tegra", model, re.IGNORECASE):
        return None
    mode = re.search(r"NV Power Mode:\s*(\S+)", _run_command(["nvpmodel", "-q"]))
    found = {
        "model": model,
        "power_mode": mode[1] if mode else "unknown (nvpmodel -q said nothing)",
    }
    folder = _gpu_folder(root)
    least, most = (
        _megahertz(folder / f"{which}_freq") if folder else None for which in ("min", "max")
    )
    if least is not None and most is not None:
        found["gpu_clock"] = (
            f"locked at {most:.0f} MHz" if least == most else f"{least:.0f} to {most:.0f} MHz"
        )
    return found


def gpu_clock(root: Path = Path("/")) -> Callable[[], float | None]:
    """Reads the GPU's clock, MHz; None where the kernel does not say."""
    folder = _gpu_folder(root)
    return lambda: None if folder is None else _megahertz(folder / "cur_freq")


def memory_used(root: Path = Path("/")) -> float | None:
    """Bytes of the one memory that all processes and the GPU have together, without what Linux
    would free of its file cache.

    (`cudaMemGetInfo` counts that cache as taken, and the files of a bundle are in it once they were
    read.)
    """
    total = _meminfo("MemTotal", root)
    free = _meminfo("MemAvailable", root)
    return None if total is None or free is None else total - free


def gpu_memory(root: Path = Path("/")) -> float | None:
    """Bytes that the GPU has of it, for all processes (Orin and older); None where the kernel does
    not count them."""
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
