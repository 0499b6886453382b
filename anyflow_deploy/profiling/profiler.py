"""Profile a bundle: the order of the measurements, and the inputs of each.

First the engine, alone in the process, since its memory is measured: warm-up, then every number of
steps in turn, for each shape, while a thread reads power and clocks. Then it is closed, and the
measurements follow that disturb others or take memory of their own: the runtime's profiler, the
ceilings, text encoder and VAE.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from anyflow_deploy import __version__
from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.engine import BundleEngine
from anyflow_deploy.engines.engine_folder import find_engine
from anyflow_deploy.engines.registry import BACKENDS, EngineOptions, load_engine
from anyflow_deploy.memory.parameter_shapes import count_parameters
from anyflow_deploy.profiling import jetson, layer_profiling, machine, stages
from anyflow_deploy.profiling.advice import advise
from anyflow_deploy.profiling.end_to_end import end_to_end
from anyflow_deploy.profiling.errors import MeasurementUnavailableError
from anyflow_deploy.profiling.memory import PeakMemory, gpu_memory_reader
from anyflow_deploy.profiling.nvml import NvmlGpu
from anyflow_deploy.profiling.operations import compute_types, transition_cost
from anyflow_deploy.profiling.power import find_power_sources
from anyflow_deploy.profiling.record import (
    Ceilings,
    Conditions,
    Layers,
    MemoryUsage,
    Point,
    PowerUsage,
    Profile,
    StageTiming,
    Subject,
)
from anyflow_deploy.profiling.roofline import (
    SECONDS,
    ceilings_from_target,
    measure_ceilings,
    roofline,
    target_from_gpu_name,
)
from anyflow_deploy.profiling.sampler import INTERVAL, ResourceSampler
from anyflow_deploy.profiling.sweep import measure_point
from anyflow_deploy.profiling.timed_engine import TimedEngine
from anyflow_deploy.profiling.timing import TimingRules, clock, describe_method
from anyflow_deploy.profiling.workload import VideoWorkload, build_workloads
from anyflow_deploy.progress import Progress
from anyflow_deploy.targets import Target

IDLE = 0.5
"""Seconds of doing nothing with the engine loaded, to measure the idle power."""

SKIPPABLE = ("layers", "ceilings", "text", "vae")
"""Parts that can be left out."""


@dataclass(frozen=True)
class ProfileRequest:
    """What to profile.

    Attributes:
        bundle: an opened bundle.
        backend: a name in `registry.BACKENDS`.
        engine: how the engine runs.
        shapes: as "480x832x81"; empty for the bundle's own.
        steps: numbers of steps.
        window: window of a causal cache, in chunks.
        rules: how long to measure.
        target: row of the table to compare with; None for this machine's own hardware.
        prompt: what the text encoder is timed with.
        pipeline: folder or Hub id of text encoder and VAE; None for the bundle's own.
        skip: parts of `SKIPPABLE` to leave out.
    """

    bundle: Bundle
    backend: str
    engine: EngineOptions
    shapes: tuple[str, ...] = ()
    steps: tuple[int, ...] = (1, 2, 4, 8)
    window: int | None = None
    rules: TimingRules = field(default_factory=TimingRules)
    target: Target | None = None
    prompt: str = "a red fox in the snow"
    pipeline: str | None = None
    skip: tuple[str, ...] = ()


def default_provider(backend: str, provider: str | None) -> str:
    """Return the provider that `load_engine` uses."""
    return provider or BACKENDS[backend].default_provider


def run_profile(request: ProfileRequest, progress: Progress) -> Profile:
    """Measure a bundle and return its profile.

    Raises:
        AnyFlowError: shapes outside the ranges, or an engine that cannot run here; raised before
            anything is timed.
    """
    return _Profiler(request, progress).profile()


class _Profiler:
    """Makes one profile."""

    def __init__(self, request: ProfileRequest, progress: Progress) -> None:
        self._request, self._progress = request, progress
        self._workloads = build_workloads(request.bundle.manifest, request.shapes, request.window)
        self._absent: dict[str, str] = dict.fromkeys(request.skip, "left out by --skip")
        self._gpu, self._board = self._find_gpu(), jetson.describe()

    def profile(self) -> Profile:
        request = self._request
        device = machine.describe(self._gpu)
        subject, points, memory, power, conditions = self._measure_engine()
        ceilings = self._find_ceilings(points)
        points = [
            self._add_roofline(point, video, ceilings)
            for point, video in zip(points, self._workloads, strict=True)
        ]
        layers = self._profile_layers(points)
        stage_records = self._measure_stages()
        fps = request.bundle.manifest.video.fps
        profile = Profile(
            created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            tool=f"anyflow-profile {__version__}",
            subject=subject,
            machine=device,
            method=describe_method(request.rules, INTERVAL),
            points=points,
            stages=stage_records,
            end_to_end=end_to_end(
                points, stage_records, self._workloads, subject.load_seconds, fps
            ),
            memory=memory,
            power=power,
            conditions=conditions,
            ceilings=ceilings,
            layers=layers,
            advice=[],
            absent=self._absent,
        )
        return profile.model_copy(update={"advice": advise(profile)})

    def _find_gpu(self) -> NvmlGpu | None:
        if self._request.engine.provider != "cuda":
            self._absent["GPU"] = "the engine runs on the processor"
            return None
        try:
            return NvmlGpu(self._request.engine.device)
        except MeasurementUnavailableError as error:
            self._absent["GPU clocks and power"] = str(error)
            return None

    def _measure_engine(
        self,
    ) -> tuple[Subject, list[Point], MemoryUsage, list[PowerUsage], Conditions]:
        options = self._request.engine
        on_gpu = options.provider == "cuda"
        read_shared = jetson.used_memory if self._board else None
        read_gpu = None
        if on_gpu:
            read_gpu = gpu_memory_reader(self._gpu, options.device, read_shared is not None)
        peak = PeakMemory(read_gpu, read_shared)
        start = clock()
        engine = self._open_engine()
        load_seconds = clock() - start
        peak.mark_loaded()
        powers, absent = find_power_sources(self._gpu)
        self._absent |= {f"power: {name}": reason for name, reason in absent.items()}
        reads = _build_readers(self._gpu, self._board is not None)
        reads |= {
            name: read
            for name, read in (("GPU memory", read_gpu), ("shared memory", read_shared))
            if read is not None
        }
        throttles_before = machine.throttle_counts()
        load = machine.OtherLoad()
        with closing(engine):
            subject = self._describe_subject(engine, load_seconds)
            with ResourceSampler(
                powers, reads, self._gpu.throttle_reasons if self._gpu else list
            ) as sampler:
                idle_from = clock()
                time.sleep(IDLE if powers else 0.0)
                begin = clock()
                timed_engine = TimedEngine(engine)
                points = [
                    measure_point(
                        timed_engine,
                        video,
                        self._request.steps,
                        self._request.rules,
                        sampler,
                        powers,
                        self._progress,
                    )
                    for video in self._workloads
                ]
                end = clock()
            memory = peak.record(sampler.maximum("GPU memory"), sampler.maximum("shared memory"))
        rows = [sampler.power(source.name, (idle_from, begin), (begin, end)) for source in powers]
        throttle = sampler.flag_shares() | {
            name: 1.0
            for name, count in machine.throttle_counts().items()
            if count > throttles_before.get(name, count)
        }
        series = sampler.series({name: _UNITS[name.split()[-1]] for name in reads}, begin)
        conditions = Conditions(other_load=load.cores(), throttle=throttle, series=series)
        if not conditions.series:
            self._absent["clocks"] = (
                "neither NVML nor the kernel (cpufreq, /proc/cpuinfo) gives any here"
            )
        return subject, points, memory, [row for row in rows if row is not None], conditions

    def _open_engine(self) -> BundleEngine:
        request, options = self._request, self._request.engine
        return load_engine(
            request.bundle,
            request.backend,
            options.provider,
            options.threads,
            device=options.device,
            engine=options.engine,
            cuda_graphs=options.cuda_graphs,
            kernel_specialization=options.kernel_specialization,
            progress=self._progress,
        )

    def _describe_subject(self, engine: BundleEngine, load_seconds: float) -> Subject:
        request = self._request
        manifest = self._request.bundle.manifest
        a = manifest.architecture
        build_seconds = None
        if BACKENDS[request.backend].build_settings is not None:
            build_seconds = find_engine(
                request.bundle, request.backend, request.engine.engine, verify=False
            ).record.seconds
        return Subject(
            bundle=request.bundle.path.name,
            digest=request.bundle.digest,
            model=manifest.model,
            kind=manifest.kind,
            precision=manifest.precision,
            base=manifest.base,
            layers=a.num_layers,
            parameters=sum(count_parameters(a).values()),
            engine=engine.description,
            backend=request.backend,
            provider=request.engine.provider,
            threads=request.engine.threads,
            load_seconds=load_seconds,
            build_seconds=build_seconds,
        )

    def _find_ceilings(self, points: list[Point]) -> Ceilings | None:
        request = self._request
        try:
            if request.target is not None:
                return ceilings_from_target(request.target)
            if "ceilings" in request.skip:
                return None
            if request.engine.provider == "cpu":
                with self._progress.stage("measuring this processor's limits"):
                    kinds = {request.bundle.manifest.precision, "fp32"}
                    seconds = min(SECONDS, request.rules.seconds / 10)
                    return measure_ceilings(request.engine.threads, kinds, seconds)
            name = (
                self._board["model"]
                if self._board
                else self._gpu.name
                if self._gpu is not None
                else ""
            )
            target = target_from_gpu_name(name)
            if target is None:
                raise MeasurementUnavailableError(
                    f"no row of the target table is called {name or 'like this GPU'!r}; choose one"
                    " with --target"
                )
            return ceilings_from_target(target)
        except MeasurementUnavailableError as error:
            self._absent["ceilings"] = str(error)
            return None

    def _add_roofline(self, point: Point, video: VideoWorkload, ceilings: Ceilings | None) -> Point:
        if ceilings is None:
            return point
        manifest = self._request.bundle.manifest
        quantization = manifest.quantization
        types = compute_types(
            manifest.precision, manifest.base, quantization.attention if quantization else "high"
        )
        a = manifest.architecture
        # The samples of a causal model are of all chunks; only the last chunk is compared with the
        # bound.
        cost = transition_cost(
            a,
            types,
            video.largest_step,
            video.text.shape[1],
            video.max_cached_tokens,
            with_text=video.plan is None,
        )
        median = point.transition.median if video.plan is None else point.largest_transition
        try:
            return point.model_copy(
                update={"roofline": roofline(cost, _fill_cpu_rates(ceilings), median)}
            )
        except MeasurementUnavailableError as error:
            self._absent["roofline"] = str(error)
            return point

    def _profile_layers(self, points: list[Point]) -> list[Layers]:
        if "layers" in self._request.skip:
            return []
        request = self._request
        try:
            with self._progress.stage("layers"):
                layers, enqueue = layer_profiling.profile_layers(
                    request.bundle, request.backend, request.engine, self._workloads[0], points[0]
                )
        except MeasurementUnavailableError as error:
            self._absent["layers"] = str(error)
            return []
        if enqueue is not None:
            points[0] = points[0].model_copy(update={"enqueue": enqueue})
        return [layers]

    def _measure_stages(self) -> list[StageTiming]:
        request = self._request
        manifest = self._request.bundle.manifest
        stage_records: list[StageTiming] = []
        for flag, part in (("text", stages.TEXT), ("vae", stages.VAE)):
            if flag in request.skip:
                continue
            try:
                folder = stages.find_pipeline_folder(manifest, request.pipeline, part)
            except MeasurementUnavailableError as error:
                self._absent[part] = str(error)
                continue
            with self._progress.stage(part):
                if part == stages.TEXT:
                    stage_records.append(
                        stages.measure_text_encoder(folder, manifest, request.prompt, request.rules)
                    )
                else:
                    stage_records.append(
                        stages.measure_vae(folder, self._workloads[0], request.rules)
                    )
        return stage_records


_UNITS = {"clock": "MHz", "temperature": "°C", "memory": "B"}
"""Unit of a reading, by the last word of its name."""


def _build_readers(gpu: NvmlGpu | None, on_jetson: bool) -> dict[str, Any]:
    """Return what the sampling thread reads beside power.

    On a Jetson, the kernel has the GPU's clocks and NVML does not.
    """
    reads: dict[str, Any] = {"CPU clock": machine.cpu_clock()}
    if on_jetson:
        gpu, reads["GPU clock"] = None, jetson.gpu_clock()
    temperature = machine.cpu_temperature()
    if temperature is not None:
        reads["CPU temperature"] = temperature
    if gpu is not None:
        reads |= {
            "GPU clock": gpu.sm_clock,
            "GPU memory clock": gpu.memory_clock,
            "GPU temperature": gpu.temperature,
        }
    return reads


def _fill_cpu_rates(ceilings: Ceilings) -> Ceilings:
    """Give a type without its own measured rate the rate of float32."""
    if not ceilings.measured:
        return ceilings
    float32 = ceilings.operations["fp32"]
    rates = {
        kind: ceilings.operations.get(kind, float32)
        for kind in ("fp32", "fp16", "bf16", "int8", "fp8")
    }
    return ceilings.model_copy(update={"operations": rates})
