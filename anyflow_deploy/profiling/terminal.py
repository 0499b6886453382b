"""Print a profile, a comparison or an estimate as tables."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anyflow_deploy.profiling.compare import ComparedValue, Comparison
from anyflow_deploy.profiling.estimate import RooflineEstimate
from anyflow_deploy.profiling.formatting import (
    format_bytes,
    format_percentile,
    format_seconds,
    format_steps,
)
from anyflow_deploy.profiling.record import Latency, Layers, Point, Profile

MAX_LAYERS = 12

_COLORS = {"problem": "bold red", "hint": "yellow", "note": "cyan"}
_VERDICTS = {
    "regression": "bold red",
    "missing": "bold red",
    "improvement": "green",
    "within noise": "dim",
    "unchanged": "dim",
}


def print_profile(profile: Profile, console: Console) -> None:
    """Print the part of a profile that fits a screen or two.

    The JSON and the page have the rest.
    """
    console.print(f"[bold]{escape(profile.subject.bundle)}[/]: {escape(describe(profile))}")
    console.print(f"[dim]{escape(describe_machine(profile))}[/]")
    for point in profile.points:
        console.print(_latencies(point))
        for clip in point.clips:
            if clip.joules:
                energy = ", ".join(f"{name} {joules:.3g} J" for name, joules in clip.joules.items())
                console.print(
                    f"{clip.steps} steps take {escape(energy)}; per frame a {point.frames}th of it."
                )
    console.print(_other_rows(profile))
    for layers in profile.layers:
        console.print(_layers(layers))
    console.print(*_advice(profile), sep="\n")
    for name, reason in profile.absent.items():
        console.print(f"[dim]not measured: {escape(name)}: {escape(reason)}[/]")


def describe(profile: Profile) -> str:
    """Describe model and engine in one line."""
    s = profile.subject
    threads = f", {s.threads} threads" if s.threads else ""
    return f"{s.model} ({s.kind}, {_format_count(s.parameters)} parameters), {s.engine}{threads}"


def _format_count(number: int) -> str:
    """Format a number in thousands, millions or billions."""
    return (
        f"{number / 1e9:.1f} B"
        if number >= 1e9
        else f"{number / 1e6:.0f} M"
        if number >= 1e7
        else f"{number / 1e3:.0f} k"
    )


def describe_machine(profile: Profile) -> str:
    """Describe the machine in one line."""
    m = profile.machine
    gpu = f", {m['gpu']['name']}" if m.get("gpu") else ""
    return (
        f"{m.get('cpu', '?')}, {m.get('cores', '?')}"
        f" cores{' (virtual)' if m.get('virtual') else ''}{gpu}, {m.get('system', '')}"
    )


def latency_rows(profile: Profile) -> Iterator[tuple[str, str, Latency]]:
    """Yield shape, name and latency of everything that was timed."""
    for point in profile.points:
        yield point.shape, "transition", point.transition
        if point.enqueue is not None:
            yield point.shape, "of that, launching", point.enqueue
        for clip in point.clips:
            yield point.shape, f"clip, {format_steps(clip.steps)}", clip.latency
        for chunks in point.chunks:
            yield point.shape, f"first chunk, {format_steps(chunks.steps)}", chunks.first
            if chunks.later is not None:
                yield point.shape, f"later chunks, {format_steps(chunks.steps)}", chunks.later
            if chunks.remember is not None:
                yield (
                    point.shape,
                    f"caching a chunk, {format_steps(chunks.steps)}",
                    chunks.remember,
                )
    for stage in profile.stages:
        yield "", stage.name, stage.latency
        for name, latency in stage.parts.items():
            yield "", f"{stage.name}, {name}", latency


def format_latency(latency: Latency) -> list[str]:
    """Format minimum, mean, median, and the percentiles that have enough samples."""
    tail = ((latency.p90, 0.9), (latency.p95, 0.95), (latency.p99, 0.99))
    percentiles = [format_percentile(value, share, latency.count) for value, share in tail]
    return [*map(format_seconds, (latency.minimum, latency.mean, latency.median)), *percentiles]


def _latencies(point: Point) -> Table:
    names = ("min", "mean", "median", "p90", "p95", "p99", "n")
    table = Table(
        title=f"{point.shape}, {point.tokens:,} tokens a transition",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for name in (*names, "frames/s", "× real time"):
        table.add_column(name, justify="right", no_wrap=True)

    def add(name: str, latency: Latency, *rest: str) -> None:
        table.add_row(name, *format_latency(latency), str(latency.count), *rest)

    add("transition", point.transition)
    if point.enqueue is not None:
        add("launching one", point.enqueue)
    for clip in point.clips:
        add(
            f"clip, {format_steps(clip.steps)}",
            clip.latency,
            f"{clip.frames_per_second:.3g}",
            f"{clip.real_time_factor:.3g}",
        )
    for chunks in point.chunks:
        add(f"first chunk, {format_steps(chunks.steps)}", chunks.first)
        if chunks.later is not None:
            add(
                f"later chunks, {format_steps(chunks.steps)}",
                chunks.later,
                "",
                f"{chunks.worst_real_time_factor:.3g}",
            )
    return table


def _other_rows(profile: Profile) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    for stage in profile.stages:
        rest = (
            f"peak {format_bytes(stage.memory.cpu_peak)}, loaded in"
            f" {format_seconds(stage.load_seconds)}"
        )
        table.add_row(
            stage.name,
            f"{format_seconds(stage.latency.median)} (at most"
            f" {format_seconds(stage.latency.maximum)}); {rest}",
        )
    for row in profile.end_to_end:
        parts = ", ".join(
            f"{name} {format_seconds(seconds)}" for name, seconds in row.seconds.items()
        )
        table.add_row(
            f"prompt to video, {format_steps(row.steps)}",
            f"{format_seconds(row.total)} ({parts}); first frame after"
            f" {format_seconds(row.first_frame)}",
        )
    memory = profile.memory
    loading_peak = (
        f" ({format_bytes(memory.cpu_loading_peak)} while loading)"
        if memory.cpu_loading_peak
        else ""
    )
    table.add_row(
        "memory, CPU",
        f"loaded {format_bytes(memory.cpu_loaded)}{loading_peak}, peak"
        f" {format_bytes(memory.cpu_peak)}",
    )
    if memory.gpu_peak is not None:
        table.add_row(
            "memory, GPU",
            f"peak {format_bytes(memory.gpu_peak)}"
            + (" (of the CPU's memory)" if memory.unified else ""),
        )
    if memory.shared_peak is not None and memory.shared_before is not None:
        growth = format_bytes(memory.shared_peak - memory.shared_before)
        table.add_row(
            "memory, both",
            f"{growth} more than before, counted once; {format_bytes(memory.shared_peak)} with all"
            " else",
        )
    for power in profile.power:
        idle = f", idle {power.idle_watts:.1f} W" if power.idle_watts is not None else ""
        table.add_row(
            escape(power.name),
            f"{power.mean_watts:.1f} W on average, {power.peak_watts:.1f} W at most{idle}",
        )
    for point in profile.points:
        roof = point.roofline
        if roof is not None and profile.ceilings is not None:
            table.add_row(
                f"ceiling, {point.shape}",
                f"{format_seconds(roof.bound)} a transition on {profile.ceilings.name} (products "
                f"{format_seconds(roof.compute_seconds)}, "
                f"memory {format_seconds(roof.memory_seconds)})"
                + (
                    f": {100 * roof.efficiency:.0f} % reached"
                    if roof.efficiency is not None
                    else ""
                ),
            )
    return table


def _layers(layers: Layers) -> Table:
    title = (
        f"graph {layers.graph}, one run by part ({layers.source}; {100 * layers.overhead:+.0f} % on"
        " the times above)"
    )
    table = Table("part", "operator", "time", "share", "calls", "GFLOP/s", title=title)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in layers.by_part[:MAX_LAYERS]:
        rate = (
            f"{row.operations / row.seconds / 1e9:,.0f}" if row.operations and row.seconds else ""
        )
        table.add_row(
            escape(row.name),
            row.operator,
            format_seconds(row.seconds),
            f"{100 * row.share:.1f} %",
            str(row.calls),
            rate,
        )
    return table


def _advice(profile: Profile) -> Iterator[str]:
    for advice in profile.advice:
        color = _COLORS[advice.weight]
        yield (
            f"[{color}]{advice.kind}[/]: {escape(advice.text)}"
            f" [dim]({escape(advice.measurement)})[/]"
        )


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print every number of both profiles, and the other differences."""
    for name, (old, new) in comparison.differences.items():
        console.print(f"[yellow]different:[/] {escape(name)}: {escape(old)}, now {escape(new)}")
    table = Table("", "before", "now", "change", "")
    for row in comparison.rows:
        style = _VERDICTS.get(row.verdict, "")
        change = "" if row.change is None else f"{100 * row.change:+.1f} %"
        verdict = f"[{style}]{row.verdict}[/]" if style else row.verdict
        table.add_row(escape(row.name), _value(row.old), _value(row.new), change, verdict)
    console.print(table)


def _value(value: ComparedValue | None) -> str:
    if value is None:
        return ""
    if value.unit == "J":
        return f"{value.value:.3g} J"
    return format_seconds(value.value) if value.unit == "s" else format_bytes(value.value)


def print_estimate(estimate: RooflineEstimate, console: Console) -> None:
    """Print the bound, with its label first."""
    console.print(f"[bold yellow]estimate:[/] {estimate.label}.")
    roof = estimate.transition
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    table.add_row(
        "what",
        f"{estimate.model} in {estimate.precision} at {estimate.shape}, {estimate.tokens:,} tokens"
        " a transition",
    )
    table.add_row("where", f"{estimate.device}; {estimate.source}")
    detail = (
        f"products {format_seconds(roof.compute_seconds)}, memory"
        f" {format_seconds(roof.memory_seconds)}"
    )
    table.add_row(
        "a transition",
        f"at least {format_seconds(roof.bound)}, limited by {estimate.bound_by} ({detail})",
    )
    for clip in estimate.clips:
        chunk = (
            ""
            if clip.first_chunk is None
            else f"; first chunk at least {format_seconds(clip.first_chunk)}"
        )
        text = (
            f"at least {format_seconds(clip.seconds)}, at most {clip.real_time_factor:.3g} × real"
            f" time{chunk}"
        )
        table.add_row(f"a clip, {format_steps(clip.steps)}", text)
    memory = estimate.memory
    fits = "fits" if memory["fits"] else "does not fit"
    table.add_row(
        "memory",
        f"about {format_bytes(memory['needed'])} of {format_bytes(memory['available'])}: {fits}",
    )
    console.print(table)
    console.print(
        "[dim]For the transformer alone, without text encoder and VAE. Real engines are slower than"
        " such bounds.[/]"
    )
