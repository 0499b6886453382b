"""A thread that reads power, clocks, temperatures and memory during the work.

Every reading is kept with its time, by the clock that times the work, so that the energy of the
measured spans can be computed later: by interpolation in a counter, by the trapezoidal rule over
watts.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import numpy as np

from anyflow_deploy.profiling.power import PowerSource
from anyflow_deploy.profiling.record import PowerUsage, Series
from anyflow_deploy.profiling.timing import clock

INTERVAL = 0.05
"""Seconds between two readings. NVML's own average changes every 25 to 100 ms, an INA3221's
conversion takes less."""

Reader = Callable[[], float | None]
TimeSpan = tuple[float, float]


class ResourceSampler:
    """Samples the machine in a thread; a context manager around the work.

    Args:
        powers: power sources.
        reads: functions that read other numbers, by name; a reading may be None.
        flags: returns the words that are true now, such as reasons for throttling.
        interval: seconds between two readings.
    """

    def __init__(
        self,
        powers: Sequence[PowerSource] = (),
        reads: Mapping[str, Reader] | None = None,
        flags: Callable[[], list[str]] = list,
        interval: float = INTERVAL,
    ) -> None:
        self._powers = list(powers)
        self._reads = dict(reads or {})
        self._flags = flags
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="anyflow-profile", daemon=True)
        self._watts: dict[str, list[tuple[float, float]]] = {
            source.name: [] for source in self._powers
        }
        self._values: dict[str, list[tuple[float, float]]] = {name: [] for name in self._reads}
        self._flag_rows: list[list[str]] = []
        self.start = clock()

    def __enter__(self) -> ResourceSampler:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _loop(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        for source in self._powers:
            read = source.watts or source.joules
            try:
                assert read is not None
                self._watts[source.name].append((clock(), read()))
            except (OSError, ValueError):  # a reading that failed; the next one may not
                continue
        for name, read_value in self._reads.items():
            value = read_value()
            if value is not None:
                self._values[name].append((clock(), value))
        self._flag_rows.append(self._flags())

    def joules(self, name: str, spans: Sequence[TimeSpan]) -> float:
        """Return the energy of a source in these spans together."""
        source = next(source for source in self._powers if source.name == name)
        cumulative = _cumulative_joules(source, self._watts[name])
        return sum(
            _interpolate(cumulative, end) - _interpolate(cumulative, begin) for begin, end in spans
        )

    def power(self, name: str, idle: TimeSpan, busy: TimeSpan) -> PowerUsage | None:
        """Return a source's record of the whole run; None if it was not read twice."""
        source = next(source for source in self._powers if source.name == name)
        rows = self._watts[name]
        cumulative = _cumulative_joules(source, rows)
        if len(cumulative) < 2:
            return None
        watts = [
            (time, value)
            for time, value in (rows if source.watts else _watts_between(cumulative))
            if busy[0] <= time <= busy[1]
        ]
        joules = self.joules(name, [busy])
        seconds = busy[1] - busy[0]
        idle_watts = self.joules(name, [idle]) / (idle[1] - idle[0]) if idle[1] > idle[0] else None
        return PowerUsage(
            name=name,
            kind=source.kind,
            method=source.method,
            idle_watts=idle_watts,
            mean_watts=joules / seconds,
            peak_watts=max((value for _, value in watts), default=joules / seconds),
            joules=joules,
            samples=[(round(time - busy[0], 3), round(value, 3)) for time, value in watts],
        )

    def series(self, units: Mapping[str, str], start: float) -> list[Series]:
        """Return all readings of `reads`, from `start` on."""
        return [
            Series(
                name=name,
                unit=units.get(name, ""),
                samples=[(round(t - start, 3), v) for t, v in rows if t >= start],
            )
            for name, rows in self._values.items()
            if any(t >= start for t, _ in rows)
        ]

    def maximum(self, name: str) -> float | None:
        """Return the largest value of a reading; None without readings."""
        return max((value for _, value in self._values.get(name, [])), default=None)

    def flag_shares(self) -> dict[str, float]:
        """Return the share of samples in which each flag was true."""
        words = {word for row in self._flag_rows for word in row}
        return {
            word: sum(word in row for row in self._flag_rows) / len(self._flag_rows)
            for word in sorted(words)
        }


def _cumulative_joules(
    source: PowerSource, rows: list[tuple[float, float]]
) -> list[tuple[float, float]]:
    """Add up joules over time: integrated watts, or a counter without its wraps."""
    total, result = 0.0, rows[:1] and [(rows[0][0], 0.0)]
    for (before, first), (now, second) in itertools.pairwise(rows):
        if source.watts is not None:
            total += (first + second) / 2 * (now - before)
        elif second >= first or source.wraps is None:
            total += max(second - first, 0.0)
        else:
            total += second + source.wraps - first
        result.append((now, total))
    return result


def _watts_between(cumulative: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Compute the watts between the readings of a counter."""
    pairs = itertools.pairwise(cumulative)
    return [((a + b) / 2, (second - first) / (b - a)) for (a, first), (b, second) in pairs if b > a]


def _interpolate(cumulative: list[tuple[float, float]], moment: float) -> float:
    if not cumulative:
        return 0.0
    times, values = zip(*cumulative, strict=True)
    return float(np.interp(moment, times, values))
