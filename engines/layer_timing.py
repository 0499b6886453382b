"""The record that every profiler of layers returns, for `anyflow_deploy/profiling/layers.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LayerTiming:
    """The time of one layer, over all transitions that were profiled.

    Attributes:
        name: of the layer.
        operator: its kind, as the runtime calls it.
        seconds: of all calls together.
        calls: how often it ran.
        operations, bytes: of one call; 0 where they are unknown.
        module: the ONNX node it came from, where that has another name.
    """

    name: str
    operator: str
    seconds: float
    calls: int
    operations: float = 0.0
    bytes: float = 0.0
    module: str = ""


def merge_timings(timings: Iterable[LayerTiming]) -> list[LayerTiming]:
    """Add up the timings of the same layer, by name."""
    timings_by_name: dict[str, LayerTiming] = {}
    for row in timings:
        old = timings_by_name.get(row.name)
        timings_by_name[row.name] = (
            row
            if old is None
            else replace(old, seconds=old.seconds + row.seconds, calls=old.calls + row.calls)
        )
    return list(timings_by_name.values())
