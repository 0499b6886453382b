"""`anyflow-build`: compile a bundle for the device this runs on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from rich.markup import escape
from rich.table import Table

from anyflow_deploy.bundle.bundle import Bundle, load_bundle
from anyflow_deploy.cli.json_output import print_json
from anyflow_deploy.cli.options import DONE, JsonFlag, Options, Words, run
from anyflow_deploy.engines.build import BuildSettings, build_engine, settings_type
from anyflow_deploy.engines.engine_folder import ENGINES, EngineFolder
from anyflow_deploy.engines.registry import BACKENDS
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.progress import RichProgress, console

_COMMON = ("bundle", "backend", "name", "output", "overwrite", "json_output")
"""Flags of the command; all others are fields of the backend's settings."""


class BuildOptions(Options):
    """Compile a bundle into an engine for this machine.

    The engine goes into the bundle's folder (engines/NAME) and is found there by anyflow-generate
    and anyflow-validate with --backend. It runs on this kind of device with these versions only;
    the bundle itself stays portable.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("bundle",)
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "anyflow-build bundle --backend aotinductor",
        "anyflow-build bundle --backend tensorrt --shapes 480x832x81,480x832x17",
        "anyflow-build bundle --backend tensorrt-rtx --target rtx4090 --shapes 480x832x81",
    )

    bundle: Path = Field(description="the bundle's folder")
    backend: str = Field(description="what to build for")
    name: str | None = Field(
        None,
        description=(
            "name of the engine in the bundle's folder (default: backend-provider, or"
            " tensorrt-rtx-target)"
        ),
    )
    output: Path | None = Field(
        None, description="folder of the engine, in place of one in the bundle"
    )
    overwrite: bool = Field(False, description="replace an engine that is there")
    provider: str | None = Field(None, description="what it will run on: cpu or cuda (default cpu)")
    device: int | None = Field(None, ge=0, description="which GPU, counted from 0 (default 0)")
    target: str | None = Field(
        None,
        description=(
            "tensorrt-rtx: GPU to build for, such as rtx4090, which need not be in this machine,"
            " or any (default: this machine's GPU, else any)"
        ),
    )
    max_autotune: bool = Field(
        False, description="aotinductor: time several kernels for each product; much slower builds"
    )
    shapes: Words = Field(
        (),
        description=(
            "tensorrt, tensorrt-rtx: video sizes to build for, 480x832x81, several with commas"
            " between"
        ),
    )
    range_profile: bool = Field(
        False,
        description="tensorrt, tensorrt-rtx: cover the bundle's declared ranges beside --shapes",
    )
    workspace: float | None = Field(
        None, description="tensorrt: gigabytes of scratch memory that a layer may use"
    )
    optimization_level: int | None = Field(
        None, description="tensorrt: 0 (fast to build) to 5 (tries most); default 3"
    )
    version_compatible: bool = Field(
        False, description="tensorrt: also runs on later releases of the same major version"
    )
    hardware_compatible: str | None = Field(
        None, description="tensorrt: also runs on ampere+ or same-capability GPUs"
    )
    refit: bool = Field(
        False, description="tensorrt, tensorrt-rtx: weights can be replaced in the built engine"
    )
    strip: bool = Field(
        False,
        description=(
            "tensorrt, tensorrt-rtx: no weights in the plan; they are read from the bundle at"
            " loading"
        ),
    )
    weight_streaming: bool = Field(
        False,
        description="tensorrt, tensorrt-rtx: weights may stay in host memory; slow, for small GPUs",
    )
    allow_fallback: bool = Field(
        False,
        description=(
            "tensorrt, tensorrt-rtx: keep an engine that runs eight-bit layers in a wider type"
        ),
    )
    timing_cache: str | None = Field(
        None, description="tensorrt: file of measured kernel times (default: user's cache)"
    )
    json_output: JsonFlag = False


def build(options: BuildOptions) -> int:
    """Build an engine and print what was built; return the exit status."""
    settings = settings_from_flags(options)
    bundle = load_bundle(options.bundle)
    with RichProgress(console) as bars:
        folder = build_engine(
            bundle,
            options.backend,
            settings,
            _destination(options, bundle),
            options.overwrite,
            bars,
        )
    console.print(describe_engine(folder))
    console.print(
        f"[green]wrote[/] [bold]{escape(str(folder.path))}[/] ({folder.record.seconds:.1f} s)"
    )
    if options.json_output:
        record = folder.record.model_dump(mode="json", by_alias=True)
        print_json({"engine": str(folder.path), **record})
    return DONE


def settings_from_flags(options: BuildOptions) -> BuildSettings:
    """Make the backend's settings from the flags that were given.

    Raises:
        AnyFlowError: an unknown backend, or a flag of another backend.
    """
    kind = settings_type(options.backend)
    fields = {field.name for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {
        name: getattr(options, name) for name in options.model_fields_set if name not in _COMMON
    }
    for name in values:
        if name not in fields:
            compilers = [backend for backend, row in BACKENDS.items() if row.build_settings]
            owners = [
                b
                for b in compilers
                if name in {field.name for field in dataclasses.fields(settings_type(b))}
            ]
            raise AnyFlowError(
                f"--{name.replace('_', '-')} means nothing to backend {options.backend}; it is a"
                f" flag of {', '.join(owners)}."
            )
    return kind(**values)


def _destination(options: BuildOptions, bundle: Bundle) -> Path | None:
    if options.name is not None and options.output is not None:
        raise AnyFlowError("give one of --name NAME (inside the bundle) and --output FOLDER.")
    if options.name is not None:
        if Path(options.name).name != options.name or options.name.startswith("."):
            raise AnyFlowError(
                f"--name is {options.name!r}: allowed is a plain folder name. For another place use"
                " --output."
            )
        return bundle.path / ENGINES / options.name
    return options.output


def describe_engine(folder: EngineFolder) -> Table:
    """Describe a built engine in a table."""
    record = folder.record
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("device", escape(record.device.name))
    table.add_row(
        "with", ", ".join(f"{name} {version}" for name, version in record.versions.items())
    )
    table.add_row("size", f"{sum(file.bytes for file in record.files.values()) / 1e6:.1f} MB")
    for name, value in record.achieved.items():
        text = f"{100 * value:.0f} %" if isinstance(value, float) else _list_values(value)
        table.add_row(name.replace("_", " "), escape(text))
    return table


def _list_values(value: object) -> str:
    """Format a list by its first items."""
    if not isinstance(value, list):
        return str(value)
    return (
        ", ".join(map(str, value[:4])) + (f" and {len(value) - 4} more" if len(value) > 4 else "")
        or "none"
    )


def main() -> None:
    """Run `anyflow-build` with the flags of the command line."""
    run("anyflow-build", BuildOptions, build)
