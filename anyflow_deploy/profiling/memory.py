"""Peaks of memory: of this process by the kernel, of the GPU by NVML or CUDA. Apart, and never
added up. Where both share one memory, a third number says what everything together took of it: that
is what has to fit.

Linux keeps a process's highest resident size and forgets it on request (/proc/self/clear_refs), so
each stage has a peak of its own. Where it does not forget (some containers), the peak is that of
the process so far, and the record says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from anyflow_deploy.profiling import jetson
from anyflow_deploy.profiling.nvml import NvmlGpu
from anyflow_deploy.profiling.record import MemoryUsage

MemoryReader = Callable[[], float | None]


def resident_bytes(word: str = "VmRSS", status: Path = Path("/proc/self/status")) -> int:
    """Bytes by the kernel's count: "VmRSS" now, "VmHWM" at the peak; 0 where there is no /proc."""
    try:
        found = re.search(rf"^{word}:\s+(\d+) kB", status.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


class PeakMemory:
    """Memory from now on.

    Args:
        gpu_used: bytes on the device now, where there is one.
        shared: bytes taken of the memory that processor and GPU share; None where each has its own.
    """

    def __init__(
        self, gpu_used: MemoryReader | None = None, shared: MemoryReader | None = None
    ) -> None:
        self._used, self._shared = gpu_used, shared
        self._shared_before = None if shared is None else shared()
        self._before = resident_bytes()
        self._gpu_before = self._gpu()
        self._loaded = self._before
        self._gpu_loaded = self._gpu_before
        self._loading_peak: int | None = None
        self._peak_was_reset = _reset_peak()

    def mark_loaded(self) -> None:
        """Call it when what is measured is loaded."""
        self._loaded = resident_bytes()
        self._gpu_loaded = self._gpu()
        # Else it may be of long before
        self._loading_peak = resident_bytes("VmHWM") if self._peak_was_reset else None
        self._peak_was_reset = _reset_peak()

    def record(
        self, gpu_peak: float | None = None, shared_peak: float | None = None
    ) -> MemoryUsage:
        """What was reached.

        Args:
            gpu_peak, shared_peak: the most that was sampled meanwhile.
        """
        now = self._gpu()
        candidates = [value for value in (gpu_peak, now) if value is not None]
        cpu = (
            "VmHWM"
            if self._peak_was_reset
            else "VmHWM since the process began (it could not be reset)"
        )
        return MemoryUsage(
            cpu_before=self._before,
            cpu_loaded=self._loaded,
            cpu_loading_peak=self._loading_peak,
            cpu_peak=resident_bytes("VmHWM"),
            gpu_loaded=_optional_int(self._gpu_loaded),
            gpu_peak=int(max(candidates)) if candidates else None,
            unified=self._shared is not None,
            shared_before=_optional_int(self._shared_before),
            shared_peak=_optional_int(shared_peak),
            method=f"CPU: {cpu}; GPU: {'sampled' if self._used is not None else 'none in use'}",
        )

    def _gpu(self) -> float | None:
        return None if self._used is None else self._used()


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _optional_int(size: float | None) -> int | None:
    return None if size is None else int(size)


def gpu_memory_reader(
    gpu: NvmlGpu | None, device: int, unified: bool = False
) -> MemoryReader | None:
    """How to read the device's memory: this process's share by NVML, else all that is taken, else
    CUDA's own count.

    Args:
        gpu, device: which.
        unified: it is the processor's memory, too. NVML or the kernel may tell the GPU's part of
            it; CUDA's count, which takes Linux's file cache for used memory, does not serve.
    """
    if unified:
        return lambda: _first_known(gpu.memory()[0] if gpu else None, jetson.gpu_memory())
    if gpu is not None and gpu.memory() != (None, None):
        return lambda: next((float(size) for size in gpu.memory() if size is not None), None)
    try:
        from cuda.bindings import runtime as cuda
    except ImportError:
        return None
    code, *_ = cuda.cudaSetDevice(device)
    if int(code):
        return None

    def read_used() -> float | None:
        code, free, total = cuda.cudaMemGetInfo()
        return None if int(code) else float(total - free)

    return read_used


def _first_known(*sizes: float | None) -> float | None:
    return next((float(size) for size in sizes if size is not None), None)


def own_cpu_seconds() -> float:
    """Processor time that this process has used."""
    times = os.times()
    return times.user + times.system
