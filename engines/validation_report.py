"""Tables and a picture of a validation: error against time, and error against steps.

The picture needs matplotlib (the `export` extra). Without it the tables are still printed, and a
line says what is missing.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rich.table import Table

from anyflow_deploy.bundle.atomic_io import atomic_file
from anyflow_deploy.bundle.outputs import OutputFile
from anyflow_deploy.engines.metrics import Difference
from anyflow_deploy.engines.validation import Validation

KINDS = {
    "next": ("next on the path", "#1b6ca8", "o"),
    "half": ("half way", "#d1495b", "s"),
    "clean": ("clean, r = 0", "#3a7d44", "^"),
    "same": ("r = t", "#8d6a9f", "D"),
    "mixed": ("first frame clean", "#e09f3e", "v"),
}
_FLOOR = 1e-9  # what a difference of exactly zero is drawn at: a logarithm has no zero


def validation_tables(validation: Validation) -> list[Table]:
    """Make the tables of the worst transition of each kind and of every rollout."""
    numbers = ("relative L2", "cosine", "PSNR", "max abs")
    worst = Table("transition", "worst at t", *numbers, title="velocity, engine against reference")
    for kind, (title, _, _) in KINDS.items():
        items = [item for item in validation.transitions if item.kind == kind]
        if items:
            item = max(items, key=lambda i: i.difference.relative_l2)
            where = f"{item.t:.0f}{f', chunk {item.chunk}' if validation.chunks else ''}"
            worst.add_row(title, where, *_cells(item.difference, validation.threshold.transition))
    whole = Table("steps", *numbers, title="samples, engine against reference")
    for rollout in validation.rollouts:
        whole.add_row(str(rollout.steps), *_cells(rollout.difference, validation.threshold.rollout))
    return [worst, whole]


def _cells(d: Difference, limit: float) -> tuple[str, ...]:
    colour = "green" if d.relative_l2 <= limit else "red"
    return (
        f"[{colour}]{d.relative_l2:.2e}[/]",
        f"{d.cosine:.8f}",
        f"{d.psnr_db:.1f} dB",
        f"{d.max_abs:.2e}",
    )


def can_plot() -> bool:
    """Tell whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_validation(validation: Validation, path: Path | OutputFile) -> None:
    """Draw a validation and write it as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for kind, (title, colour, marker) in KINDS.items():
        for chunk in sorted({item.chunk for item in validation.transitions}):
            items = [
                item for item in validation.transitions if (item.kind, item.chunk) == (kind, chunk)
            ]
            heights = [max(item.difference.relative_l2, _FLOOR) for item in items]
            look = (
                {"ls": "-", "label": f"{title}, chunk {chunk}"}
                if chunk
                else {"ls": ":" if validation.chunks else "-"}
            )
            style = {"label": title, **look} if not validation.chunks else look
            left.plot(
                [item.t for item in items],
                heights,
                color=colour,
                marker=marker,
                ms=5,
                lw=1.2,
                **style,
            )
    left.invert_xaxis()
    left.set(
        xlabel="source time t (1000 = noise)",
        title=f"One transition, by time{' (dotted: chunk 0)' if validation.chunks else ''}",
    )
    heights = [max(rollout.difference.relative_l2, _FLOOR) for rollout in validation.rollouts]
    right.plot(range(len(heights)), heights, color="#1b6ca8", marker="o", lw=1.4)
    right.set_xticks(range(len(heights)), [str(rollout.steps) for rollout in validation.rollouts])
    right.set(xlabel="steps of the schedule", title="Whole sample, by steps")
    for axes, limit in (
        (left, validation.threshold.transition),
        (right, validation.threshold.rollout),
    ):
        axes.axhline(limit, color="#555555", ls="--", lw=1)
        place = {
            "transform": axes.get_yaxis_transform(),
            "va": "bottom",
            "fontsize": 8,
            "color": "#555555",
        }
        axes.text(0.01, limit, f" allowed: {limit:g}", **place)
        axes.set(yscale="log", ylabel="relative L2 to the reference")
        axes.grid(alpha=0.25)
    left.legend(fontsize=7, loc="best")
    verdict = "passed" if not validation.failures else f"FAILED ({len(validation.failures)} over)"
    figure.suptitle(
        f"{validation.candidate}  against  {validation.reference}: {verdict}", fontsize=10
    )
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
    pyplot.close(figure)
