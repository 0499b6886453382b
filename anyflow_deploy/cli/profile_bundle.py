"""`anyflow-profile`: measure a bundle's times, memory, energy and layers, and give advice.

It is three commands in one: it profiles a bundle; with --compare it compares two profiles; with
--estimate it computes a bound for hardware that is not here.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator
from rich.console import Console
from rich.markup import escape

from anyflow_deploy.bundle.atomic_io import write_text_atomically
from anyflow_deploy.bundle.bundle import load_bundle
from anyflow_deploy.bundle.json_records import load_record
from anyflow_deploy.bundle.outputs import OutputFile
from anyflow_deploy.cli.engine_flags import (
    BackendFlag,
    EngineFlag,
    KernelSpecializationFlag,
    PipelineFlag,
    ProviderFlag,
    ThreadsFlag,
)
from anyflow_deploy.cli.fit import default_shape
from anyflow_deploy.cli.json_output import format_json, print_json_text
from anyflow_deploy.cli.options import (
    DONE,
    WORK_ERROR,
    Options,
    Steps,
    Words,
    run,
)
from anyflow_deploy.engines.registry import (
    DEFAULT_BACKEND,
    EngineOptions,
    check_backend,
    check_kernel_specialization,
)
from anyflow_deploy.errors import AnyFlowError, suggestion
from anyflow_deploy.memory.estimate import shape_from_pixels
from anyflow_deploy.models import get_model
from anyflow_deploy.precision import resolve_precision
from anyflow_deploy.profiling.compare import ENERGY, MEMORY, TIME, Thresholds, compare_profiles
from anyflow_deploy.profiling.estimate import RooflineEstimate, estimate_latency
from anyflow_deploy.profiling.html_report import html_from_profile
from anyflow_deploy.profiling.profiler import (
    SKIPPABLE,
    ProfileRequest,
    default_provider,
    run_profile,
)
from anyflow_deploy.profiling.record import SCHEMA, Profile
from anyflow_deploy.profiling.terminal import print_comparison, print_estimate, print_profile
from anyflow_deploy.profiling.timing import TimingRules
from anyflow_deploy.progress import RichProgress, console
from anyflow_deploy.targets import get_target

WIDTH = 120
"""Columns of a report that goes into a file or a pipe."""

MAKE = "anyflow-profile BUNDLE --json FILE"

_ONLY_ESTIMATE = ("model", "precision")
_ONLY_COMPARE = ("time_threshold", "memory_threshold", "energy_threshold")


class ProfileOptions(Options):
    """Measure a bundle on this machine, then say what to do about its speed and size.

    It measures transitions and clips in each number of steps, first frame and chunks, text encoder
    and VAE where they are available, memory, energy, layers, and the hardware's ceilings.

    --compare OLD NEW reads two profiles and prints what changed. --estimate --target orin computes
    a bound from a data sheet: nothing is run. The report goes to standard output; with --json alone
    the JSON does, and the report to standard error.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("bundle",)
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "anyflow-profile bundle --steps 1,2,4,8 --json profile.json --html profile.html",
        "anyflow-profile bundle --backend tensorrt --shapes 480x832x81,480x832x17 --seconds 60",
        "anyflow-profile --compare old.json new.json",
        "anyflow-profile bundle --estimate --target orin",
        "anyflow-profile --estimate --model 14b --precision int8 --target thor --shapes 480x832x81",
    )

    VERDICT: ClassVar[str] = (
        "with --compare, something became worse by more than its threshold and by more than chance"
    )
    BARE: ClassVar[dict[str, str]] = {"json": "-"}

    bundle: Path | None = Field(
        None, description="the bundle's folder; with --compare the newer profile"
    )
    backend: BackendFlag = DEFAULT_BACKEND
    provider: ProviderFlag = None
    device: int = Field(0, ge=0, description="which GPU, counted from 0")
    threads: ThreadsFlag = None
    engine: EngineFlag = None
    kernel_specialization: KernelSpecializationFlag = None
    steps: Steps = Field((1, 2, 4, 8), description="numbers of steps, in turn")
    shapes: Words = Field(
        (),
        description=(
            "video sizes, 480x832x81, several with commas between (default: the bundle's own)"
        ),
    )
    window: int | None = Field(
        None,
        ge=1,
        description="causal: keep the first and this many of the newest compressed chunks",
    )
    seconds: float = Field(
        20.0, gt=0, le=3600, description="budget of the measured rounds of each shape"
    )
    rounds: int | None = Field(
        None, ge=1, le=100_000, description="number of measured rounds, in place of --seconds"
    )
    prompt: str = Field(
        "a red fox in the snow", description="prompt that the text encoder is timed with"
    )
    pipeline: PipelineFlag = None
    skip: Words = Field((), description=f"leave out: {', '.join(SKIPPABLE)}")
    target: str | None = Field(
        None,
        description="hardware to compare with (default: this machine's), or to estimate for",
    )
    estimate: bool = Field(
        False, description="a bound for --target, from its data sheet; nothing is run"
    )
    model: str | None = Field(
        None, description="--estimate: a model of the table, in place of a bundle"
    )
    precision: str | None = Field(None, description="--estimate: of --model (default fp16)")
    compare: Path | None = Field(None, description="the older profile; the newer one follows")
    time_threshold: float = Field(
        100 * TIME, ge=0, description="--compare: per cent by which a time may grow"
    )
    memory_threshold: float = Field(
        100 * MEMORY, ge=0, description="--compare: the same for memory"
    )
    energy_threshold: float = Field(
        100 * ENERGY, ge=0, description="--compare: the same for energy"
    )
    json_file: str | None = Field(
        None,
        alias="json",
        description="write the result to this file as JSON; without a file, to standard output",
    )
    html: Path | None = Field(None, description="write a self-contained page with plots here")
    overwrite: bool = Field(False, description="replace --json and --html")

    @property
    def prints_json(self) -> bool:
        """Whether standard output is for a JSON document alone."""
        return self.json_file == "-"

    @model_validator(mode="after")
    def _check_consistency(self) -> ProfileOptions:
        try:
            _check_options(self)
        except AnyFlowError as error:
            raise ValueError(str(error)) from None
        return self


def _check_options(options: ProfileOptions) -> None:
    """Refuse wrong flags without opening anything."""
    if options.estimate and options.compare is not None:
        raise AnyFlowError("give one of --estimate and --compare.")
    flags = options.model_fields_set
    for names, selected, flag in (
        (_ONLY_ESTIMATE, options.estimate, "estimate"),
        (_ONLY_COMPARE, options.compare, "compare"),
    ):
        extra = [name for name in names if name in flags]
        if extra and not selected:
            raise AnyFlowError(
                f"--{extra[0].replace('_', '-')} belongs to --{flag}; give both or neither."
            )
    if options.compare is not None:
        surplus = flags - {"compare", "bundle", "json_file", "overwrite", *_ONLY_COMPARE}
        if surplus:
            raise AnyFlowError(
                f"--{sorted(surplus)[0].replace('_', '-')} means nothing to --compare OLD NEW;"
                " leave it out."
            )
        if options.bundle is None:
            raise AnyFlowError(
                "--compare takes two profiles: anyflow-profile --compare OLD.json NEW.json."
            )
        return
    if options.target is not None:
        get_target(options.target)
    if options.estimate:
        _check_estimate(options)
        return
    if options.bundle is None:
        raise AnyFlowError(
            "bundle is missing: the bundle's folder. (--compare and --estimate --model need none.)"
        )
    check_backend(options.backend)
    check_kernel_specialization(options.backend, options.kernel_specialization)
    for name in options.skip:
        if name not in SKIPPABLE:
            raise AnyFlowError(
                f"--skip is {name!r}; allowed are"
                f" {', '.join(SKIPPABLE)}.{suggestion(name, SKIPPABLE)}"
            )


def _check_estimate(options: ProfileOptions) -> None:
    if options.target is None:
        raise AnyFlowError("--estimate needs --target NAME, the hardware to estimate for.")
    if (options.model is None) == (options.bundle is None):
        raise AnyFlowError("--estimate takes one of a bundle and --model NAME.")
    if options.precision is not None and options.model is None:
        raise AnyFlowError("--precision belongs to --model; a bundle has its own.")
    if options.html is not None:
        raise AnyFlowError("--html shows measurements; an estimate has none. Use --json.")
    if options.model is not None:
        get_model(options.model)


def profile(options: ProfileOptions) -> int:
    """Profile, compare or estimate, as the flags say; return the exit status."""
    is_file = options.json_file is not None and not options.prints_json
    json_path = Path(str(options.json_file)) if is_file else None
    with ExitStack() as stack:
        html, json_file = (
            None if path is None else stack.enter_context(OutputFile(path, options.overwrite))
            for path in (options.html, json_path)
        )
        if options.compare is not None:
            return _run_compare(options, json_file)
        if options.estimate:
            return _run_estimate(options, json_file)
        return _run_profile(options, html, json_file)


def _run_profile(
    options: ProfileOptions, html: OutputFile | None, json_file: OutputFile | None
) -> int:
    bundle = load_bundle(Path(str(options.bundle)))
    request = ProfileRequest(
        bundle=bundle,
        backend=options.backend,
        engine=EngineOptions(
            default_provider(options.backend, options.provider),
            options.device,
            options.threads,
            options.engine,
            kernel_specialization=options.kernel_specialization,
        ),
        shapes=options.shapes,
        steps=options.steps,
        window=options.window,
        rules=TimingRules(options.seconds, options.rounds),
        target=get_target(options.target) if options.target else None,
        prompt=options.prompt,
        pipeline=options.pipeline,
        skip=options.skip,
    )
    with RichProgress(console) as bars:
        result = run_profile(request, bars)
    print_profile(result, _report_console(options))
    _write_json(options, json_file, result.model_dump_json(by_alias=True, indent=1))
    if html is not None:
        write_text_atomically(html, html_from_profile(result))
        console.print(f"[green]wrote[/] [bold]{escape(str(options.html))}[/]")
    return 0


def _run_compare(options: ProfileOptions, json_file: OutputFile | None) -> int:
    assert options.compare is not None and options.bundle is not None
    old, new = (
        load_record(path, Profile, SCHEMA, MAKE) for path in (options.compare, options.bundle)
    )
    thresholds = Thresholds(
        options.time_threshold / 100, options.memory_threshold / 100, options.energy_threshold / 100
    )
    comparison = compare_profiles(old, new, thresholds)
    print_comparison(comparison, _report_console(options))
    rows = {row.name: {"change": row.change, "verdict": row.verdict} for row in comparison.rows}
    _write_json(
        options,
        json_file,
        format_json(
            {
                "regressed": comparison.has_regression,
                "rows": rows,
                "differences": comparison.differences,
            }
        ),
    )
    return WORK_ERROR if comparison.has_regression else DONE


def _run_estimate(options: ProfileOptions, json_file: OutputFile | None) -> int:
    target = get_target(str(options.target))
    estimates: list[RooflineEstimate] = []
    if options.model is not None:
        model = get_model(options.model)
        precision = options.precision or "fp16"
        name = model.name
        a = model.architecture
        base = resolve_precision(precision, None, target.name).base
        attention = "high"
        shapes = options.shapes or (str(default_shape(model.name)),)
    else:
        manifest = load_bundle(Path(str(options.bundle)), verify=False).manifest
        video, quantization = manifest.video, manifest.quantization
        name = manifest.model
        a = manifest.architecture
        precision = manifest.precision
        base = manifest.base
        attention = quantization.attention if quantization else "high"
        shapes = options.shapes or (f"{video.height}x{video.width}x{video.frames}",)
    for text in shapes:
        shape = shape_from_pixels(text, a)
        estimates.append(
            estimate_latency(
                name, a, precision, base, target, shape, options.steps, options.window, attention
            )
        )
    for estimate in estimates:
        print_estimate(estimate, _report_console(options))
    content = [estimate.model_dump() for estimate in estimates]
    _write_json(options, json_file, format_json(content))
    return 0


def _report_console(options: ProfileOptions) -> Console:
    """Return the console for the report."""
    if options.prints_json:
        return console
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=WIDTH)


def _write_json(options: ProfileOptions, json_file: OutputFile | None, text: str) -> None:
    if options.prints_json:
        print_json_text(text)
    elif json_file is not None:
        write_text_atomically(json_file, text)
        console.print(f"[green]wrote[/] [bold]{escape(str(options.json_file))}[/]")


def main() -> None:
    """Run `anyflow-profile` with the flags of the command line."""
    run("anyflow-profile", ProfileOptions, profile)
