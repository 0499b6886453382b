"""Bundle -> TensorRT plans, with the builder's own API.

Each graph is parsed from its ONNX file (the weights lie beside it and are read by the parser),
built as a strongly typed network, so that the graph's own types and Q/DQ nodes decide and nothing
else, and inspected afterwards. TF32 is switched off: float32 means float32 here.

Polygraphy's loaders are not used: they keep the timing cache only of builds that succeed, log in a
way of their own where an error of ours has to say why, and have no types, so the stubs of
TensorRT's releases could not check the calls behind them. What they save is the hundred lines
below.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from anyflow_deploy.bundle.atomic_io import HashingFile
from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.build import BuildResult
from anyflow_deploy.engines.engine_folder import EngineWriter, narrow_ranges
from anyflow_deploy.engines.tensorrt.api import LIBRARY, LOGGER, TITLE, VERSION, MessageLog, trt
from anyflow_deploy.engines.tensorrt.build.achieved import (
    add_graph,
    check_shortfall,
    inspect_layers,
)
from anyflow_deploy.engines.tensorrt.build.build_device import BuildDevice
from anyflow_deploy.engines.tensorrt.build.inspector import PrecisionReport
from anyflow_deploy.engines.tensorrt.build.optimization_profiles import Profile
from anyflow_deploy.engines.tensorrt.build.plan_writer import build_into
from anyflow_deploy.engines.tensorrt.build.progress_monitor import (
    BuildProgressMonitor,
    run_interruptibly,
)
from anyflow_deploy.engines.tensorrt.build.refit_check import check_biases
from anyflow_deploy.engines.tensorrt.build.settings import PlanSettings, TensorRTSettings
from anyflow_deploy.engines.tensorrt.build.timing_cache import TimingCache, open_timing_cache
from anyflow_deploy.errors import BackendError
from anyflow_deploy.progress import Progress

T = TypeVar("T")

_NEEDS = {"bf16": (8, 0), "int8": (7, 5), "fp8": (8, 9)}
"""Compute capability from which tensor cores have a type; NVIDIA's support matrix."""

_NO_MEMORY = (
    "out of memory",
    "outofmemory",
    "could not be allocated",
    "insufficient memory",
    "cudaerrormemoryallocation",
)
_NO_KERNEL = ("could not find any implementation", "insufficient workspace", "no implementation")


def build_plans(
    settings: PlanSettings, bundle: Bundle, writer: EngineWriter, progress: Progress
) -> BuildResult:
    """Build every graph of a bundle for one GPU.

    Raises:
        BackendError: the GPU lacks the precision, the parser or the builder refuses, or a precision
            was not achieved.
    """
    device = settings.choose_device()
    _check_precision(bundle, device)
    if settings.weight_streaming and device.gpu is not None and device.gpu.integrated:
        raise BackendError(
            f"--weight-streaming keeps weights in the processor's memory, and {device.name} has no"
            " other. Leave it out; for a smaller model in memory, export with --precision int8."
        )
    _check_graphs(bundle)
    cache = open_timing_cache(settings, device)
    profiles = settings.profiles(bundle)
    precision_report = PrecisionReport()
    for graph in (name for name in bundle.manifest.graphs if profiles[name]):
        build = _GraphBuild(settings, bundle, graph, device, progress)
        name = f"{graph}.plan"
        file = writer.create(name)
        build.write_plan(profiles[graph], cache, file)
        writer.add(name, file.close())
        if device.gpu is None:
            continue  # a plan cannot be opened without a GPU: the engine looks when it is
        with progress.stage(f"{graph}: inspecting"):
            layers = build.layers(writer.folder / name)
            writer.write(f"{graph}.layers.json", layers.encode())
            add_graph(precision_report, bundle, graph, layers)
    check_shortfall(precision_report.shortfall, device.name, settings.allow_fallback)
    return BuildResult(
        device=device.record,
        versions={LIBRARY.version_key: VERSION},
        ranges=narrow_ranges(bundle),
        profiles={
            graph: {p.name: _profile_record(p) for p in made}
            for graph, made in profiles.items()
            if made
        },
        achieved=precision_report.record(),
    )


def _check_precision(bundle: Bundle, device: BuildDevice) -> None:
    minimum = device.minimum_capability
    for precision in {bundle.manifest.precision, bundle.manifest.base}:
        needed = _NEEDS.get(precision, (0, 0))
        if minimum >= needed:
            continue
        has, required = (".".join(map(str, pair)) for pair in (minimum, needed))
        able = ["fp32", "fp16", *(name for name, least in _NEEDS.items() if minimum >= least)]
        remedy = f"Export with --precision one of {', '.join(able)}."
        if device.compute_capability is None:
            raise BackendError(
                f"{bundle.path} is {precision}, which needs compute capability {required}, and an"
                f" engine for {device.name!r} has to run from {has} on. Build it for one GPU with"
                f" --target, as in --target rtx4090. Or: {remedy}"
            )
        raise BackendError(
            f"{bundle.path} is {precision}, which needs compute capability {required};"
            f" {device.name} has {has}. {remedy}"
        )


def _check_graphs(bundle: Bundle) -> None:
    """Ask the lint first: the parser's own errors name a node and a source line of its C++."""
    if LIBRARY.backend != "tensorrt":
        return  # the lint's table is of TensorRT's releases
    from anyflow_deploy.engines.tensorrt.lint.lint import lint_bundle

    findings = lint_bundle(bundle, [".".join(VERSION.split(".")[:2])])
    if findings:
        more = (
            f" And {len(findings) - 1} more: anyflow-inspect {bundle.path} --lint"
            if len(findings) > 1
            else ""
        )
        raise BackendError(f"{TITLE} does not take this bundle: {findings[0]}{more}")


def _profile_record(profile: Profile) -> dict[str, list[list[int]]]:
    return {name: [list(shape) for shape in shapes] for name, shapes in profile.shapes.items()}


class _GraphBuild:
    """The build of one graph."""

    def __init__(
        self,
        settings: PlanSettings,
        bundle: Bundle,
        graph: str,
        device: BuildDevice,
        progress: Progress,
    ) -> None:
        self._settings = settings
        self._bundle = bundle
        self._graph = graph
        self._device, self._progress = device, progress
        self._messages = MessageLog()

    def write_plan(
        self, profiles: Sequence[Profile], cache: TimingCache | None, file: HashingFile
    ) -> None:
        """Build, and write the serialized engine.

        Raises:
            BackendError: the parser or the builder refuses.
            OSError: the file cannot be written.
            KeyboardInterrupt: after Ctrl-C, once TensorRT has stopped; the timing cache is kept.
        """
        monitor = BuildProgressMonitor(self._progress, self._graph)
        try:
            built = run_interruptibly(
                lambda: self._run(profiles, cache, monitor, file), monitor.cancelled
            )
        finally:
            monitor.close()
        if monitor.error is not None:
            raise monitor.error
        if not built:
            raise self._build_error()

    def _run(
        self,
        profiles: Sequence[Profile],
        cache: TimingCache | None,
        monitor: BuildProgressMonitor,
        file: HashingFile,
    ) -> bool:
        """Parse, configure, build; on the build's thread, which chooses the device for itself."""
        self._device.use()
        builder = self._create(lambda: trt.Builder(LOGGER), "start its builder")
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, LOGGER)  # its weights have to outlive the build
        self._parse(parser)
        config = builder.create_builder_config()
        self._configure(config)
        for profile in profiles:
            self._add_profile(builder, config, profile)
        config.progress_monitor = monitor
        if cache is not None:
            cache.attach(config)
        try:
            return build_into(builder, network, config, file)
        finally:
            if cache is not None:
                cache.save(config)
            del parser

    def _parse(self, parser: trt.OnnxParser) -> None:
        path = self._model_path()
        if not parser.parse_from_file(str(path)):
            errors = [parser.get_error(number) for number in range(parser.num_errors)]
            reason = "; ".join(
                f"{e.node_name() or 'graph'} ({e.node_operator()}): {e.desc()}" for e in errors[:3]
            )
            raise BackendError(
                f"{TITLE} cannot parse {path}: {reason or self._messages.summary()}."
            )

    def _configure(self, config: trt.IBuilderConfig) -> None:
        settings = self._settings
        # TF32 is on by default: float32 products would silently keep 11 bits.
        config.clear_flag(trt.BuilderFlag.TF32)
        # The inspector needs this detail afterwards.
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        for enabled, flag in (
            (settings.refit, trt.BuilderFlag.REFIT),
            (settings.strip, trt.BuilderFlag.STRIP_PLAN),
            (settings.strip and not settings.refit, trt.BuilderFlag.REFIT_IDENTICAL),
            (settings.weight_streaming, trt.BuilderFlag.WEIGHT_STREAMING),
        ):
            if enabled:
                config.set_flag(flag)
        settings.configure(config, self._device)

    def _add_profile(
        self, builder: trt.Builder, config: trt.IBuilderConfig, profile: Profile
    ) -> None:
        made = builder.create_optimization_profile()
        for name, (minimum, optimum, maximum) in profile.shapes.items():
            made.set_shape(
                name, trt.Dims(list(minimum)), trt.Dims(list(optimum)), trt.Dims(list(maximum))
            )
        if config.add_optimization_profile(made) < 0:
            raise BackendError(f"{TITLE} refuses profile {profile}: {self._messages.summary()}.")

    def layers(self, path: Path) -> str:
        """Open the plan that was built; returns what the inspector says of it, as JSON.

        Raises:
            BackendError: TensorRT cannot open it, or it has lost a bias.
        """
        self._device.use()
        runtime = self._create(lambda: trt.Runtime(LOGGER), "start its runtime")
        settings = self._settings
        runtime.engine_host_code_allowed = (
            isinstance(settings, TensorRTSettings) and settings.version_compatible
        )
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan,
        ):
            engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(
                f"{TITLE} cannot open the plan that it has just built: {self._messages.summary()}."
            )
        if settings.refit:
            import onnx

            model = onnx.load(str(self._model_path()), load_external_data=False)
            check_biases(engine, model, self._graph)
        return inspect_layers(engine)

    def _model_path(self) -> Path:
        return self._bundle.file(self._bundle.manifest.graphs[self._graph].file).resolve()

    def _create(self, make: Callable[[], T], action: str) -> T:
        with suppress(TypeError):  # pybind11's word for a factory that returned nothing
            return make()
        raise BackendError(
            f"{TITLE} could not {action} on {self._device.name}: {self._messages.summary()}."
        )

    def _build_error(self) -> BackendError:
        reason = self._messages.summary()
        lowercase = reason.lower()
        advice = "The log of anyflow_deploy.tensorrt has the rest."
        gpu = self._device.gpu
        if gpu is not None and any(sign in lowercase for sign in _NO_MEMORY):
            free, total = gpu.memory()
            advice = (
                f"The GPU ran out of memory ({free / 1e9:.1f} of {total / 1e9:.1f} GB are free"
                f" now). Close what else uses {gpu.memory_name}; then, in this order:"
                " lower --workspace, name fewer or smaller --shapes, lower"
                f" --optimization-level{gpu.streaming_advice}."
            )
        elif any(sign in lowercase for sign in _NO_KERNEL):
            advice = (
                "No kernel fits the scratch memory it may use: raise --workspace, or leave it out."
            )
        return BackendError(
            f"{TITLE} could not build {self._graph!r} on {self._device.name}: {reason}. {advice}"
        )
