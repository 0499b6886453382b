"""Draw plots as inline SVG: lines, dots and bars on linear or logarithmic axes.

A page made on a Jetson has to work without a network, and the device has no plotting library; so
the few plots that a profile needs are drawn here. Colours are classes of the page's style sheet
(`s0` … `s5`), which knows light and dark; every mark has a `<title>`, which browsers show under the
pointer and screen readers read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

WIDTH, HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 14, 12, 44
_HALF_LETTER = 3.6
"""Half the width of a label's letter in pixels, rounded up."""

Text = Callable[[float], str]


@dataclass(frozen=True)
class PlotAxis:
    """One axis of a plot.

    Attributes:
        label: name and unit.
        text: formats a value.
        log: whether it is logarithmic; then all values have to be positive.
        minimum, maximum: ends; None to follow the data. A linear axis begins at 0 by default.
        ticks: positions of the ticks; empty for round numbers.
    """

    label: str
    text: Text = lambda value: f"{value:g}"
    log: bool = False
    minimum: float | None = None
    maximum: float | None = None
    ticks: tuple[float, ...] = ()


@dataclass(frozen=True)
class PlotSeries:
    """One series of a plot.

    Attributes:
        name: in the legend; empty for none.
        points: (x, y), or (x, y, text under the pointer).
        kind: "line" (with dots), "plain" (without), "dots" or "dash".
        color: class of the style sheet.
    """

    name: str
    points: Sequence[tuple[float, float] | tuple[float, float, str]]
    kind: Literal["line", "plain", "dots", "dash"] = "line"
    color: str = "s0"


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart: a label and its parts, as (name, value, color)."""

    label: str
    parts: Sequence[tuple[str, float, str]]


@dataclass
class _Scale:
    """Maps values to pixels."""

    axis: PlotAxis
    values: list[float]
    start: float
    end: float
    low: float = field(init=False)
    high: float = field(init=False)

    def __post_init__(self) -> None:
        values = self.values or [1.0]
        low = (
            self.axis.minimum
            if self.axis.minimum is not None
            else (min(values) if self.axis.log else min(0.0, *values, 0.0))
        )
        high = self.axis.maximum if self.axis.maximum is not None else max(values)
        if self.axis.log:
            low, high = low / 1.3, high * 1.3
        elif self.axis.maximum is None:
            high = high + 0.06 * (high - low) if high > low else low + 1
        self.low, self.high = low, max(high, low + 1e-12)

    def at(self, value: float) -> float:
        if self.axis.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.axis.ticks:
            return [tick for tick in self.axis.ticks if self.low <= tick <= self.high]
        if self.axis.log:
            return _log_ticks(self.low, self.high)
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        return [step * n for n in range(first, first + 20) if step * n <= self.high * (1 + 1e-9)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = math.log10(high / low) > 3
    ticks = [
        m * 10.0**d
        for d in decades
        for m in ((1,) if wide else (1, 2, 5))
        if low <= m * 10.0**d <= high
    ]
    return ticks[:: max(1, len(ticks) // 8)]


def _round_step(step: float) -> float:
    """Return the nearest of 1, 2, 2.5 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return min((power * m for m in (1, 2, 2.5, 5, 10)), key=lambda candidate: abs(candidate - step))


def plot_svg(title: str, x: PlotAxis, y: PlotAxis, marks: Sequence[PlotSeries]) -> str:
    """Draw a plot of lines and dots.

    Args:
        title: caption, and text for screen readers.
        x, y: axes.
        marks: series, drawn in order.
    """
    across = _Scale(x, [point[0] for mark in marks for point in mark.points], _LEFT, WIDTH - _RIGHT)
    up = _Scale(y, [point[1] for mark in marks for point in mark.points], HEIGHT - _BOTTOM, _TOP)
    body = [_frame(across, up)]
    for mark in marks:
        body.append(_draw_series(mark, across, up))
    legend = [(mark.name, mark.color) for mark in marks if mark.name]
    return _figure(title, HEIGHT, "".join(body), legend)


def _frame(across: _Scale, up: _Scale) -> str:
    """Draw grid, ticks and labels."""
    parts = []
    for tick in up.ticks():
        place = up.at(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{place:.1f}"'
            f' y2="{place:.1f}"/>'
        )
        parts.append(
            f'<text x="{_LEFT - 6}" y="{place + 4:.1f}"'
            f' text-anchor="end">{escape(up.axis.text(tick))}</text>'
        )
    for tick in across.ticks():
        place, text = across.at(tick), across.axis.text(tick)
        parts.append(
            f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}"'
            f' y2="{HEIGHT - _BOTTOM}"/>'
        )
        parts.append(
            f'<text x="{_label_position(place, text):.1f}" y="{HEIGHT - _BOTTOM + 16}"'
            f' text-anchor="middle">{escape(text)}</text>'
        )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{HEIGHT - 8}"'
        f' text-anchor="middle">{escape(across.axis.label)}</text>'
    )
    centre = (HEIGHT - _BOTTOM + _TOP) / 2
    transform = f'transform="translate(13 {centre}) rotate(-90)"'
    parts.append(
        f'<text class="label" {transform} text-anchor="middle">{escape(up.axis.label)}</text>'
    )
    return "".join(parts)


def _label_position(place: float, text: str) -> float:
    """Return the middle of a tick's label, moved so that the label stays in the picture."""
    return min(place, WIDTH - _HALF_LETTER * len(text))


def _draw_series(mark: PlotSeries, across: _Scale, up: _Scale) -> str:
    places = [
        (across.at(point[0]), up.at(point[1]), point[2] if len(point) > 2 else "")
        for point in mark.points
    ]
    parts = []
    if mark.kind != "dots" and len(places) > 1:
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b, _ in places)
        parts.append(
            f'<path class="{"dashed" if mark.kind == "dash" else "stroke"} {mark.color}"'
            f' d="{path}"/>'
        )
    if mark.kind in ("line", "dots"):
        size = 3.5 if mark.kind == "line" or len(places) < 80 else 2
        for a, b, text in places:
            title = f"<title>{escape(text)}</title>" if text else ""
            parts.append(
                f'<circle class="fill {mark.color}" cx="{a:.1f}" cy="{b:.1f}"'
                f' r="{size}">{title}</circle>'
            )
    return "".join(parts)


def bars_svg(title: str, rows: Sequence[Bar], text: Text) -> str:
    """Draw horizontal bars, each of one or more parts side by side.

    Args:
        title: caption, and text for screen readers.
        rows: from top to bottom.
        text: formats a value.
    """
    label_width, line = 190, 24
    maximum = max((sum(value for _, value, _ in row.parts) for row in rows), default=1.0) or 1.0
    room = WIDTH - label_width - 90
    body = []
    for index, row in enumerate(rows):
        top, left = 6 + index * line, float(label_width)
        label = row.label if len(row.label) <= 26 else row.label[:25] + "…"
        body.append(
            f'<text x="{label_width - 8}" y="{top + 13}" text-anchor="end">{escape(label)}'
            f"<title>{escape(row.label)}</title></text>"
        )
        for name, value, color in row.parts:
            width = room * value / maximum
            title_text = f"{name or row.label}: {text(value)}"
            body.append(
                f'<rect class="fill {color}" x="{left:.1f}" y="{top}" width="{max(width, 0.5):.1f}"'
                f' height="{line - 7}"><title>{escape(title_text)}</title></rect>'
            )
            left += width
        body.append(
            f'<text x="{left + 6:.1f}"'
            f' y="{top + 13}">{escape(text(sum(value for _, value, _ in row.parts)))}</text>'
        )
    names = dict.fromkeys((name, color) for row in rows for name, _, color in row.parts if name)
    return _figure(title, 12 + line * len(rows), "".join(body), list(names))


def _figure(title: str, height: int, body: str, legend: Sequence[tuple[str, str]]) -> str:
    keys = "".join(f'<span><i class="{color}"></i>{escape(name)}</span>' for name, color in legend)
    legend_html = f'<div class="legend">{keys}</div>' if keys else ""
    picture = (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img"'
        f' aria-label="{escape(title, quote=True)}">{body}</svg>'
    )
    return f"<figure><figcaption>{escape(title)}</figcaption>{picture}{legend_html}</figure>"
