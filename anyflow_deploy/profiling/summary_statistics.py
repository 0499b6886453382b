"""From samples to the few numbers people decide by.

Nothing is thrown away: a slow run happened, and the next user will meet it. Outliers are counted,
and the median, which they do not move, comes with an interval: two profiles differ when their
intervals do not overlap, not when their medians do. The interval is the distribution-free one of
order statistics (Conover, Practical Nonparametric Statistics, 3.2), since times are skewed and
nothing about them is normal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from anyflow_deploy.profiling.record import Latency

CONFIDENCE = 0.95
"""Of the median's interval."""

OUTLIER = 3.0
"""How many interquartile ranges above the third quartile (Tukey's "far out") a sample is called an
outlier."""

TAIL_SAMPLES = 100
"""Fewer than this, and the 99th percentile is in truth the slowest sample."""


def latency_from_samples(samples: Sequence[float]) -> Latency:
    """Summarize.

    Args:
        samples: seconds, in the order they were measured; at least one.
    """
    times = np.asarray(samples, dtype=np.float64)
    median, p90, p95, p99 = (float(np.percentile(times, p)) for p in (50, 90, 95, 99))
    return Latency(
        count=len(times),
        minimum=float(times.min()),
        mean=float(times.mean()),
        median=median,
        p90=p90,
        p95=p95,
        p99=p99,
        maximum=float(times.max()),
        deviation=float(times.std(ddof=1)) if len(times) > 1 else 0.0,
        interval=median_interval(times),
        outliers=outliers(times),
        drift=drift(times),
        samples=[float(f"{t:.6g}") for t in times],
    )


def median_interval(
    times: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]],
) -> tuple[float, float]:
    """Order statistics between which the true median lies with `CONFIDENCE`; with few samples, the
    smallest and the largest."""
    ordered = np.sort(np.asarray(times, dtype=np.float64))
    n = len(times)
    below, rank = 0.0, 0
    for k in range(n // 2):  # P(at most k samples lie below the median), a binomial with one half
        below += math.comb(n, k) * 0.5**n if n < 1000 else _normal_step(n, k)
        if below > (1 - CONFIDENCE) / 2:
            break
        rank = k + 1
    low = max(rank - 1, 0)
    return float(ordered[low]), float(ordered[n - 1 - low])


def _normal_step(n: int, k: int) -> float:
    """The binomial's term where its factorials are too large."""
    return math.exp(
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
    )


def outliers(times: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]]) -> int:
    """How many samples are far out above; 0 with fewer than four."""
    if len(times) < 4:
        return 0
    first, third = np.percentile(times, (25, 75))
    return int((np.asarray(times) > third + OUTLIER * (third - first)).sum())


def drift(times: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """Median of the second half over that of the first, less 1: heat, or someone else's work; 0
    with fewer than six."""
    if len(times) < 6:
        return 0.0
    half = len(times) // 2
    return float(np.median(times[half:]) / np.median(times[:half]) - 1)


def is_steady(times: Sequence[float], window: int, tolerance: float) -> bool:
    """Whether the last `window` samples are, in the median, as the `window` before them."""
    if len(times) < 2 * window:
        return False
    before = np.median(times[-2 * window : -window])
    now = np.median(times[-window:])
    return bool(abs(now / before - 1) <= tolerance)
