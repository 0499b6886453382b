"""Summarize samples in the few numbers that decisions need.

No sample is removed: a slow run happened, and will happen again. Outliers are counted, and the
median, which they do not move, comes with an interval: two profiles differ when their
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
"""Confidence of the median's interval."""

OUTLIER = 3.0
"""Interquartile ranges above the third quartile at which an outlier begins (Tukey's "far out")."""

TAIL_SAMPLES = 100
"""With fewer samples, the 99th percentile is really the slowest sample."""


def latency_from_samples(samples: Sequence[float]) -> Latency:
    """Summarize samples.

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
        outliers=count_outliers(times),
        drift=measure_drift(times),
        samples=[float(f"{t:.6g}") for t in times],
    )


def median_interval(
    times: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]],
) -> tuple[float, float]:
    """Return the order statistics between which the true median lies with `CONFIDENCE`.

    With few samples these are the smallest and the largest.
    """
    sorted_times = np.sort(np.asarray(times, dtype=np.float64))
    n = len(times)
    below, rank = 0.0, 0
    for k in range(n // 2):  # P(at most k samples lie below the median), a binomial with one half
        below += math.comb(n, k) * 0.5**n if n < 1000 else _large_binomial_term(n, k)
        if below > (1 - CONFIDENCE) / 2:
            break
        rank = k + 1
    low = max(rank - 1, 0)
    return float(sorted_times[low]), float(sorted_times[n - 1 - low])


def _large_binomial_term(n: int, k: int) -> float:
    """Compute the binomial's term where its factorials are too large."""
    return math.exp(
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
    )


def count_outliers(times: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]]) -> int:
    """Count the samples that are far too long; 0 with fewer than four samples."""
    if len(times) < 4:
        return 0
    first, third = np.percentile(times, (25, 75))
    return int((np.asarray(times) > third + OUTLIER * (third - first)).sum())


def measure_drift(times: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """Compute the median of the second half over that of the first, less 1.

    It shows heat or another program's load. 0 with fewer than six samples.
    """
    if len(times) < 6:
        return 0.0
    half = len(times) // 2
    return float(np.median(times[half:]) / np.median(times[:half]) - 1)


def is_steady(times: Sequence[float], window: int, tolerance: float) -> bool:
    """Compare the medians of the last `window` samples and of the `window` before them."""
    if len(times) < 2 * window:
        return False
    before = np.median(times[-2 * window : -window])
    now = np.median(times[-window:])
    return bool(abs(now / before - 1) <= tolerance)
