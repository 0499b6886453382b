"""Format numbers for people."""

from __future__ import annotations


def format_seconds(seconds: float) -> str:
    """Format seconds with three digits, in s, ms or µs."""
    if not seconds:
        return "0"
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    return (
        f"{seconds:.3g} s"
        if seconds >= 1
        else f"{1e3 * seconds:.3g} ms"
        if seconds >= 1e-3
        else f"{1e6 * seconds:.3g} µs"
    )


def format_bytes(size: float) -> str:
    """Format bytes in MB or GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def format_percentile(seconds: float, share: float, count: int) -> str:
    """Format a percentile, or a dash where there are too few samples for it.

    Of nine samples, the 90th percentile is only another name for the slowest one.
    """
    return format_seconds(seconds) if count * (1 - share) >= 1 - 1e-9 else "–"


def format_steps(count: int) -> str:
    """Format a number of steps in words."""
    return "1 step" if count == 1 else f"{count} steps"
