"""Write a profile as one self-contained HTML page: no network, no script, light and dark.

The page can be printed. It shows what the JSON holds, and carries the JSON as its last element, so
that each can be made from the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from anyflow_deploy.profiling.formatting import format_bytes, format_seconds
from anyflow_deploy.profiling.plots import draw_plots
from anyflow_deploy.profiling.record import Profile
from anyflow_deploy.profiling.terminal import (
    describe,
    describe_machine,
    format_latency,
    latency_rows,
)

ROWS = 40
"""Layers in the page's table; the JSON has them all."""

_STYLE = """
:root { color-scheme: light dark; --back: #fbfbfa; --card: #fff; --text: #1d1f22; --dim: #62676e;
  --line: #e2e4e7;
  --c0: #2563c9; --c1: #d4731a; --c2: #17836c; --c3: #c0392b; --c4: #7a8088; --c5: #8446b5; }
@media (prefers-color-scheme: dark) { :root { --back: #15171a; --card: #1d2024; --text: #e8eaed;
  --dim: #9aa1aa; --line: #32363c;
  --c0: #6ea1f5; --c1: #f0a054; --c2: #4fc3a7; --c3: #ef7b6e; --c4: #8f969f; --c5: #c08cf0; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1240px; padding: 28px 20px 60px; background: var(--back);
  color: var(--text);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { font-size: 24px; margin: 0 0 4px } h2 { font-size: 18px; margin: 36px 0 12px }
p { margin: 0 0 6px } .dim { color: var(--dim) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 20px 0 }
.tile, figure, .advice > div, .wide { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px }
.tile { padding: 12px 14px }
.tile b { display: block; font-size: 22px; font-variant-numeric: tabular-nums }
.tile span { color: var(--dim); font-size: 13px }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr));
  gap: 14px }
figure { margin: 0; padding: 12px 14px } figcaption { font-weight: 600; margin-bottom: 6px }
svg { width: 100%; height: auto; display: block; font-size: 11.5px }
svg text { fill: var(--dim) } svg .label { fill: var(--text) }
.grid { stroke: var(--line); stroke-width: 1 }
.stroke, .dashed { fill: none; stroke-width: 2; stroke-linejoin: round }
.dashed { stroke-dasharray: 5 4; stroke-width: 1.5 }
.fill.s0 { fill: var(--c0) } .fill.s1 { fill: var(--c1) } .fill.s2 { fill: var(--c2) }
.fill.s3 { fill: var(--c3) }
.fill.s4 { fill: var(--c4) } .fill.s5 { fill: var(--c5) }
path.s0 { stroke: var(--c0) } path.s1 { stroke: var(--c1) } path.s2 { stroke: var(--c2) }
path.s3 { stroke: var(--c3) }
path.s4 { stroke: var(--c4) } path.s5 { stroke: var(--c5) }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; color: var(--dim); font-size: 13px;
  margin-top: 6px }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px;
  margin-right: 6px }
i.s0 { background: var(--c0) } i.s1 { background: var(--c1) } i.s2 { background: var(--c2) }
i.s3 { background: var(--c3) }
i.s4 { background: var(--c4) } i.s5 { background: var(--c5) }
.advice { display: grid; gap: 8px }
.advice > div { padding: 10px 14px; border-left: 5px solid var(--c0) }
.advice .problem { border-left-color: var(--c3) } .advice .hint { border-left-color: var(--c1) }
.wide { overflow-x: auto; padding: 4px 8px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: 5px 9px; border-bottom: 1px solid var(--line);
  white-space: nowrap }
th { color: var(--dim); font-weight: 600; font-size: 13px } .l { text-align: left }
tr:last-child td { border-bottom: 0 }
td.wrap { white-space: normal; text-align: left; overflow-wrap: anywhere }
@media print { body { max-width: none } figure, .tile { break-inside: avoid } }
"""


def html_from_profile(profile: Profile) -> str:
    """Build the page's text."""
    title = f"{profile.subject.bundle}: profile"
    sections = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(describe(profile))}</p>",
        (
            f'<p class="dim">{escape(describe_machine(profile))} · {escape(profile.created)} ·'
            f" {escape(profile.tool)}</p>"
        ),
        _tiles(profile),
        "<h2>What to do</h2>",
        _advice(profile),
        "<h2>Plots</h2>",
        f'<div class="plots">{"".join(draw_plots(profile))}</div>',
        "<h2>All times</h2>",
        _latencies(profile),
        _layers(profile),
        "<h2>How it was measured</h2>",
        _facts(profile),
    ]
    json = profile.model_dump_json(by_alias=True).replace("</", "<\\/")
    head = (
        '<meta charset="utf-8"><meta name="viewport"'
        f' content="width=device-width"><title>{escape(title)}</title>'
    )
    body = "\n".join(sections)
    data = f'<script type="application/json" id="profile">{json}</script>'
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n'
        f"<body>{body}\n{data}</body></html>\n"
    )


def _tiles(profile: Profile) -> str:
    point = profile.points[0]
    last = point.clips[-1]
    tiles = [
        (
            format_seconds(point.transition.median),
            f"a transition at {point.shape} (median of {point.transition.count})",
        ),
        (format_seconds(last.latency.median), f"a clip in {last.steps} steps"),
        (f"{last.real_time_factor:.3g} ×", f"real time in {last.steps} steps"),
    ]
    if point.chunks:
        tiles.append(
            (
                format_seconds(point.chunks[-1].first.median),
                f"to the first chunk, {point.chunks[-1].steps} steps",
            )
        )
    if profile.end_to_end:
        row = profile.end_to_end[-1]
        tiles.append(
            (format_seconds(row.first_frame), f"from prompt to first frame, {row.steps} steps")
        )
    memory = profile.memory
    tiles.append((format_bytes(memory.cpu_peak), "peak memory, CPU"))
    if memory.gpu_peak is not None:
        tiles.append(
            (
                format_bytes(memory.gpu_peak),
                "peak memory, GPU" + (" (of the CPU's)" if memory.unified else ""),
            )
        )
    if memory.shared_peak is not None and memory.shared_before is not None:
        tiles.append(
            (
                format_bytes(memory.shared_peak - memory.shared_before),
                "of the memory they share, counted once",
            )
        )
    for name, joules in last.joules.items():
        tiles.append((f"{joules / point.frames:.3g} J", f"a frame, {name}, {last.steps} steps"))
    roof = point.roofline
    if roof is not None and roof.efficiency is not None:
        tiles.append((f"{100 * roof.efficiency:.0f} %", "of the ceiling reached"))
    cards = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for value, label in tiles
    )
    return f'<div class="tiles">{cards}</div>'


def _advice(profile: Profile) -> str:
    rows = [
        f'<div class="{advice.weight}"><b>{escape(advice.kind)}</b>: {escape(advice.text)} '
        f'<span class="dim">({escape(advice.measurement)})</span></div>'
        for advice in profile.advice
    ]
    return f'<div class="advice">{"".join(rows)}</div>'


def _latencies(profile: Profile) -> str:
    rows = []
    for shape, name, latency in latency_rows(profile):
        interval = f"{format_seconds(latency.interval[0])} to {format_seconds(latency.interval[1])}"
        maximum = format_seconds(latency.maximum)
        rows.append(
            [
                shape,
                name,
                *format_latency(latency),
                maximum,
                interval,
                str(latency.count),
                str(latency.outliers),
            ]
        )
    head = (
        "shape", "what", "min", "mean", "median", "p90", "p95", "p99", "max",
        "95 % interval of the median", "n", "outliers",
    )  # fmt: skip
    return _table(head, rows, 2)


def _layers(profile: Profile) -> str:
    parts = []
    for layers in profile.layers:
        rows = [
            [
                row.name,
                row.operator,
                format_seconds(row.seconds),
                f"{100 * row.share:.1f} %",
                str(row.calls),
                (
                    f"{row.operations / row.seconds / 1e9:,.1f}"
                    if row.operations and row.seconds
                    else ""
                ),
                f"{row.bytes / row.seconds / 1e9:,.1f}" if row.bytes and row.seconds else "",
            ]
            for row in layers.rows[:ROWS]
        ]
        source = (
            f"{layers.source}; {layers.transitions} transitions, {100 * layers.overhead:+.1f} %"
            " time under it"
        )
        parts.append(f"<h2>Layers of {escape(layers.graph)}, {escape(layers.shape)}</h2>")
        parts.append(
            f'<p class="dim">{escape(source)}. The {len(rows)} slowest of {len(layers.rows)}.</p>'
        )
        parts.append(
            _table(("layer", "operator", "time", "share", "calls", "GFLOP/s", "GB/s"), rows, 2)
        )
    return "".join(parts)


def _facts(profile: Profile) -> str:
    method = profile.method
    rows = [
        [name, getattr(method, name)]
        for name in ("warm_up", "rounds", "outliers", "percentiles", "synchronization")
    ]
    clock = ", ".join(f"{name} {value}" for name, value in method.clock.items())
    rows = [["clock", clock], *([name.replace("_", " "), text] for name, text in rows)]
    subject = profile.subject.model_dump(exclude_none=True)
    rows += [[f"bundle: {name.replace('_', ' ')}", str(value)] for name, value in subject.items()]
    rows += [
        [f"machine: {name.replace('_', ' ')}", str(value)]
        for name, value in profile.machine.items()
    ]
    if profile.ceilings is not None:
        rates = ", ".join(
            f"{kind} {rate / 1e9:,.0f} GFLOP/s"
            for kind, rate in profile.ceilings.operations.items()
        )
        source = (
            f"{rates}; memory {profile.ceilings.bandwidth / 1e9:,.1f} GB/s;"
            f" {profile.ceilings.source}"
        )
        rows.append(["ceilings", source])
    rows.append(["memory", profile.memory.method])
    rows += [
        [f"power: {power.name}", f"{power.method}; {power.joules:.4g} J in all"]
        for power in profile.power
    ]
    if profile.conditions.other_load is not None:
        rows.append(["other load", f"{profile.conditions.other_load:.2f} cores"])
    rows += [[f"not measured: {name}", reason] for name, reason in profile.absent.items()]
    cells = "".join(
        f'<tr><td class="l">{escape(a)}</td><td class="wrap">{escape(b)}</td></tr>' for a, b in rows
    )
    return f'<div class="wide"><table>{cells}</table></div>'


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], left: int) -> str:
    """Build a table whose first `left` columns hold words."""

    def cells_html(cells: Iterable[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=l' if index < left else ''}>{escape(cell)}</{tag}>"
            for index, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{cells_html(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{cells_html(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
