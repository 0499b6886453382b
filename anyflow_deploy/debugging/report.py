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

from anyflow_deploy.debugging.divergence import (
    Divergence,
    MeasuredPoint,
    by_depth,
    first_over,
)
from anyflow_deploy.engines.validation import json_safe

_ROWS = 40
"""A longer table is cut to whole blocks, and to what is near the first point over the threshold, or
near the worst where none is over."""

_NEAR = 4
_LABELS = 45
_FLOOR = 1e-9  # what a difference of exactly zero is drawn at: a logarithm has no zero

_FAMILIES = {
    "attn1": ("self-attention", "#1b6ca8", "o"),
    "attn2": ("cross-attention", "#d1495b", "s"),
    "ffn": ("feed-forward", "#3a7d44", "^"),
    "norm2": ("norm", "#8d6a9f", "v"),
    "block": ("block", "#222222", "D"),
    "": ("outside of the blocks", "#e09f3e", "P"),
}


def divergence_as_json(divergence: Divergence) -> dict[str, Any]:
    """Everything that was measured. Infinite and undefined numbers become null."""
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
    """The outputs, the points by depth, and the layers around the first that is over."""
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


def plot_divergence(divergence: Divergence, path: Path) -> None:
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
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_points(axes: Any, measured: Sequence[MeasuredPoint], threshold: float) -> None:
    heights = [max(item.difference.relative_l2, _FLOOR) for item in measured]
    finite = [height for height in heights if math.isfinite(height)]
    top = 10 * max([threshold, *finite])
    heights = [height if math.isfinite(height) else top for height in heights]
    axes.plot(range(len(heights)), heights, color="#bbbbbb", lw=1, zorder=1)
    for family, (label, colour, marker) in _FAMILIES.items():
        places = [n for n, item in enumerate(measured) if _family(item) == family]
        if places:
            axes.scatter(
                places,
                [heights[n] for n in places],
                color=colour,
                marker=marker,
                s=26,
                label=label,
                zorder=2,
            )
    _draw_threshold(axes, threshold)
    first = first_over(measured, threshold)
    if first is not None:
        place = list(measured).index(first)
        text = (
            first.point.name
            if math.isfinite(first.difference.relative_l2)
            else (f"{first.point.name}: not finite")
        )
        axes.scatter([place], [heights[place]], s=150, facecolors="none", edgecolors="red")
        axes.annotate(
            text,
            (place, heights[place]),
            xytext=(0, 11),
            textcoords="offset points",
            ha="right" if 2 * place > len(measured) else "left",
            color="red",
            fontsize=9,
        )
        axes.margins(y=0.15)
    if len(measured) <= _LABELS:
        names = [item.point.name for item in measured]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    else:
        axes.set_xlabel("depth")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="best")


def _draw_threshold(axes: Any, threshold: float) -> None:
    axes.axhline(threshold, color="#555555", ls="--", lw=1)
    axes.text(
        0.01,
        threshold,
        f" allowed: {threshold:g}",
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
