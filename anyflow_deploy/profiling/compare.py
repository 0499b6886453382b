"""Compare two profiles: what grew, by how much, and whether that is more than chance.

A latency is a regression when its median grew by more than the threshold *and* the intervals of the
two medians do not overlap: with few or scattered samples, the second condition keeps noise from
counting as a regression, and the table says "within noise". Sizes and energies have no interval;
only their threshold decides. A measurement that the newer profile lacks counts as a regression,
too: it must not pass for a good one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.profiling.record import Latency, Point, Profile

RegressionVerdict = Literal[
    "regression", "improvement", "within noise", "unchanged", "missing", "new"
]

TIME, MEMORY, ENERGY = 0.05, 0.05, 0.10
"""Default thresholds. Energy is sampled, and scatters more."""


@dataclass(frozen=True)
class Thresholds:
    """Growth, as a share of the older value, above which a number is a regression."""

    time: float = TIME
    memory: float = MEMORY
    energy: float = ENERGY


@dataclass(frozen=True)
class ComparedValue:
    """One number of a profile, with the interval it lies in where there is one."""

    value: float
    unit: Literal["s", "B", "J"]
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class ComparisonRow:
    """One number of both profiles.

    Attributes:
        change: new over old, less 1; None where one is missing.
    """

    name: str
    old: ComparedValue | None
    new: ComparedValue | None
    change: float | None
    verdict: RegressionVerdict


@dataclass(frozen=True)
class Comparison:
    """All rows, and the other differences: names with both values."""

    rows: list[ComparisonRow]
    differences: dict[str, tuple[str, str]]

    @property
    def has_regression(self) -> bool:
        """Whether anything became worse, or is missing."""
        return any(row.verdict in ("regression", "missing") for row in self.rows)


def compare_profiles(old: Profile, new: Profile, thresholds: Thresholds) -> Comparison:
    """Compare two profiles, number by number.

    Raises:
        AnyFlowError: they have no measurement in common.
    """
    before, after = dict(_values(old)), dict(_values(new))
    if not set(before) & set(after):
        shapes = [", ".join(point.shape for point in profile.points) for profile in (old, new)]
        raise AnyFlowError(
            f"the profiles have no measurement in common: one is of {old.subject.model} at"
            f" {shapes[0]}, the other of {new.subject.model} at {shapes[1]}. Profile the same"
            " --shapes and --steps."
        )
    names = [*before, *(name for name in after if name not in before)]
    rows = [_compare_values(name, before.get(name), after.get(name), thresholds) for name in names]
    return Comparison(rows, dict(_differences(old, new)))


def _compare_values(
    name: str, old: ComparedValue | None, new: ComparedValue | None, thresholds: Thresholds
) -> ComparisonRow:
    if old is None or new is None:
        return ComparisonRow(name, old, new, None, "new" if old is None else "missing")
    change = new.value / old.value - 1 if old.value else 0.0
    limit = {"s": thresholds.time, "B": thresholds.memory, "J": thresholds.energy}[new.unit]
    if abs(change) <= limit:
        verdict: RegressionVerdict = "unchanged"
    elif (
        old.interval
        and new.interval
        and old.interval[0] <= new.interval[1]
        and new.interval[0] <= old.interval[1]
    ):
        verdict = "within noise"
    else:
        verdict = "regression" if change > 0 else "improvement"
    return ComparisonRow(name, old, new, change, verdict)


def _values(profile: Profile) -> Iterator[tuple[str, ComparedValue]]:
    for point in profile.points:
        yield from _point_values(point)
    for stage in profile.stages:
        yield stage.name, _latency_value(stage.latency)
        yield f"{stage.name}, peak memory", ComparedValue(stage.memory.cpu_peak, "B")
    yield "engine, peak CPU memory", ComparedValue(profile.memory.cpu_peak, "B")
    if profile.memory.gpu_peak is not None:
        yield "engine, peak GPU memory", ComparedValue(profile.memory.gpu_peak, "B")
    if profile.memory.shared_peak is not None and profile.memory.shared_before is not None:
        yield (
            "engine, shared memory",
            ComparedValue(profile.memory.shared_peak - profile.memory.shared_before, "B"),
        )
    yield (
        "loading the engine",
        ComparedValue(profile.subject.load_seconds, "s", (0.0, 2 * profile.subject.load_seconds)),
    )


def _point_values(point: Point) -> Iterator[tuple[str, ComparedValue]]:
    yield f"{point.shape}, transition", _latency_value(point.transition)
    if point.enqueue is not None:
        yield f"{point.shape}, enqueue", _latency_value(point.enqueue)
    for clip in point.clips:
        yield f"{point.shape}, {clip.steps} steps", _latency_value(clip.latency)
        for name, joules in clip.joules.items():
            yield f"{point.shape}, {clip.steps} steps, energy of {name}", ComparedValue(joules, "J")
    for chunks in point.chunks:
        yield f"{point.shape}, {chunks.steps} steps, first chunk", _latency_value(chunks.first)
        if chunks.later is not None:
            yield f"{point.shape}, {chunks.steps} steps, later chunks", _latency_value(chunks.later)


def _latency_value(latency: Latency) -> ComparedValue:
    return ComparedValue(latency.median, "s", latency.interval)


def _differences(old: Profile, new: Profile) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield what differs in bundle, engine and machine."""
    for name in ("digest", "model", "precision", "engine", "provider", "threads"):
        values = str(getattr(old.subject, name)), str(getattr(new.subject, name))
        if values[0] != values[1]:
            yield ("bundle" if name == "digest" else name), (values[0][:40], values[1][:40])
    for name in sorted({*old.machine, *new.machine} - {"memory_bytes"}):
        first, second = old.machine.get(name), new.machine.get(name)
        if isinstance(first, dict) and isinstance(second, dict):
            for key in sorted({*first, *second}):
                if first.get(key) != second.get(key):
                    yield f"{name} {key}", (str(first.get(key)), str(second.get(key)))
        elif first != second:
            yield name, (str(first), str(second))
