"""The part of a profile about the machine: memory, power, clocks, heat, load.

Memory is bytes, energy joules; moments are seconds since the measured rounds began.
"""

from __future__ import annotations

from typing import Literal

from anyflow_deploy.profiling.record_base import ProfileRecord


class MemoryUsage(ProfileRecord):
    """Peaks of CPU and GPU memory, which are never added up.

    Args:
        cpu_before, cpu_loaded, cpu_peak: resident bytes of this process: before loading, after
            loading, and the largest from then on.
        cpu_loading_peak: largest resident bytes during loading.
        gpu_peak: bytes on the device; None without one.
        unified: whether processor and GPU share one memory (as on a Jetson).
        shared_before, shared_peak: used bytes of that memory, by all processes and the GPU: before
            loading, and the largest. Their difference is what this engine needs.
        method: how each was read.
    """

    cpu_before: int
    cpu_loaded: int
    cpu_loading_peak: int | None = None
    cpu_peak: int
    gpu_loaded: int | None
    gpu_peak: int | None
    unified: bool
    shared_before: int | None = None
    shared_peak: int | None = None
    method: str


class PowerUsage(ProfileRecord):
    """One power source over the measured rounds.

    Args:
        kind: what it covers.
        idle_watts: power before the rounds, with the engine loaded.
        joules: energy in the measured rounds.
        samples: pairs of seconds since the rounds began, and watts.
    """

    name: str
    kind: Literal["gpu", "cpu", "memory", "board"]
    method: str
    idle_watts: float | None
    mean_watts: float
    peak_watts: float
    joules: float
    samples: list[tuple[float, float]]


class Series(ProfileRecord):
    """Repeated readings of a value such as a clock: seconds since the rounds began, value."""

    name: str
    unit: str
    samples: list[tuple[float, float]]


class Conditions(ProfileRecord):
    """The machine's load, throttling, clocks and temperatures during the measurement.

    Args:
        other_load: mean number of cores that other programs kept busy; None where it is unknown.
        throttle: reasons that the hardware gave, with the share of samples.
        series: clocks and temperatures.
    """

    other_load: float | None
    throttle: dict[str, float]
    series: list[Series]
