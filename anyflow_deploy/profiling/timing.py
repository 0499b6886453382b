"""The clock, the warm-up and the rounds.

Everything is timed by `time.perf_counter` (monotonic, with the best resolution there is) around
work that has finished when it returns: engines wait for their device. Python's garbage collector
is off meanwhile, as in `timeit`.

Warm-up ends when the last few transitions take as long as the few before them: first runs allocate,
autotune, capture CUDA graphs and raise clocks. Then the cases run in turn, round after round, so
that drift (heat, other programs) affects all of them alike.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from anyflow_deploy.profiling.record import Method, Warmup
from anyflow_deploy.profiling.summary_statistics import is_steady
from anyflow_deploy.progress import Progress

WINDOW, TOLERANCE = 4, 0.05
"""Transitions that are compared with those before, and the most that their medians may differ."""

WARM_UP_SHARE = 0.5
"""Share of the budget that warm-up may take in addition. (Two runs are always made.)"""

MIN_ROUNDS, MAX_ROUNDS = 3, 200

clock = time.perf_counter


@dataclass(frozen=True)
class TimingRules:
    """How long to measure.

    Attributes:
        seconds: budget of the measured rounds of one shape.
        rounds: number of rounds; None for as many as the budget holds, within `MIN_ROUNDS` and
            `MAX_ROUNDS`.
    """

    seconds: float = 20.0
    rounds: int | None = None

    def count_rounds(self, one_round: float) -> int:
        """Return the number of rounds, when one takes so many seconds."""
        if self.rounds is not None:
            return self.rounds
        return max(MIN_ROUNDS, min(MAX_ROUNDS, int(self.seconds / max(one_round, 1e-9))))


@dataclass
class TimedRuns:
    """The times of all runs.

    Attributes:
        spans: (begin, end) of every run of each case, by the clock.
    """

    spans: dict[Any, list[tuple[float, float]]] = field(default_factory=dict)

    def seconds(self, case: Any) -> list[float]:
        """Return the durations of a case, in order."""
        return [end - begin for begin, end in self.spans[case]]


def run_warm_up(run: Callable[[], None], transitions: list[float], rules: TimingRules) -> Warmup:
    """Run until the times are steady, or the budget is spent.

    Args:
        run: runs once and adds its transitions' seconds to `transitions`.
        transitions: seconds so far; the list is empty when this returns.
        rules: the budget.
    """
    start = clock()
    runs = 0
    while True:
        run()
        runs += 1
        steady = is_steady(transitions, WINDOW, TOLERANCE)
        elapsed = clock() - start
        if steady or (runs >= 2 and elapsed > WARM_UP_SHARE * rules.seconds):
            break
    transitions.clear()
    return Warmup(runs=runs, seconds=elapsed, steady=steady)


def measure_cases(
    cases: Mapping[Any, Callable[[], None]], rules: TimingRules, progress: Progress, name: str
) -> TimedRuns:
    """Run all cases in turn, round after round.

    Args:
        cases: functions to run, by a key; each has run before.
        rules: how long to measure.
        progress: shows the rounds.
        name: of the progress bar.
    """
    timed_runs = TimedRuns({case: [] for case in cases})
    with pause_garbage_collection():
        start = clock()
        _run_round(cases, timed_runs)
        rounds = rules.count_rounds(clock() - start)
        with progress.stage(name, rounds) as advance:
            advance(1)
            for _ in range(rounds - 1):
                _run_round(cases, timed_runs)
                advance(1)
    return timed_runs


def _run_round(cases: Mapping[Any, Callable[[], None]], timed_runs: TimedRuns) -> None:
    for case, run in cases.items():
        begin = clock()
        run()
        timed_runs.spans[case].append((begin, clock()))


@contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Collect garbage once, and not again during the block, as `timeit` does."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def describe_method(rules: TimingRules, sample_interval: float) -> Method:
    """Describe the rules in words, for the record."""
    info = time.get_clock_info("perf_counter")
    readings = [clock() for _ in range(1001)]
    step = statistics.median(b - a for a, b in itertools.pairwise(readings))
    facts = {
        "name": "time.perf_counter",
        "implementation": info.implementation,
        "resolution_seconds": info.resolution,
    }
    limit = (
        f"{rules.rounds} rounds"
        if rules.rounds
        else f"as many as {rules.seconds:g} s hold, {MIN_ROUNDS} to {MAX_ROUNDS}"
    )
    return Method(
        clock={**facts, "monotonic": info.monotonic, "reading_seconds": step},
        warm_up=(
            f"until the medians of the last {WINDOW} transitions and of the {WINDOW} before are"
            f" within {100 * TOLERANCE:g} %, for at most {100 * WARM_UP_SHARE:g} % of the budget"
            " and two runs at least"
        ),
        rounds=(
            f"all numbers of steps in turn within a round; {limit}; garbage collection off; clocks"
            f" and power are read by a thread every {sample_interval:g} s"
        ),
        outliers=(
            "none removed; counted where above the third quartile by three interquartile ranges"
        ),
        percentiles=(
            "linear between order statistics; the interval of the median is that of order"
            " statistics at 95 %"
        ),
        synchronization="every transition has finished on its device before the clock is read",
        seconds=rules.seconds,
    )
