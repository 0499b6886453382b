"""What NVIDIA's management library knows of a GPU: power, clocks, temperature, throttling, memory.
Through nvidia-ml-py.

Every number is asked for on its own, since old cards, virtual GPUs and Jetsons each refuse other
ones: what is refused is None. Written against nvidia-ml-py 13.615's functions and tested on a
stand-in that has exactly those; not run on a GPU yet.
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
"""Reasons that mean lost speed, by NVML's names; idling and clocks that someone has set are
none."""


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
        """CUDA counts the devices it may see; NVML counts all, in the order of the bus."""
        visible = [
            word.strip()
            for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            if word.strip()
        ]
        chosen = visible[index] if index < len(visible) else str(index)
        if chosen.isdecimal():
            return self._nv.nvmlDeviceGetHandleByIndex(int(chosen))
        return self._nv.nvmlDeviceGetHandleByUUID(chosen)

    def watts(self) -> float | None:
        """Power now."""
        return _scale(self._query(lambda: self._nv.nvmlDeviceGetPowerUsage(self._handle)), 1e-3)

    def joules(self) -> float | None:
        """Energy since the driver was loaded (from Volta on)."""
        return _scale(
            self._query(lambda: self._nv.nvmlDeviceGetTotalEnergyConsumption(self._handle)), 1e-3
        )

    def sm_clock(self) -> float | None:
        """Clock of the multiprocessors now, MHz."""
        return _scale(
            self._query(
                lambda: self._nv.nvmlDeviceGetClockInfo(self._handle, self._nv.NVML_CLOCK_SM)
            )
        )

    def max_sm_clock(self) -> float | None:
        """The highest there is, MHz."""
        return _scale(
            self._query(
                lambda: self._nv.nvmlDeviceGetMaxClockInfo(self._handle, self._nv.NVML_CLOCK_SM)
            )
        )

    def memory_clock(self) -> float | None:
        """Of the memory, MHz."""
        return _scale(
            self._query(
                lambda: self._nv.nvmlDeviceGetClockInfo(self._handle, self._nv.NVML_CLOCK_MEM)
            )
        )

    def temperature(self) -> float | None:
        """Degrees Celsius."""
        return _scale(
            self._query(
                lambda: self._nv.nvmlDeviceGetTemperature(
                    self._handle, self._nv.NVML_TEMPERATURE_GPU
                )
            )
        )

    def power_limit(self) -> float | None:
        """Watts it may take."""
        return _scale(
            self._query(lambda: self._nv.nvmlDeviceGetEnforcedPowerLimit(self._handle)), 1e-3
        )

    def throttle_reasons(self) -> list[str]:
        """Why it is slower than it could be, now."""
        ask = getattr(self._nv, "nvmlDeviceGetCurrentClocksEventReasons", None) or getattr(
            self._nv, "nvmlDeviceGetCurrentClocksThrottleReasons", None
        )
        bits = self._query(lambda: ask(self._handle)) if ask is not None else None
        return [
            words
            for name, words in THROTTLE.items()
            if bits and int(bits) & int(getattr(self._nv, name, 0))
        ]

    def memory(self) -> tuple[int | None, int | None]:
        """Bytes that this process takes (None: NVML does not say, as inside some containers), and
        that are taken in all."""
        rows = (
            self._query(lambda: self._nv.nvmlDeviceGetComputeRunningProcesses(self._handle)) or []
        )
        mine = next((row.usedGpuMemory for row in rows if row.pid == os.getpid()), None)
        whole = self._query(lambda: self._nv.nvmlDeviceGetMemoryInfo(self._handle).used)
        return (None if mine is None else int(mine)), (None if whole is None else int(whole))

    def describe(self) -> dict[str, Any]:
        """What identifies it, for the record."""
        driver = self._query(self._nv.nvmlSystemGetDriverVersion)
        return {
            "name": self.name,
            "driver": driver.decode() if isinstance(driver, bytes) else driver,
            "most_sm_clock_mhz": self.max_sm_clock(),
            "memory_clock_mhz": self.memory_clock(),
            "power_limit_watts": self.power_limit(),
        }

    def _query(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except self._nv.NVMLError:
            return None


def _scale(value: Any, factor: float = 1.0) -> float | None:
    return None if value is None else float(value) * factor
