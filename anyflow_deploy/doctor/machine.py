"""The machine itself: Python, processor, memory, disk, and whether it is a Jetson."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from pathlib import Path

from anyflow_deploy.doctor.probe import FAULT, WORKS, ProbeResult

OLDEST, NEWEST = (3, 10), (3, 13)
"""Python versions that pyproject.toml allows."""

MIN_DISK = MIN_MEMORY = 4e9
"""Bytes: a 1.3B bundle in fp16 takes 2.9 GB, on disk and in memory."""

_X86_FLAGS = (
    "avx2", "f16c", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8",
    "amx_bf16",
)  # fmt: skip
_ARM_FLAGS = ("asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2")

_JETPACK = {"36": "JetPack 6", "35": "JetPack 5", "38": "JetPack 7", "39": "JetPack 7"}


def probe_python() -> ProbeResult:
    """Probe the interpreter: its version, and 64 bits."""
    version = sys.version_info[:2]
    where = (
        f"{platform.python_version()}, {platform.system()} {platform.machine()}, {sys.executable}"
    )
    if OLDEST <= version <= NEWEST and sys.maxsize > 2**32:
        return ProbeResult(WORKS, where)
    allowed = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}, 64 bits"
    return ProbeResult(
        FAULT, f"{where}; {allowed} is needed", f"make a virtual environment with Python {allowed}"
    )


def probe_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> ProbeResult:
    """Probe the processor: name, cores, and its instructions for 8 and 16 bits."""
    text = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else ""
    name = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    cpu_flags = set(flags[1].split()) if flags else set()
    useful_flags = [flag for flag in (*_X86_FLAGS, *_ARM_FLAGS) if flag in cpu_flags]
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    detail = (
        f"{name[1].strip() if name else platform.machine()}, {cores} cores,"
        f" {' '.join(useful_flags) or 'no flags of interest'}"
    )
    return ProbeResult(WORKS, detail, facts={"cores": cores, "flags": useful_flags})


def probe_memory(
    meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")
) -> ProbeResult:
    """Probe main memory, with the container's limit where there is one."""
    rows: dict[str, str] = dict(
        re.findall(r"^(\w+):\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    )
    total = int(rows["MemTotal"]) * 1024
    free = int(rows.get("MemAvailable", rows["MemTotal"])) * 1024
    text = limit.read_text().strip() if limit.is_file() else "max"
    allowed = min(total, int(text)) if text.isdigit() else total
    limit_text = f", this container may take {_gb(allowed)}" if allowed < total else ""
    detail = f"{_gb(total)}, {_gb(free)} available{limit_text}"
    facts = {"total_bytes": total, "available_bytes": free, "allowed_bytes": allowed}
    if min(free, allowed) < MIN_MEMORY:
        return ProbeResult(
            FAULT,
            detail,
            f"free at least {_gb(MIN_MEMORY)}; anyflow-fit says what a model takes",
            facts,
        )
    return ProbeResult(WORKS, detail, facts=facts)


def probe_disk(folder: Path | None = None) -> ProbeResult:
    """Probe the free space where bundles are written by default."""
    place = folder or Path.cwd()
    free = shutil.disk_usage(place).free
    detail = f"{_gb(free)} free in {place}" + (
        "" if os.access(place, os.W_OK) else ", which may not be written"
    )
    if free < MIN_DISK or not os.access(place, os.W_OK):
        return ProbeResult(
            FAULT,
            detail,
            f"work in a folder of yours with at least {_gb(MIN_DISK)}",
            {"free_bytes": free},
        )
    return ProbeResult(WORKS, detail, facts={"free_bytes": free})


def probe_jetson(root: Path = Path("/")) -> ProbeResult | None:
    """Probe model and L4T release of a Jetson; None on anything else."""
    model = root / "proc/device-tree/model"
    release = root / "etc/nv_tegra_release"
    name = model.read_text(errors="replace").strip("\0 \n") if model.is_file() else ""
    text = release.read_text(errors="replace") if release.is_file() else ""
    match = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", text)
    if match is None and not re.search("jetson|tegra", name, re.IGNORECASE):
        return None
    if match is None:
        return ProbeResult(
            FAULT,
            f"{name or 'a Jetson'}, no L4T release in {release}",
            "flash it with NVIDIA's SDK Manager (JetPack)",
        )
    jetpack = _JETPACK.get(match[1], "an unknown JetPack")
    facts = {"model": name, "l4t": f"{match[1]}.{match[2]}"}
    return ProbeResult(
        WORKS, f"{name or 'Jetson'}, L4T {match[1]}.{match[2]} ({jetpack})", facts=facts
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
