"""The plots of a profile's page, each a function from a profile to SVG, or to nothing where it has no data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from anyflow_deploy.profiling.formatting import steps_text, time_text
from anyflow_deploy.profiling.record import Profile
from anyflow_deploy.profiling.svg import Axis, Bar, Mark, bars, plot

LAYERS = 14
"""Rows of the bar chart of parts."""

_MARKS = 400
"""Most samples that are drawn; of more, every n-th."""


def all_plots(profile: Profile) -> list[str]:
    """What there is to draw, in the order of the page."""
    return [figure for maker in PLOTS for figure in maker(profile)]


def _clips(profile: Profile) -> Iterator[str]:
    marks = []
    for index, point in enumerate(profile.points):
        rows = [
            (clip.steps, clip.latency.median, f"{clip.steps} steps: median {time_text(clip.latency.median)}, p99 "
             f"{time_text(clip.latency.p99)}") for clip in point.clips
        ]  # fmt: skip
        marks.append(Mark(f"{point.shape}, median", rows, "line", _color(index)))
        marks.append(Mark("", [(clip.steps, clip.latency.p99) for clip in point.clips], "dash", _color(index)))
    steps = tuple(float(clip.steps) for clip in profile.points[0].clips)
    yield plot("Time of a clip by steps (dashed: p99)", Axis("steps", ticks=steps, least=0), Axis("time", time_text), marks)
    marks = [
        Mark(
            point.shape,
            [
                (clip.steps, clip.frames_per_second, f"{clip.steps} steps: {clip.frames_per_second:.4g} frames/s")
                for clip in point.clips
            ],
            "line",
            _color(index),
        )
        for index, point in enumerate(profile.points)
    ]
    clip = profile.points[0].clips[0]
    real = clip.frames_per_second / clip.real_time_factor
    marks.append(Mark(f"playback, {real:g} frames/s", [(steps[0], real), (steps[-1], real)], "dash", "s3"))
    logarithmic = Axis("frames per second", lambda value: f"{value:,.4g}", log=True)
    yield plot("Throughput by steps, against playback", Axis("steps", ticks=steps, least=0), logarithmic, marks)


def _transitions(profile: Profile) -> Iterator[str]:
    for index, point in enumerate(profile.points):
        samples = point.transition.samples
        every = max(1, math.ceil(len(samples) / _MARKS))
        rows = [(n, value, f"number {n}: {time_text(value)}") for n, value in list(enumerate(samples))[::every]]
        median = point.transition.median
        marks = [
            Mark("transitions", rows, "dots", _color(index)),
            Mark(f"median {time_text(median)}", [(0, median), (max(len(samples) - 1, 1), median)], "dash", "s3"),
        ]
        yield plot(f"Every transition in order, {point.shape}", Axis("transition"), Axis("time", time_text), marks)
        ordered = sorted(samples)
        shares = [(value, 100 * (n + 1) / len(ordered)) for n, value in enumerate(ordered)]
        lines = [
            Mark("", shares, "plain", _color(index)),
            *(Mark(name, [(value, 0), (value, 100)], "dash", color) for name, value, color in (
                (f"p90 {time_text(point.transition.p90)}", point.transition.p90, "s1"),
                (f"p99 {time_text(point.transition.p99)}", point.transition.p99, "s3"),
            )),
        ]  # fmt: skip
        least = Axis("time of a transition", time_text, least=0.98 * ordered[0])
        yield plot(f"Share of transitions that were faster, {point.shape}", least, Axis("%", most=100), lines)


def _chunks(profile: Profile) -> Iterator[str]:
    for point in profile.points:
        if not point.chunks:
            continue
        marks = [
            Mark(
                steps_text(chunks.steps),
                [(n, seconds, f"chunk {n}: {time_text(seconds)}") for n, seconds in enumerate(chunks.by_index)],
                "line",
                _color(index),
            )
            for index, chunks in enumerate(point.chunks)
        ]
        fps = point.clips[0].frames_per_second / point.clips[0].real_time_factor
        frames = point.chunks[0].frames
        marks.append(Mark("plays for", [(n, count / fps) for n, count in enumerate(frames)], "dash", "s3"))
        ticks = tuple(float(n) for n in range(len(frames)))
        yield plot(f"Time of each chunk, {point.shape}", Axis("chunk", ticks=ticks), Axis("time", time_text, log=True), marks)


def _end_to_end(profile: Profile) -> Iterator[str]:
    if profile.end_to_end:
        colors = {"text encoder": "s2", "transformer": "s0", "VAE": "s1"}
        rows = [
            Bar(steps_text(row.steps), [(name, seconds, colors.get(name, "s4")) for name, seconds in row.seconds.items()])
            for row in profile.end_to_end
        ]
        yield bars("From prompt to frames", rows, time_text)


def _roofline(profile: Profile) -> Iterator[str]:
    ceilings = profile.ceilings
    roofs = [(point, point.roofline) for point in profile.points if point.roofline is not None]
    if ceilings is None or not roofs:
        return
    roof = roofs[0][1]
    total = sum(roof.operations.values())
    peak, bandwidth = total / roof.compute_seconds, ceilings.bandwidth
    dots = [
        (row.operations / row.bytes, row.operations / row.seconds, f"{row.name} ({row.operator}): {time_text(row.seconds)}")
        for layers in profile.layers
        for row in layers.by_part
        if row.operations and row.bytes and row.seconds
    ]
    whole = [
        (rows.intensity, sum(rows.operations.values()) / median, f"{point.shape}: whole transition, {time_text(median)}")
        for point, rows in roofs
        for median in [point.largest_transition]
    ]
    ridge = peak / bandwidth
    ends = [value[0] for value in (*dots, *whole)]
    low, high = min(*ends, ridge) / 3, max(*ends, ridge) * 3
    marks = [
        Mark(f"ceiling, {ceilings.name}", [(low, low * bandwidth), (ridge, peak), (high, peak)], "plain", "s3"),
        Mark("layers", dots, "dots", "s0"),
        Mark("a whole transition (bytes: the least possible)", whole, "dots", "s1"),
    ]
    rate = Axis("operations per second", lambda value: f"{_si(value)}", log=True)
    yield plot("Roofline", Axis("operations per byte", lambda value: f"{value:g}", log=True), rate, marks)


def _layers(profile: Profile) -> Iterator[str]:
    for layers in profile.layers:
        for title, rows, color in (("part", layers.by_part, "s0"), ("operator", layers.by_operator, "s2")):
            shown = [Bar(row.name, [("", row.seconds, color)]) for row in rows[:LAYERS]]
            rest = sum(row.seconds for row in rows[LAYERS:])
            if rest:
                shown.append(Bar(f"{len(rows) - LAYERS} more", [("", rest, "s4")]))
            yield bars(f"One transition by {title}, {layers.shape}", shown, time_text)


def _power(profile: Profile) -> Iterator[str]:
    marks = [
        Mark(power.name, _thinned(power.samples), "plain", _color(index))
        for index, power in enumerate(profile.power)
        if len(power.samples) > 1
    ]
    if marks:
        yield plot("Power", Axis("seconds"), Axis("watts"), marks)
    for unit in dict.fromkeys(series.unit for series in profile.conditions.series):
        found = [series for series in profile.conditions.series if series.unit == unit and len(series.samples) > 1]
        if found:
            marks = [Mark(series.name, _thinned(series.samples), "plain", _color(index)) for index, series in enumerate(found)]
            name = {"MHz": "Clocks", "°C": "Temperatures", "B": "Memory of the GPU"}.get(unit, unit)
            yield plot(name, Axis("seconds"), Axis(unit, _si if unit == "B" else lambda value: f"{value:g}"), marks)


PLOTS: tuple[Callable[[Profile], Iterator[str]], ...] = (
    _clips, _end_to_end, _chunks, _transitions, _roofline, _layers, _power,
)  # fmt: skip


def _thinned(rows: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return rows[:: max(1, math.ceil(len(rows) / _MARKS))]


def _color(index: int) -> str:
    return f"s{(0, 1, 2, 5, 4)[index % 5]}"


def _si(value: float) -> str:
    """With a prefix, as 2.5T."""
    for prefix, power in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= power:
            return f"{value / power:g} {prefix}"
    return f"{value:g}"
