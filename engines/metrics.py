"""Distances between two arrays, for reports and thresholds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from anyflow_deploy.engines.engine import Array


@dataclass(frozen=True)
class Difference:
    """A candidate measured against a reference.

    Attributes:
        relative_l2: |candidate - reference| / |reference|; 0 where both are all zeros.
        cosine: of the angle between them, 1 when they point the same way.
        psnr_db: peak signal (the reference's range) to noise, in decibels; infinite when equal.
        max_abs: largest difference of one element.
        not_finite: NaN and infinite elements of the candidate.
    """

    relative_l2: float
    cosine: float
    psnr_db: float
    max_abs: float
    not_finite: int


def difference(candidate: Array, reference: Array) -> Difference:
    """Compare two arrays of one shape, in double precision.

    Where the candidate is not finite, the distances are infinite or undefined.
    """
    c = candidate.astype(np.float64).ravel()
    r = reference.astype(np.float64).ravel()
    bad = int(np.size(c) - np.count_nonzero(np.isfinite(c)))
    if bad:
        return Difference(math.inf, math.nan, -math.inf, math.inf, bad)
    error = c - r
    norms = float(np.linalg.norm(c)), float(np.linalg.norm(r))
    distance = float(np.linalg.norm(error))
    mean_square = float(np.mean(error**2))
    peak = float(np.ptp(r))
    return Difference(
        relative_l2=distance / norms[1] if norms[1] else math.inf if distance else 0.0,
        cosine=float(c @ r) / (norms[0] * norms[1]) if norms[0] and norms[1] else math.nan,
        psnr_db=10 * math.log10(peak**2 / mean_square) if mean_square and peak else math.inf,
        max_abs=float(np.max(np.abs(error))),
        not_finite=0,
    )
