"""`anyflow-fit`: which device takes which model, in which precision, before anything is downloaded.

Without --precision and --target it prints a table of all of them; with both, where the memory goes,
and what to change when there is not enough. `anyflow-export` prints the same sum for what it is
about to write (`show_fit`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator
from rich.console import Console
from rich.table import Table

from anyflow_deploy.cli.json_output import print_json
from anyflow_deploy.cli.options import DONE, WORK_ERROR, JsonFlag, Options, run
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.memory.estimate import (
    FIT_PRECISIONS,
    LatentShape,
    available_memory,
    companion_weights,
    estimate_memory,
    shape_from_pixels,
)
from anyflow_deploy.models import (
    MODELS,
    SPATIAL_FACTOR,
    TEMPORAL_FACTOR,
    Architecture,
    get_model,
    model_name,
)
from anyflow_deploy.progress import console
from anyflow_deploy.shape_ranges import Range, latent_frames
from anyflow_deploy.targets import GB, TARGETS, Target, check_precision, get_target

_WINDOWS = (8, 4, 2, 1)
"""Windows of a causal cache to suggest, the largest that helps first."""


class FitOptions(Options):
    """Say what a model needs in memory, and which devices have that much."""

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "anyflow-fit --model 14b",
        "anyflow-fit --model 14b --precision int8 --target orin --shape 480x832x81",
        "anyflow-fit --model 1.3b --target orin-nx --memory 8",
        "anyflow-fit --model far-14b --precision fp8 --target thor --window 4 --json",
    )
    VERDICT: ClassVar[str] = "the model fits none of the devices and precisions that were asked for"

    model: str = Field(description=f"one of {', '.join(MODELS)}")
    precision: str | None = Field(
        None, description=f"one of {', '.join(FIT_PRECISIONS)} (default all)"
    )
    target: str | None = Field(None, description=f"one of {', '.join(TARGETS)} (default all)")
    memory: float | None = Field(
        None, gt=0, le=1000, description="GB of --target, in a variant with more or less (as sold)"
    )
    shape: str | None = Field(
        None, description="HEIGHTxWIDTHxFRAMES in pixels and frames (default the model's own)"
    )
    window: int | None = Field(
        None, ge=1, description="compressed chunks a causal model keeps (default all)"
    )
    json_output: JsonFlag = False

    @field_validator("model")
    @classmethod
    def _normalize_model(cls, name: str) -> str:
        try:
            return get_model(name).name
        except AnyFlowError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _check_consistency(self) -> FitOptions:
        try:
            target = get_target(self.target or "cpu")
            if self.memory is not None and target.memory is None:
                raise AnyFlowError(
                    "--memory changes the memory of a target; give --target NAME with it (not cpu)."
                )
            estimate_memory(
                self.architecture, self.precision or "fp16", target, self.video, self.window
            )
            if self.target and self.precision:
                check_precision(target, self.precision)
        except AnyFlowError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def architecture(self) -> Architecture:
        """Architecture of the model."""
        return get_model(self.model).architecture

    @property
    def device(self) -> Target | None:
        """Row of --target, with --memory in the place of its own memory.

        The system of a small variant is counted as no more than a third of its memory.
        """
        row = get_target(self.target) if self.target else None
        if row is None or self.memory is None:
            return row
        memory = int(self.memory * GB)
        return dataclasses.replace(
            row,
            memory=memory,
            system_memory=min(row.system_memory, memory // 3),
            device=f"{row.device}, with {self.memory:g} GB",
        )

    @property
    def video(self) -> LatentShape:
        """Shape of --shape, or the model's own."""
        return (
            default_shape(self.model)
            if self.shape is None
            else shape_from_pixels(self.shape, self.architecture)
        )


def default_shape(model: str) -> LatentShape:
    """Return the latent shape of the video that a model makes by default.

    A model outside the table gets Wan's 81 frames at 480x832.
    """
    frames, height, width = MODELS[model].video if model in MODELS else MODELS["1.3b"].video
    return LatentShape(
        latent_frames(frames, TEMPORAL_FACTOR), height // SPATIAL_FACTOR, width // SPATIAL_FACTOR
    )


def fit(options: FitOptions) -> int:
    """Print what the model needs and where it fits; return the exit status."""
    targets = [options.device] if options.device else list(TARGETS.values())
    precisions = (options.precision,) if options.precision else FIT_PRECISIONS
    cells = {
        t.name: {
            p: _cell(options.architecture, p, t, options.video, options.window) for p in precisions
        }
        for t in targets
    }
    if options.json_output:
        report = {
            "model": options.model,
            "shape": str(options.video),
            "window": options.window,
            "targets": cells,
        }
        print_json(report)
    elif options.precision and options.target:
        _print_details(options, targets[0], options.precision)
    else:
        _print_overview(options, targets, cells)
    fits = any(cell["fits"] for row in cells.values() for cell in row.values())
    return DONE if fits else WORK_ERROR


def show_fit(a: Architecture, precision: str, target: str, ranges: Mapping[str, Range]) -> None:
    """Print what a bundle will need on its target, and warn where the target has less.

    A warning, not an error: a bundle also runs on a larger device of the family, and in smaller
    shapes.

    Args:
        a: architecture of the exported model.
        precision, target: as named in the tables.
        ranges: the declared ranges, in latent units; their largest shape is used.
    """
    usual = default_shape(model_name(a))
    largest = {
        axis: ranges[axis].maximum or getattr(usual, axis)
        for axis in ("frames", "height", "width")
        if axis in ranges
    }
    if a.causal:
        largest.pop("frames", None)  # its declared frames are those of one chunk
    shape = dataclasses.replace(usual, **largest)
    row = get_target(target)
    need = estimate_memory(a, precision, row, shape)
    available = available_memory(row)
    parts = f"weights {_gb(need.weights)}, activations {_gb(need.activations + need.workspace)}"
    cache = f", cache {_gb(need.cache)}" if need.cache else ""
    console.print(
        f"needs about {_gb(need.total)} on {target} at {shape} ({parts}{cache}; it has"
        f" {_gb(available)})."
    )
    if need.total > available:
        console.print(
            f"[yellow]warning:[/] that does not fit {row.device}."
            f" {_advice(a, precision, row, shape)}"
        )


def _cell(
    a: Architecture, precision: str, target: Target, shape: LatentShape, window: int | None
) -> dict[str, Any]:
    """Estimate one combination: bytes and a verdict, or why it is refused."""
    if precision not in target.precisions:
        return {"fits": False, "refused": f"{target.name} does not run {precision}"}
    need = estimate_memory(a, precision, target, shape, window)
    available = available_memory(target)
    return {
        "fits": need.total <= available,
        "total": need.total,
        "available": available,
        **dataclasses.asdict(need),
    }


def _print_overview(
    options: FitOptions, targets: list[Target], cells: dict[str, dict[str, dict[str, Any]]]
) -> None:
    precisions = list(next(iter(cells.values())))
    table = Table(
        "target",
        "memory",
        *precisions,
        title=f"{options.model} at {options.video}: GB needed, and whether it fits",
    )
    for target in targets:
        table.add_row(
            target.name,
            _gb(available_memory(target)),
            *(_format_cell(cells[target.name][p]) for p in precisions),
        )
    Console(highlight=False).print(table)
    console.print(
        "Memory is what the system leaves free. The text encoder and the VAE run separately."
        " --target and --precision together print the parts of one sum."
    )


def _format_cell(cell: dict[str, Any]) -> str:
    if "refused" in cell:
        return "[dim]refused[/]"
    return f"{cell['total'] / GB:.1f} {'[green]yes[/]' if cell['fits'] else '[red]no[/]'}"


def _print_details(options: FitOptions, target: Target, precision: str) -> None:
    need = estimate_memory(options.architecture, precision, target, options.video, options.window)
    available = available_memory(target)
    table = Table(
        "what", "GB", title=f"{options.model} in {precision} on {target.device} at {options.video}"
    )
    parts = ("weights", "activations", "cache", "workspace")
    for name, size in [
        *((part, getattr(need, part)) for part in parts),
        ("needed", need.total),
        ("available", available),
    ]:
        table.add_row(
            name, f"{size / GB:.2f}", style="bold" if name in ("needed", "available") else ""
        )
    table.add_section()
    for name, size in companion_weights(target).items():
        table.add_row(f"[dim]separately: {name}[/]", f"[dim]{size / GB:.2f}[/]")
    table.add_row(
        "[dim]scores, if attention is not fused[/]", f"[dim]{need.score_table / GB:.2f}[/]"
    )
    Console(highlight=False).print(table)
    if need.total <= available:
        console.print(f"[green]fits[/]: {_gb(available - need.total)} left.")
    else:
        advice = _advice(options.architecture, precision, target, options.video, options.window)
        console.print(f"[red]does not fit[/]: {_gb(need.total - available)} too much. {advice}")


def _advice(
    a: Architecture, precision: str, target: Target, shape: LatentShape, window: int | None = None
) -> str:
    """Say what would fit instead, each with its size."""
    alternatives = list(_alternatives(a, precision, target, shape, window))
    return (
        f"These would: {'; '.join(alternatives)}."
        if alternatives
        else "No target here has enough memory for this model in any precision."
    )


def _alternatives(
    a: Architecture, precision: str, target: Target, shape: LatentShape, window: int | None
) -> Iterator[str]:
    """Yield what would fit: another precision, half the frames, a window, another target."""
    half = dataclasses.replace(shape, frames=(shape.frames + 1) // 2)
    for other in target.precisions:
        for video in (shape, half):
            size = estimate_memory(a, other, target, video, window).total
            if size <= available_memory(target):
                yield f"--precision {other} at {video} ({_gb(size)})"
                break
    for keep in _WINDOWS if a.causal and window is None else ():
        size = estimate_memory(a, precision, target, shape, keep).total
        if size <= available_memory(target):
            yield f"a window of {keep} chunks ({_gb(size)})"
            break
    capable = [t.name for t in TARGETS.values() if t.memory and precision in t.precisions]
    large = [
        name
        for name in capable
        if estimate_memory(a, precision, TARGETS[name], shape, window).total
        <= available_memory(TARGETS[name])
    ]
    if large:
        yield f"--target {' or '.join(large)}"


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB"


def main() -> None:
    """Run `anyflow-fit` with the flags of the command line."""
    run("anyflow-fit", FitOptions, fit)
