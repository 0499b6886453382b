"""A divergence as people read it: tables on the terminal, and a picture of error by depth.

The picture needs matplotlib (the `export` extra); without it the numbers still come.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from anyflow_deploy.bundle.atomic_io import atomic_file
from anyflow_deploy.bundle.outputs import OutputFile
from anyflow_deploy.debugging.bisection import MeasuredPoint, by_depth, first_over
from anyflow_deploy.debugging.divergence import Divergence
from anyflow_deploy.engines.validation import json_safe

_ROWS = 40
"""A longer table is cut to whole blocks, and to what is near the first point over the threshold, or
near the worst where none is over."""

_NEAR = 4
_LABELS = 45

_FAMILIES = {
    "attn1": ("self-attention", "#1b6ca8", "o"),
    "attn2": ("cross-attention", "#d1495b", "s"),
    "ffn": ("feed-forward", "#3a7d44", "^"),
    "norm2": ("norm", "#8d6a9f", "v"),
    "block": ("block", "#222222", "D"),
    "": ("outside of the blocks", "#e09f3e", "P"),
}


def divergence_as_json(divergence: Divergence) -> dict[str, Any]:
    """Give everything that was measured. Infinite and undefined numbers become null."""
    first = divergence.first
    content = {
        "candidate": divergence.candidate,
        "reference": divergence.reference,
        "detail": divergence.detail,
        "threshold": divergence.threshold,
        "first_over": None if first is None else first.point.name,
        "passed": first is None,
        "rounds": divergence.rounds,
        **{
            name: [_record(item) for item in getattr(divergence, name)]
            for name in ("outputs", "points", "layers")
        },
    }
    return {key: json_safe(value) for key, value in content.items()}


def _record(item: MeasuredPoint) -> dict[str, Any]:
    return {
        "name": item.point.name,
        "depth": item.point.depth,
        "difference": dataclasses.asdict(item.difference),
    }


def divergence_tables(divergence: Divergence) -> list[Table]:
    """Make tables of outputs, of points by depth, and of layers around the first that is over."""
    bad = divergence.first_place
    parts = [
        ("outputs of the graph as it is, nothing marked", divergence.outputs),
        (f"{divergence.detail}, by depth", divergence.points),
    ]
    if divergence.layers and bad is not None:
        parts.append((f"layers around {bad.point.name}, by depth", divergence.layers))
    return [_table(title, measured, divergence.threshold) for title, measured in parts]


def _table(title: str, measured: Sequence[MeasuredPoint], threshold: float) -> Table:
    shown = _shown_rows(measured, threshold)
    if len(shown) < len(measured):
        title += f" ({len(shown)} of {len(measured)}; the JSON file has all)"
    table = Table(Column("", overflow="fold"), "relative L2", "PSNR", "max abs", title=title)
    first = first_over(measured, threshold)
    for item in shown:
        name = f"[bold red]{item.point.name}[/]" if item is first else item.point.name
        table.add_row(name, *_cells(item, threshold))
    return table


def _cells(item: MeasuredPoint, threshold: float) -> tuple[str, ...]:
    d = item.difference
    if d.not_finite:
        return "[red]not finite[/]", "", ""
    if d.relative_l2 == 0:
        return "[green]equal[/]", "", ""
    colour = "red" if item.is_over(threshold) else "green"
    return f"[{colour}]{d.relative_l2:.2e}[/]", f"{d.psnr_db:.1f} dB", f"{d.max_abs:.2e}"


def _shown_rows(measured: Sequence[MeasuredPoint], threshold: float) -> list[MeasuredPoint]:
    if len(measured) <= _ROWS:
        return list(measured)
    worst = max(measured, key=lambda item: item.difference.relative_l2)
    place = list(measured).index(first_over(measured, threshold) or worst)
    return [
        item
        for index, item in enumerate(measured)
        if item.point.name == item.point.block or abs(index - place) <= _NEAR
    ]


def plot_divergence(divergence: Divergence, path: Path | OutputFile) -> None:
    """Write the picture, a PNG: error by depth, and beside it around the first that is over."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bad = divergence.first_place
    everything = by_depth(divergence.points, divergence.outputs)
    parts = [(f"By depth: {divergence.detail} and outputs", everything)]
    if divergence.layers and bad is not None:
        parts.append((f"Layers around {bad.point.name}", list(divergence.layers)))
    figure, axes = pyplot.subplots(
        1, len(parts), figsize=(6.2 * len(parts) + 1, 5.6), layout="constrained", squeeze=False
    )
    for place, (title, measured) in zip(axes[0], parts, strict=True):
        _draw_points(place, measured, divergence.threshold)
        place.set(title=title, yscale="log", ylabel="relative L2 to the reference")
    first = divergence.first
    verdict = "nothing is over" if first is None else f"first over: {first.point.name}"
    figure.suptitle(
        f"{divergence.candidate}\nagainst {divergence.reference}\n{verdict}", fontsize=9
    )
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
    pyplot.close(figure)


def _draw_points(axes: Any, measured: Sequence[MeasuredPoint], threshold: float) -> None:
    errors = [item.difference.relative_l2 for item in measured]
    heights = _heights(errors, threshold)
    differing = [n for n, error in enumerate(errors) if error != 0]
    axes.plot(differing, [heights[n] for n in differing], color="#cccccc", lw=1, zorder=1)
    for family, (label, colour, marker) in _FAMILIES.items():
        places = [n for n, item in enumerate(measured) if _family(item) == family]
        if places:
            axes.scatter(
                places,
                [heights[n] for n in places],
                alpha=[1.0 if errors[n] else 0.3 for n in places],
                color=colour,
                marker=marker,
                s=26 if len(measured) <= _LABELS else 12,
                label=label,
                zorder=2,
            )
    _draw_level(axes, threshold, f"allowed: {threshold:g}", "--")
    if len(differing) < len(measured):
        _draw_level(axes, heights[errors.index(0)], "equal", ":")
    _draw_first(axes, measured, heights, threshold)
    few = len(measured) <= _LABELS
    shown = [n for n, item in enumerate(measured) if few or item.point.name == item.point.block]
    names = [measured[n].point.name.replace("condition_embedder.", "… .") for n in shown]
    axes.set_xticks(shown, names, rotation=90, fontsize=7)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="lower right")


def _heights(errors: Sequence[float], threshold: float) -> list[float]:
    """Where errors are drawn: where both sides are equal, at a tenth of the least difference; where
    one is not finite, at ten times the largest."""
    drawn = [error for error in errors if error > 0 and math.isfinite(error)]
    low, high = min([threshold, *drawn]) / 10, max([threshold, *drawn]) * 10
    return [high if not math.isfinite(error) else error or low for error in errors]


def _draw_first(
    axes: Any, measured: Sequence[MeasuredPoint], heights: Sequence[float], threshold: float
) -> None:
    first = first_over(measured, threshold)
    if first is None:
        return
    place = list(measured).index(first)
    finite = math.isfinite(first.difference.relative_l2)
    axes.scatter([place], [heights[place]], s=150, facecolors="none", edgecolors="red")
    axes.annotate(
        first.point.name if finite else f"{first.point.name}: not finite",
        (place, heights[place]),
        xytext=(0, 11),
        textcoords="offset points",
        ha="right" if 2 * place > len(measured) else "left",
        color="red",
        fontsize=9,
    )
    axes.margins(y=0.15)


def _draw_level(axes: Any, height: float, text: str, style: str) -> None:
    axes.axhline(height, color="#555555", ls=style, lw=1, zorder=0)
    axes.text(
        0.01,
        height,
        f" {text}",
        transform=axes.get_yaxis_transform(),
        va="bottom",
        fontsize=8,
        color="#555555",
    )


def _family(item: MeasuredPoint) -> str:
    block, name = item.point.block, item.point.name
    if block is None:
        return ""
    inside = name.removeprefix(block)
    return next((family for family in _FAMILIES if family and f".{family}" in inside), "block")
