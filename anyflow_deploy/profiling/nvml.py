"""Read a GPU through NVIDIA's management library: power, clocks, heat, throttling, memory.

Every number is read on its own, since old cards, virtual GPUs and Jetsons each refuse different
ones: a refused number is None. This is written against nvidia-ml-py 13.615's functions and tested
on a fake that has exactly those; it has not run on a GPU yet.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from anyflow_deploy.profiling.errors import MeasurementUnavailableError

THROTTLE = {
    "nvmlClocksEventReasonSwPowerCap": "power cap",
    "nvmlClocksEventReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonSwThermalSlowdown": "temperature (software)",
    "nvmlClocksEventReasonHwThermalSlowdown": "temperature (hardware)",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "external power brake",
}
"""Reasons that mean lost speed, by NVML's names. Idling and locked clocks do not."""


class NvmlGpu:
    """One GPU, as NVML sees it.

    Args:
        index: as CUDA counts; CUDA_VISIBLE_DEVICES is translated.

    Raises:
        MeasurementUnavailableError: no nvidia-ml-py, no driver, or no such GPU.
    """

    def __init__(self, index: int = 0) -> None:
        try:
            import pynvml
        except ImportError:
            raise MeasurementUnavailableError(
                "nvidia-ml-py is not installed. Run: pip install 'anyflow-deploy[profile]'"
            ) from None
        self._nv: Any = pynvml
        try:
            pynvml.nvmlInit()
            self._handle = self._find_handle(index)
        except pynvml.NVMLError as error:
            raise MeasurementUnavailableError(f"NVML does not answer: {error}") from None
        name = pynvml.nvmlDeviceGetName(self._handle)
        self.name: str = name.decode() if isinstance(name, bytes) else str(name)

    def _find_handle(self, index: int) -> Any:
        """Find the device: CUDA counts visible devices, NVML all of them in bus order."""
        visible = [
            name.strip()
            for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            if name.strip()
        ]
        device = visible[index] if index < len(visible) else str(index)
        if device.isdecimal():
            return self._nv.nvmlDeviceGetHandleByIndex(int(device))
        return self._nv.nvmlDeviceGetHandleByUUID(device)

    def watts(self) -> float | None:
        """Read the power now, in watts."""
        return _scale(self._query(lambda: self._nv.nvmlDeviceGetPowerUsage(self._handle)), 1e-3)

    def joules(self) -> float | None:
        """Read the energy in joules since the driver was loaded (Volta and later)."""
        return _scale(
            self._query(lambda: self._nv.nvmlDeviceGetTotalEnergyConsumption(self._handle)), 1e-3
        )

    def sm_clock(self) -> float | None:
        """Read the clock of the multiprocessors now, MHz."""
        return _scale(
            self._query(
                lambda: self._nv.nvmlDeviceGetClockInfo(self._handle, self._nv.NVML_CLOCK_SM)
            )
        )

    def max_sm_clock(self) -> float | None:
        """Read the highest clock of the multiprocessors, MHz."""
        return _scale(
            self._query(
                lambda: self._nv.nvmlDeviceGetMaxClockInfo(self._handle, self._nv.NVML_CLOCK_SM)
            )
        )

    def memory_clock(self) -> float | None:
        """Read the clock of the memory now, MHz."""
        return _scale(
            self._query(
                lambda: self._nv.nvmlDeviceGetClockInfo(self._handle, self._nv.NVML_CLOCK_MEM)
            )
        )

    def temperature(self) -> float | None:
        """Read the temperature, degrees Celsius."""
        return _scale(
            self._query(
                lambda: self._nv.nvmlDeviceGetTemperature(
                    self._handle, self._nv.NVML_TEMPERATURE_GPU
                )
            )
        )

    def power_limit(self) -> float | None:
        """Read the power limit, watts."""
        return _scale(
            self._query(lambda: self._nv.nvmlDeviceGetEnforcedPowerLimit(self._handle)), 1e-3
        )

    def throttle_reasons(self) -> list[str]:
        """Return why the GPU is slower now than it could be."""
        read = getattr(self._nv, "nvmlDeviceGetCurrentClocksEventReasons", None) or getattr(
            self._nv, "nvmlDeviceGetCurrentClocksThrottleReasons", None
        )
        bits = self._query(lambda: read(self._handle)) if read is not None else None
        return [
            reason
            for name, reason in THROTTLE.items()
            if bits and int(bits) & int(getattr(self._nv, name, 0))
        ]

    def memory(self) -> tuple[int | None, int | None]:
        """Read the used bytes: this process's (None where NVML does not say), and all.

        Inside some containers NVML does not know the processes.
        """
        rows = (
            self._query(lambda: self._nv.nvmlDeviceGetComputeRunningProcesses(self._handle)) or []
        )
        own = next((row.usedGpuMemory for row in rows if row.pid == os.getpid()), None)
        total = self._query(lambda: self._nv.nvmlDeviceGetMemoryInfo(self._handle).used)
        return (None if own is None else int(own)), (None if total is None else int(total))

    def describe(self) -> dict[str, Any]:
        """Describe the GPU for the record."""
        driver = self._query(self._nv.nvmlSystemGetDriverVersion)
        return {
            "name": self.name,
            "driver": driver.decode() if isinstance(driver, bytes) else driver,
            "most_sm_clock_mhz": self.max_sm_clock(),
            "memory_clock_mhz": self.memory_clock(),
            "power_limit_watts": self.power_limit(),
        }

    def _query(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except self._nv.NVMLError:
            return None


def _scale(value: Any, factor: float = 1.0) -> float | None:
    return None if value is None else float(value) * factor
