"""The plots of a profile's page: functions from a profile to SVG, or to nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from anyflow_deploy.profiling.formatting import format_seconds, format_steps
from anyflow_deploy.profiling.record import Profile
from anyflow_deploy.profiling.svg import Bar, PlotAxis, PlotSeries, bars_svg, plot_svg

LAYERS = 14
"""Rows of the bar chart of parts."""

_MARKS = 400
"""Largest number of samples that are drawn; of more, every n-th is."""


def draw_plots(profile: Profile) -> list[str]:
    """Draw every plot that has data, in the order of the page."""
    return [figure for draw in PLOTS for figure in draw(profile)]


def _clips(profile: Profile) -> Iterator[str]:
    marks = []
    for index, point in enumerate(profile.points):
        rows = [
            (
                clip.steps,
                clip.latency.median,
                f"{clip.steps} steps: median {format_seconds(clip.latency.median)}, p99 "
                f"{format_seconds(clip.latency.p99)}",
            )
            for clip in point.clips
        ]
        marks.append(PlotSeries(f"{point.shape}, median", rows, "line", _color(index)))
        marks.append(
            PlotSeries(
                "", [(clip.steps, clip.latency.p99) for clip in point.clips], "dash", _color(index)
            )
        )
    steps = tuple(float(clip.steps) for clip in profile.points[0].clips)
    yield plot_svg(
        "Time of a clip by steps (dashed: p99)",
        PlotAxis("steps", ticks=steps, minimum=0),
        PlotAxis("time", format_seconds),
        marks,
    )
    marks = [
        PlotSeries(
            point.shape,
            [
                (
                    clip.steps,
                    clip.frames_per_second,
                    f"{clip.steps} steps: {clip.frames_per_second:.4g} frames/s",
                )
                for clip in point.clips
            ],
            "line",
            _color(index),
        )
        for index, point in enumerate(profile.points)
    ]
    clip = profile.points[0].clips[0]
    real = clip.frames_per_second / clip.real_time_factor
    marks.append(
        PlotSeries(
            f"playback, {real:g} frames/s", [(steps[0], real), (steps[-1], real)], "dash", "s3"
        )
    )
    logarithmic = PlotAxis("frames per second", lambda value: f"{value:,.4g}", log=True)
    yield plot_svg(
        "Throughput by steps, against playback",
        PlotAxis("steps", ticks=steps, minimum=0),
        logarithmic,
        marks,
    )


def _transitions(profile: Profile) -> Iterator[str]:
    for index, point in enumerate(profile.points):
        samples = point.transition.samples
        stride = max(1, math.ceil(len(samples) / _MARKS))
        rows = [
            (n, value, f"number {n}: {format_seconds(value)}")
            for n, value in list(enumerate(samples))[::stride]
        ]
        median = point.transition.median
        marks = [
            PlotSeries("transitions", rows, "dots", _color(index)),
            PlotSeries(
                f"median {format_seconds(median)}",
                [(0, median), (max(len(samples) - 1, 1), median)],
                "dash",
                "s3",
            ),
        ]
        yield plot_svg(
            f"Every transition in order, {point.shape}",
            PlotAxis("transition"),
            PlotAxis("time", format_seconds),
            marks,
        )
        sorted_samples = sorted(samples)
        shares = [
            (value, 100 * (n + 1) / len(sorted_samples)) for n, value in enumerate(sorted_samples)
        ]
        lines = [
            PlotSeries("", shares, "plain", _color(index)),
            *(
                PlotSeries(name, [(value, 0), (value, 100)], "dash", color)
                for name, value, color in (
                    (f"p90 {format_seconds(point.transition.p90)}", point.transition.p90, "s1"),
                    (f"p99 {format_seconds(point.transition.p99)}", point.transition.p99, "s3"),
                )
            ),
        ]
        minimum = PlotAxis("time of a transition", format_seconds, minimum=0.98 * sorted_samples[0])
        yield plot_svg(
            f"Share of transitions that were faster, {point.shape}",
            minimum,
            PlotAxis("%", maximum=100),
            lines,
        )


def _chunks(profile: Profile) -> Iterator[str]:
    for point in profile.points:
        if not point.chunks:
            continue
        marks = [
            PlotSeries(
                format_steps(chunks.steps),
                [
                    (n, seconds, f"chunk {n}: {format_seconds(seconds)}")
                    for n, seconds in enumerate(chunks.by_index)
                ],
                "line",
                _color(index),
            )
            for index, chunks in enumerate(point.chunks)
        ]
        fps = point.clips[0].frames_per_second / point.clips[0].real_time_factor
        frames = point.chunks[0].frames
        marks.append(
            PlotSeries(
                "plays for", [(n, count / fps) for n, count in enumerate(frames)], "dash", "s3"
            )
        )
        ticks = tuple(float(n) for n in range(len(frames)))
        yield plot_svg(
            f"Time of each chunk, {point.shape}",
            PlotAxis("chunk", ticks=ticks),
            PlotAxis("time", format_seconds, log=True),
            marks,
        )


def _end_to_end(profile: Profile) -> Iterator[str]:
    if profile.end_to_end:
        colors = {"text encoder": "s2", "transformer": "s0", "VAE": "s1"}
        rows = [
            Bar(
                format_steps(row.steps),
                [(name, seconds, colors.get(name, "s4")) for name, seconds in row.seconds.items()],
            )
            for row in profile.end_to_end
        ]
        yield bars_svg("From prompt to frames", rows, format_seconds)


def _roofline(profile: Profile) -> Iterator[str]:
    ceilings = profile.ceilings
    roofs = [(point, point.roofline) for point in profile.points if point.roofline is not None]
    if ceilings is None or not roofs:
        return
    roof = roofs[0][1]
    total = sum(roof.operations.values())
    peak = total / roof.compute_seconds
    bandwidth = ceilings.bandwidth
    dots = [
        (
            row.operations / row.bytes,
            row.operations / row.seconds,
            f"{row.name} ({row.operator}): {format_seconds(row.seconds)}",
        )
        for layers in profile.layers
        for row in layers.by_part
        if row.operations and row.bytes and row.seconds
    ]
    whole = [
        (
            rows.intensity,
            sum(rows.operations.values()) / median,
            f"{point.shape}: whole transition, {format_seconds(median)}",
        )
        for point, rows in roofs
        for median in [point.largest_transition]
    ]
    ridge = peak / bandwidth
    ends = [value[0] for value in (*dots, *whole)]
    low, high = min(*ends, ridge) / 3, max(*ends, ridge) * 3
    marks = [
        PlotSeries(
            f"ceiling, {ceilings.name}",
            [(low, low * bandwidth), (ridge, peak), (high, peak)],
            "plain",
            "s3",
        ),
        PlotSeries("layers", dots, "dots", "s0"),
        PlotSeries("a whole transition (bytes: the least possible)", whole, "dots", "s1"),
    ]
    rate = PlotAxis("operations per second", lambda value: f"{_format_si(value)}", log=True)
    yield plot_svg(
        "Roofline",
        PlotAxis("operations per byte", lambda value: f"{value:g}", log=True),
        rate,
        marks,
    )


def _layers(profile: Profile) -> Iterator[str]:
    for layers in profile.layers:
        for title, rows, color in (
            ("part", layers.by_part, "s0"),
            ("operator", layers.by_operator, "s2"),
        ):
            bars = [Bar(row.name, [("", row.seconds, color)]) for row in rows[:LAYERS]]
            rest = sum(row.seconds for row in rows[LAYERS:])
            if rest:
                bars.append(Bar(f"{len(rows) - LAYERS} more", [("", rest, "s4")]))
            yield bars_svg(f"One transition by {title}, {layers.shape}", bars, format_seconds)


def _power(profile: Profile) -> Iterator[str]:
    marks = [
        PlotSeries(power.name, _thin_out(power.samples), "plain", _color(index))
        for index, power in enumerate(profile.power)
        if len(power.samples) > 1
    ]
    if marks:
        yield plot_svg("Power", PlotAxis("seconds"), PlotAxis("watts"), marks)
    for unit in dict.fromkeys(series.unit for series in profile.conditions.series):
        series_list = [
            series
            for series in profile.conditions.series
            if series.unit == unit and len(series.samples) > 1
        ]
        if series_list:
            marks = [
                PlotSeries(series.name, _thin_out(series.samples), "plain", _color(index))
                for index, series in enumerate(series_list)
            ]
            name = {"MHz": "Clocks", "°C": "Temperatures", "B": "Memory of the GPU"}.get(unit, unit)
            yield plot_svg(
                name,
                PlotAxis("seconds"),
                PlotAxis(unit, _format_si if unit == "B" else lambda value: f"{value:g}"),
                marks,
            )


PLOTS: tuple[Callable[[Profile], Iterator[str]], ...] = (
    _clips,
    _end_to_end,
    _chunks,
    _transitions,
    _roofline,
    _layers,
    _power,
)


def _thin_out(rows: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return rows[:: max(1, math.ceil(len(rows) / _MARKS))]


def _color(index: int) -> str:
    return f"s{(0, 1, 2, 5, 4)[index % 5]}"


def _format_si(value: float) -> str:
    """Format a number with an SI prefix, as 2.5 T."""
    for prefix, power in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= power:
            return f"{value / power:g} {prefix}"
    return f"{value:g}"
