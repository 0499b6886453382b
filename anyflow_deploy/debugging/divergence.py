"""Where an engine leaves the reference: the first point over a threshold, by depth.

Polygraphy runs both sides on the same arrays and compares them (`measure`). First the outputs of
the graphs as they are: marking tensors as outputs can keep a runtime from fusing what lies between
them, and an error that is only in a fusion would vanish. Then the points, all in one run, or by
bisection where they are too many to hold in memory: a few at a time, each round between the last
point that was right and the first that was not. Bisection takes for granted that an error stays
once it is there. Where blocks are compared, the first bad one is looked into, layer by layer.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anyflow_deploy.debugging.backends import GraphSide
from anyflow_deploy.debugging.inputs import Feed
from anyflow_deploy.debugging.points import (
    Point,
    find_points,
    mark_outputs,
    output_points,
    point_of_output,
)
from anyflow_deploy.debugging.polygraphy_setup import describe_failure, forget_errors
from anyflow_deploy.engines.metrics import Difference, difference
from anyflow_deploy.errors import AnyFlowError, BackendError
from anyflow_deploy.progress import NullProgress, Progress

CUTS = 7
"""Points in a round of bisection: eight pieces, so 400 points take three rounds (and builds)."""

Measure = Callable[[Sequence[Point]], dict[str, Difference]]
"""Runs both sides with some points marked; differences by the points' names."""


@dataclass(frozen=True)
class MeasuredPoint:
    """A point, and how far the candidate is from the reference there."""

    point: Point
    difference: Difference

    def is_over(self, threshold: float) -> bool:
        """Whether it differs by more, or is not finite."""
        return not self.difference.relative_l2 <= threshold


@dataclass(frozen=True)
class Divergence:
    """What came out.

    Attributes:
        candidate, reference: their descriptions.
        detail: of the points.
        threshold: the largest relative L2 that is allowed.
        outputs: of the graphs as they are, nothing else marked.
        points: in order of depth.
        layers: around the first place over the threshold, where blocks were compared.
        rounds: runs of both sides.
    """

    candidate: str
    reference: str
    detail: str
    threshold: float
    outputs: tuple[MeasuredPoint, ...]
    points: tuple[MeasuredPoint, ...]
    layers: tuple[MeasuredPoint, ...] = ()
    rounds: int = 1

    @property
    def first_place(self) -> MeasuredPoint | None:
        """The first of points and outputs over the threshold."""
        return first_over(by_depth(self.points, self.outputs), self.threshold)

    @property
    def first(self) -> MeasuredPoint | None:
        """The same as exactly as it is known: a layer where there is one."""
        return first_over(self.layers, self.threshold) or self.first_place


def by_depth(*groups: Sequence[MeasuredPoint]) -> list[MeasuredPoint]:
    """Join measured points in the order of the graph."""
    return sorted(itertools.chain(*groups), key=lambda item: item.point.depth)


def first_over(measured: Iterable[MeasuredPoint], threshold: float) -> MeasuredPoint | None:
    """The first in order that is over the threshold; None where none is."""
    return next((item for item in measured if item.is_over(threshold)), None)


@dataclass
class Comparison:
    """Two sides and what they are fed."""

    candidate: GraphSide
    reference: GraphSide
    feed: Feed
    rounds: int = field(default=0, init=False)

    def measure(self, points: Sequence[Point]) -> dict[str, Difference]:
        """Run both sides with some points marked.

        Raises:
            BackendError: a runtime refuses its graph.
            AnyFlowError: a point has another shape on the other side.
        """
        from polygraphy.comparator import Comparator

        self.rounds += 1
        forget_errors()
        sides = (
            (self.reference, {point.name: point.reference for point in points}),
            (self.candidate, {point.name: point.candidate for point in points}),
        )
        try:
            runners = [
                side.runner(mark_outputs(side.model, tensors), self.feed) for side, tensors in sides
            ]
            results = Comparator.run(runners, data_loader=[self.feed])
            accuracy = Comparator.compare_accuracy(results, compare_func=_compare_outputs)
        except AnyFlowError:
            raise
        except Exception as error:  # the runtimes' and Polygraphy's exceptions have no common base
            raise BackendError(
                f"{self.candidate.description} could not run the graph with {len(points)} tensors"
                f" marked as outputs: {describe_failure(error)}"
            ) from error
        (iterations,) = accuracy[0].values()
        return dict(iterations[0])


def _compare_outputs(
    reference: Mapping[str, Any], candidate: Mapping[str, Any]
) -> OrderedDict[str, Difference]:
    """A compare function of Polygraphy's: what it returns for each output is kept as it is."""
    result = OrderedDict()
    for name, expected in reference.items():
        found = candidate[name]
        point = point_of_output(name)
        if found.shape != expected.shape:
            raise AnyFlowError(
                f"{point} is {found.shape} in the candidate and {expected.shape} in the reference:"
                " they are not of one model. Give a --reference exported from the same checkpoint."
            )
        result[point] = difference(found, expected)
    return result


def find_divergence(
    comparison: Comparison,
    detail: str,
    threshold: float,
    bisect: bool = False,
    smoothed: bool = False,
    progress: Progress | None = None,
) -> Divergence:
    """Compare two sides, and find where they part.

    Args:
        comparison: both sides and their inputs.
        detail: what is compared, one of `debugging.DETAILS`.
        threshold: the largest relative L2 that is allowed.
        bisect: mark a few points at a time; only some are measured then.
        smoothed: see `points.find_points`.
        progress: where progress goes.
    """
    progress = progress or NullProgress()
    models = (comparison.candidate.model, comparison.reference.model)
    search = _Search(comparison.measure, threshold, bisect)
    points = find_points(*models, detail, smoothed)
    ends = output_points(*models)
    with progress.stage("outputs as they are"):
        outputs = _measured(ends, comparison.measure(ends))
    with progress.stage(f"{len(points)} {detail}"):
        measured = search.measure(points)
    layers: tuple[MeasuredPoint, ...] = ()
    bad = first_over(by_depth(measured, outputs), threshold)
    if detail == "blocks" and bad is not None:
        inside = _points_around(find_points(*models, "layers", smoothed), points, bad.point)
        with progress.stage(f"layers around {bad.point.name}"):
            layers = search.measure(inside)
    return Divergence(
        comparison.candidate.description,
        comparison.reference.description,
        detail,
        threshold,
        outputs,
        measured,
        layers,
        comparison.rounds,
    )


def _points_around(layers: list[Point], points: list[Point], bad: Point) -> list[Point]:
    """The layers behind the last point before the bad one, up to the bad one or, where that is an
    output of the graph, to the next point."""
    before = max((point.depth for point in points if point.depth < bad.depth), default=-1)
    end = min((point.depth for point in points if point.depth >= bad.depth), default=bad.depth)
    return [layer for layer in layers if before < layer.depth <= end]


def _measured(
    points: Sequence[Point], differences: dict[str, Difference]
) -> tuple[MeasuredPoint, ...]:
    return tuple(MeasuredPoint(point, differences[point.name]) for point in points)


@dataclass(frozen=True)
class _Search:
    """How points are measured: all of them, or by bisection."""

    run: Measure
    threshold: float
    bisect: bool

    def measure(self, points: Sequence[Point]) -> tuple[MeasuredPoint, ...]:
        """Measure points, given in order of depth."""
        if not self.bisect:
            return _measured(points, self.run(points)) if points else ()
        found: dict[str, Difference] = {}
        low, high = 0, len(points)
        while low < high:
            picks = _cuts(low, high)
            found |= self.run([points[index] for index in picks])
            over = [
                index
                for index in picks
                if MeasuredPoint(points[index], found[points[index].name]).is_over(self.threshold)
            ]
            if not over:
                break
            high = over[0]
            low = max((index + 1 for index in picks if index < high), default=low)
        return _measured([point for point in points if point.name in found], found)


def _cuts(low: int, high: int) -> list[int]:
    """Up to `CUTS` numbers from low on and below high, evenly spread, the last one among them."""
    count = min(CUTS, high - low)
    return [low + (high - low) * (number + 1) // count - 1 for number in range(count)]
