"""Measure peaks of memory: this process's by the kernel, the GPU's by NVML or CUDA.

The two are reported separately and never added. Where both share one memory, a third number says
what everything together takes of it: that number has to fit.

Linux keeps a process's highest resident size and resets it on request (/proc/self/clear_refs), so
each stage has a peak of its own. Where it cannot be reset (some containers), the peak is that of
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


def resident_bytes(field: str = "VmRSS", status: Path = Path("/proc/self/status")) -> int:
    """Return this process's bytes: "VmRSS" now, "VmHWM" at the peak; 0 without /proc."""
    try:
        match = re.search(rf"^{field}:\s+(\d+) kB", status.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


class PeakMemory:
    """Measures memory from its creation on.

    Args:
        read_gpu: returns the bytes in use on the device; None without a GPU.
        read_shared: returns the bytes in use of the memory that processor and GPU share; None where
            each has its own.
    """

    def __init__(
        self, read_gpu: MemoryReader | None = None, read_shared: MemoryReader | None = None
    ) -> None:
        self._read_gpu = read_gpu
        self._read_shared = read_shared
        self._shared_before = None if read_shared is None else read_shared()
        self._before = resident_bytes()
        self._gpu_before = self._gpu_bytes()
        self._after_loading = self._before
        self._gpu_after_loading = self._gpu_before
        self._loading_peak: int | None = None
        self._peak_was_reset = _reset_peak()

    def mark_loaded(self) -> None:
        """Note that loading has ended; the peak is measured from here on."""
        self._after_loading = resident_bytes()
        self._gpu_after_loading = self._gpu_bytes()
        # Without the reset, the peak may be an older one.
        self._loading_peak = resident_bytes("VmHWM") if self._peak_was_reset else None
        self._peak_was_reset = _reset_peak()

    def record(
        self, gpu_peak: float | None = None, shared_peak: float | None = None
    ) -> MemoryUsage:
        """Return the memory before and after loading, and the peaks.

        Args:
            gpu_peak, shared_peak: the largest values sampled meanwhile.
        """
        now = self._gpu_bytes()
        candidates = [value for value in (gpu_peak, now) if value is not None]
        cpu = (
            "VmHWM"
            if self._peak_was_reset
            else "VmHWM since the process began (it could not be reset)"
        )
        return MemoryUsage(
            cpu_before=self._before,
            cpu_loaded=self._after_loading,
            cpu_loading_peak=self._loading_peak,
            cpu_peak=resident_bytes("VmHWM"),
            gpu_loaded=_optional_int(self._gpu_after_loading),
            gpu_peak=int(max(candidates)) if candidates else None,
            unified=self._read_shared is not None,
            shared_before=_optional_int(self._shared_before),
            shared_peak=_optional_int(shared_peak),
            method=f"CPU: {cpu}; GPU: {'sampled' if self._read_gpu is not None else 'none in use'}",
        )

    def _gpu_bytes(self) -> float | None:
        return None if self._read_gpu is None else self._read_gpu()


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
    """Return a function that reads the device's used bytes; None where nothing can.

    It reads this process's share from NVML, or all used bytes from NVML, or CUDA's own count.

    Args:
        gpu: the GPU in NVML, where it has one.
        device: index of the GPU, for CUDA.
        unified: whether it is the processor's memory, too. Then NVML or the kernel may know the
            GPU's part of it; CUDA's count is not used, because it includes Linux's file cache.
    """
    if unified:
        return lambda: _first_number(gpu.memory()[0] if gpu else None, jetson.gpu_memory())
    if gpu is not None and gpu.memory() != (None, None):
        return lambda: next((float(size) for size in gpu.memory() if size is not None), None)
    try:
        from cuda.bindings import runtime as cuda
    except ImportError:
        return None
    code, *_ = cuda.cudaSetDevice(device)
    if int(code):
        return None

    def read_cuda() -> float | None:
        code, free, total = cuda.cudaMemGetInfo()
        return None if int(code) else float(total - free)

    return read_cuda


def _first_number(*sizes: float | None) -> float | None:
    return next((float(size) for size in sizes if size is not None), None)


def own_cpu_seconds() -> float:
    """Return the processor time that this process has used."""
    times = os.times()
    return times.user + times.system
