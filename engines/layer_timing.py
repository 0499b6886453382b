"""What every profiler of layers gives: a name, an operator, seconds. See
`anyflow_deploy/profiling/layers.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LayerTiming:
    """What a profiler saw of one layer, over all transitions it watched.

    Attributes:
        seconds: together.
        operations, bytes: of one call; 0 where they cannot be told.
        module: the ONNX node it came from, where the name is another.
    """

    name: str
    operator: str
    seconds: float
    calls: int
    operations: float = 0.0
    bytes: float = 0.0
    module: str = ""


def merge_timings(timings: Iterable[LayerTiming]) -> list[LayerTiming]:
    """Rows of the same layer added up, by name."""
    merged: dict[str, LayerTiming] = {}
    for row in timings:
        old = merged.get(row.name)
        merged[row.name] = (
            row
            if old is None
            else replace(old, seconds=old.seconds + row.seconds, calls=old.calls + row.calls)
        )
    return list(merged.values())
