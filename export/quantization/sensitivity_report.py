"""Tables and a picture of a sensitivity.

The picture's left half has one cell a layer (block by block, kind by kind), so that a bad block or
a bad kind shows at a glance; its right half shows the PSNR when the worst layers are kept in full
precision.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from anyflow_deploy.bundle.atomic_io import atomic_file
from anyflow_deploy.bundle.outputs import OutputFile
from anyflow_deploy.export.quantization.sensitivity import (
    QuantizationError,
    Sensitivity,
    psnr_from_error,
)
from anyflow_deploy.quantization.layers import GROUPS

KINDS = [name for group in GROUPS for name in group]
_MAX_LAYERS = 10
_FLOOR = 1e-9  # an error of zero is drawn at this value: a logarithm has no zero


def sensitivity_tables(sensitivity: Sensitivity) -> list[Table]:
    """Make the tables of the worst layers, and of the PSNR when the worst are kept."""
    worst = Table(
        "rank",
        "layer",
        "relative L2",
        "PSNR",
        title=f"quantized alone to {sensitivity.precision}, the worst first",
    )
    for rank, (name, error) in enumerate(list(sensitivity.layers.items())[:_MAX_LAYERS], 1):
        worst.add_row(str(rank), name, *_cells(error))
    keep_table = Table(
        "in full precision", "quantized", "relative L2", "PSNR", title="all others quantized"
    )
    for count, error in sensitivity.kept.items():
        keep_table.add_row(str(count), str(len(sensitivity.layers) - count), *_cells(error))
    return [worst, keep_table]


def _cells(error: QuantizationError) -> tuple[str, str]:
    if error.relative_l2 is None:
        return "[red]not finite[/]", ""
    return f"{error.relative_l2:.2e}", (
        "equal" if error.psnr_db is None else f"{error.psnr_db:.1f} dB"
    )


def draw_sensitivity(
    sensitivity: Sensitivity, path: Path | OutputFile, selected_count: int | None = None
) -> None:
    """Draw a sensitivity and write it as a PNG.

    `selected_count` marks a number of layers kept in full precision.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(12, 4.6), layout="constrained", width_ratios=(3, 2)
    )
    _draw_layers(figure, left, sensitivity)
    _draw_keep_curve(right, sensitivity, selected_count)
    frames, _, height, width = sensitivity.shape[1:]
    steps = ", ".join(map(str, sensitivity.steps))
    figure.suptitle(
        f"What {sensitivity.precision} does to a video of {frames} x {height} x {width} latents,"
        f" worst of {steps} steps",
        fontsize=11,
    )
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
    pyplot.close(figure)


def sensitivity_grid(sensitivity: Sensitivity) -> NDArray[np.float64]:
    """Return relative L2 by kind (rows) and block (columns), float64.

    It is NaN where a layer is not quantized, and infinite where the video was not finite.
    """
    names = [*sensitivity.layers, *sensitivity.excluded]
    blocks = 1 + max(int(name.split(".")[1]) for name in names)
    cells = np.full((len(KINDS), blocks), np.nan)
    for name, error in sensitivity.layers.items():
        _, block, kind = name.split(".", 2)
        cells[KINDS.index(kind), int(block)] = (
            math.inf if error.relative_l2 is None else max(error.relative_l2, _FLOOR)
        )
    return cells


def _draw_layers(figure: Any, axes: Any, sensitivity: Sensitivity) -> None:
    from matplotlib import colors

    cells = sensitivity_grid(sensitivity)
    finite = cells[np.isfinite(cells)]
    norm = (
        colors.LogNorm(finite.min(initial=1.0), finite.max(initial=_FLOOR)) if finite.size else None
    )
    axes.set_facecolor("#dddddd")
    image = axes.imshow(
        np.where(np.isposinf(cells), finite.max(initial=1.0), cells),
        cmap="magma_r",
        norm=norm,
        aspect="auto",
    )
    axes.set_yticks(range(len(KINDS)), KINDS, fontsize=8, family="monospace")
    axes.set(xlabel="block", title="One layer alone")
    axes.xaxis.get_major_locator().set_params(integer=True)
    for rank, name in enumerate(list(sensitivity.layers)[:_MAX_LAYERS], 1):
        _, block, kind = name.split(".", 2)
        place = (int(block), KINDS.index(kind))
        axes.text(*place, str(rank), ha="center", va="center", fontsize=7, color="white")
    figure.colorbar(image, ax=axes, label="relative L2 of the video", pad=0.02)


def _draw_keep_curve(axes: Any, sensitivity: Sensitivity, selected_count: int | None) -> None:
    points = [
        (count, psnr_from_error(error))
        for count, error in sensitivity.kept.items()
        if math.isfinite(psnr_from_error(error))
    ]
    axes.plot(
        [p[0] for p in points], [p[1] for p in points], color="#1b6ca8", marker="o", ms=5, lw=1.4
    )
    if selected_count is not None:
        axes.axvline(selected_count, color="#d1495b", ls="--", lw=1)
        axes.text(
            selected_count,
            0.02,
            f" {selected_count} kept",
            color="#d1495b",
            fontsize=8,
            transform=axes.get_xaxis_transform(),
        )
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks([p[0] for p in points], [str(p[0]) for p in points])
    total = len(sensitivity.layers)
    axes.set(
        xlabel=f"worst layers in full precision, of {total}",
        ylabel="PSNR of the video, dB",
        title="All others quantized",
    )
    axes.grid(alpha=0.25)
