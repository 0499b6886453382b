"""The part of a profile that says what a run took of the machine, and what state that was in:
memory, power, clocks, heat, load.

Memory is bytes, energy joules; moments are seconds since the measured rounds began.
"""

from __future__ import annotations

from typing import Literal

from anyflow_deploy.profiling.record_base import ProfileRecord


class MemoryUsage(ProfileRecord):
    """Peaks; CPU and GPU apart, never added: on a Jetson they are parts of one memory.

    Args:
        cpu_before, cpu_loaded, cpu_peak: resident bytes of this process, before loading, after it,
            and at most from then on.
        cpu_loading_peak: the most while it was loaded.
        gpu_peak: bytes on the device; None without one.
        unified: processor and GPU share one memory.
        shared_before, shared_peak: what all processes and the GPU had taken of that, before
            anything was loaded and at most; their difference is what this engine needs there,
            whichever side counts it.
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
        idle_watts: before the rounds began, engine loaded.
        joules: in the measured rounds.
        samples: seconds since the rounds began, watts.
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
    """Something read again and again, such as a clock: seconds since the rounds began, value."""

    name: str
    unit: str
    samples: list[tuple[float, float]]


class Conditions(ProfileRecord):
    """What the machine was doing meanwhile.

    Args:
        other_load: processor cores that others kept busy, on average; None where it cannot be told.
        throttle: reasons that the hardware gave, with the share of samples.
        series: clocks and temperatures.
    """

    other_load: float | None
    throttle: dict[str, float]
    series: list[Series]
