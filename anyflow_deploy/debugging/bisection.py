"""Measured points, and the search for the first bad one with few tensors at a time.

All tensors of a graph may not fit into memory together. So a few are marked in each round, as
`git bisect` does it with commits, of which a graph of operators is another kind: what a bad point
does not depend on is no longer suspected, and neither is anything that a right point depends on.
That takes for granted that an error stays in what depends on it. It does not take for granted that
points lie in one row: keys and values of the text, for example, depend on no block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from onnx import ModelProto

from anyflow_deploy.debugging.points import Point
from anyflow_deploy.engines.metrics import Difference

CUTS = 7
"""Points in a round: eight pieces, so 400 points in a row take three rounds (and builds)."""

Measure = Callable[[Sequence[Point]], dict[str, Difference]]
"""Runs both sides with some points marked; differences by the points' names."""


@dataclass(frozen=True)
class MeasuredPoint:
    """A point, and how far the candidate is from the reference there."""

    point: Point
    difference: Difference

    def is_over(self, threshold: float) -> bool:
        """Tell whether it differs by more, or is not finite."""
        return not self.difference.relative_l2 <= threshold


def join_points(
    points: Sequence[Point], differences: Mapping[str, Difference]
) -> tuple[MeasuredPoint, ...]:
    """Pair the points that were measured with their differences."""
    return tuple(
        MeasuredPoint(point, differences[point.name])
        for point in points
        if point.name in differences
    )


def by_depth(*groups: Sequence[MeasuredPoint]) -> list[MeasuredPoint]:
    """Join measured points in the order of the graph."""
    return sorted(itertools.chain(*groups), key=lambda item: item.point.depth)


def first_over(measured: Iterable[MeasuredPoint], threshold: float) -> MeasuredPoint | None:
    """Find the first in order that is over the threshold; None where none is."""
    return next((item for item in measured if item.is_over(threshold)), None)


def bisect_points(
    model: ModelProto,
    points: Sequence[Point],
    measure: Measure,
    threshold: float,
    bad: MeasuredPoint | None,
) -> tuple[MeasuredPoint, ...]:
    """Search for a bad point that depends on no other.

    Args:
        model: the candidate's graph.
        points: in order of depth.
        measure: runs both sides.
        threshold: the largest relative L2 that is allowed.
        bad: what is known to be over; None where nothing is, and one round is a sample.

    Returns:
        The points that were measured, in order of depth.
    """
    upstream = _upstream(model, points)
    everything = (1 << len(points)) - 1
    suspects = everything if bad is None else upstream.get(bad.point.candidate, 0)
    differences: dict[str, Difference] = {}
    right = 0
    while suspects:
        picks = _spread([index for index in range(len(points)) if suspects >> index & 1])
        differences |= measure([points[index] for index in picks])
        for index in picks:
            point = points[index]
            suspects &= ~(1 << index)
            if not MeasuredPoint(point, differences[point.name]).is_over(threshold):
                right |= upstream[point.candidate]
            elif bad is None or point.depth < bad.point.depth:
                bad = MeasuredPoint(point, differences[point.name])
        if bad is None:
            break
        suspects &= upstream.get(bad.point.candidate, everything) & ~right
    return join_points(points, differences)


def _upstream(model: ModelProto, points: Sequence[Point]) -> dict[str, int]:
    """The points that a tensor depends on and is, one bit each, for every tensor of a graph."""
    own: dict[str, int] = {}
    for index, point in enumerate(points):
        own[point.candidate] = own.get(point.candidate, 0) | 1 << index
    result: dict[str, int] = {}
    for node in model.graph.node:
        bits = 0
        for name in node.input:
            bits |= result.get(name, 0)
        for name in node.output:
            result[name] = bits | own.get(name, 0)
    return result


def _spread(indices: Sequence[int]) -> list[int]:
    """Up to `CUTS` of some numbers, with equal gaps before, between and behind them."""
    if len(indices) <= CUTS:
        return list(indices)
    return [indices[len(indices) * (number + 1) // (CUTS + 1)] for number in range(CUTS)]
