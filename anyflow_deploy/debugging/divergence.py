"""Where an engine leaves the reference: the first point over a threshold, by depth.

Polygraphy runs both sides on the same arrays and compares them (`measure`). First the outputs of
the graphs as they are: marking tensors as outputs can keep a runtime from fusing what lies between
them, and an error that is only in a fusion would vanish. Then the points, all in one run or by
bisection (`bisection`). Where blocks are compared, the first bad one is looked into, layer by
layer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anyflow_deploy.debugging.backends import GraphSide
from anyflow_deploy.debugging.bisection import (
    MeasuredPoint,
    bisect_points,
    by_depth,
    first_over,
    join_points,
)
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
        """Find the first of points and outputs over the threshold."""
        return first_over(by_depth(self.points, self.outputs), self.threshold)

    @property
    def first(self) -> MeasuredPoint | None:
        """Find the same as exactly as it is known: a layer where there is one."""
        return first_over(self.layers, self.threshold) or self.first_place


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
    points = find_points(*models, detail, smoothed)
    ends = output_points(*models)
    with progress.stage("outputs as they are"):
        outputs = join_points(ends, comparison.measure(ends))

    def measure(some: Sequence[Point], bad: MeasuredPoint | None) -> tuple[MeasuredPoint, ...]:
        if not bisect:
            return join_points(some, comparison.measure(some))
        return bisect_points(models[0], some, comparison.measure, threshold, bad)

    with progress.stage(f"{len(points)} {detail}"):
        measured = measure(points, first_over(outputs, threshold))
    layers: tuple[MeasuredPoint, ...] = ()
    bad = first_over(by_depth(measured, outputs), threshold)
    if detail == "blocks" and bad is not None:
        inside = _points_around(find_points(*models, "layers", smoothed), points, bad.point)
        with progress.stage(f"layers around {bad.point.name}"):
            layers = measure(inside, bad) if inside else ()
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
