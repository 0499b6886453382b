"""Time the layers under the runtime's own profiler, for the backends that have one."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.layer_timing import LayerTiming
from anyflow_deploy.engines.registry import BACKENDS, EngineOptions
from anyflow_deploy.profiling.errors import MeasurementUnavailableError
from anyflow_deploy.profiling.layers import layer_rows, sum_by_operator, sum_by_part
from anyflow_deploy.profiling.record import Latency, Layers, Point
from anyflow_deploy.profiling.summary_statistics import latency_from_samples
from anyflow_deploy.profiling.timed_engine import TimedEngine
from anyflow_deploy.profiling.workload import VideoWorkload, run_last_chunk

if TYPE_CHECKING:
    from anyflow_deploy.engines.tensorrt.profiler import ProfiledEngine

WARM_UP_STEPS, MEASURED_STEPS = 2, 3
"""Transitions under the profiler that are discarded, and those that are measured."""

ENQUEUES_WARM, ENQUEUES = 8, 20
"""The same for enqueueing. CUDA graphs are captured at a call's fourth run, and the two state
buffers make two calls."""


def profile_layers(
    bundle: Bundle, backend: str, options: EngineOptions, video: VideoWorkload, point: Point
) -> tuple[Layers, Latency | None]:
    """Measure where one transition's time goes, and how long launching it takes.

    The second value is None where the backend cannot tell.

    Raises:
        MeasurementUnavailableError: the backend has no profiler that times layers on its device.
    """
    profiled_providers = BACKENDS[backend].profiled_providers
    if options.provider in profiled_providers:
        return _PROFILERS[backend](bundle, options, video, point)
    if profiled_providers:
        raise MeasurementUnavailableError(
            "on a GPU ONNX Runtime's profiler times launches, not kernels; Nsight Systems shows"
            " those (nsys profile)"
        )
    capable = " and ".join(name for name, row in BACKENDS.items() if row.profiled_providers)
    raise MeasurementUnavailableError(
        f"the code that {backend} compiles has no layers left to time; use one of the backends"
        f" {capable}"
    )


def _profile_onnxruntime(
    bundle: Bundle, options: EngineOptions, video: VideoWorkload, point: Point
) -> tuple[Layers, None]:
    from anyflow_deploy.engines.onnxruntime.profiler import ProfiledEngine

    graph = transition_graph(bundle)
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(ProfiledEngine(bundle, options, Path(folder))) as engine,
    ):
        seconds = _time_steps(TimedEngine(engine), video)
        timings = engine.layers(graph, MEASURED_STEPS)
    return _layers_record("ONNX Runtime's profiler", graph, timings, seconds, point), None


def _profile_tensorrt(
    bundle: Bundle, options: EngineOptions, video: VideoWorkload, point: Point
) -> tuple[Layers, Latency]:
    from anyflow_deploy.engines.tensorrt.profiler import ProfiledEngine

    return _profile_plans(ProfiledEngine, "TensorRT", bundle, options, video, point)


def _profile_tensorrt_rtx(
    bundle: Bundle, options: EngineOptions, video: VideoWorkload, point: Point
) -> tuple[Layers, Latency]:
    from anyflow_deploy.engines.tensorrt_rtx.profiler import ProfiledRtxEngine

    return _profile_plans(ProfiledRtxEngine, "TensorRT for RTX", bundle, options, video, point)


def _profile_plans(
    engine_type: type[ProfiledEngine],
    library: str,
    bundle: Bundle,
    options: EngineOptions,
    video: VideoWorkload,
    point: Point,
) -> tuple[Layers, Latency]:
    graph = transition_graph(bundle)
    with closing(engine_type(bundle, options, layers=False)) as engine:
        run_last_chunk(TimedEngine(engine), video, ENQUEUES_WARM, ENQUEUES, engine.forget)
        enqueue = latency_from_samples(engine.enqueued)
    with closing(engine_type(bundle, options, layers=True)) as engine:
        seconds = _time_steps(TimedEngine(engine), video, engine)
        timings = engine.layers(graph)
    source = f"{library}'s IProfiler and engine inspector"
    return _layers_record(source, graph, timings, seconds, point), enqueue


_PROFILERS: dict[
    str, Callable[[Bundle, EngineOptions, VideoWorkload, Point], tuple[Layers, Latency | None]]
] = {
    "onnxruntime": _profile_onnxruntime,
    "tensorrt": _profile_tensorrt,
    "tensorrt-rtx": _profile_tensorrt_rtx,
}
"""Functions that time the layers of the backends whose registry row has `profiled_providers`."""


def transition_graph(bundle: Bundle) -> str:
    """Return the name of the graph that a transition runs."""
    return "transition" if bundle.manifest.kind == "bidirectional" else "chunk"


def _time_steps(engine: TimedEngine, video: VideoWorkload, profiler: object = None) -> list[float]:
    """Return the seconds of the measured transitions."""
    forget = getattr(profiler, "forget", lambda: None)
    run_last_chunk(engine, video, WARM_UP_STEPS, MEASURED_STEPS, forget)
    return engine.steps[-MEASURED_STEPS:]


def _layers_record(
    source: str, graph: str, timings: list[LayerTiming], seconds: list[float], point: Point
) -> Layers:
    layers = layer_rows(timings, MEASURED_STEPS)
    return Layers(
        source=source,
        graph=graph,
        shape=point.shape,
        transitions=MEASURED_STEPS,
        seconds=sum(layer.seconds for layer in layers),
        overhead=statistics.median(seconds) / point.largest_transition - 1,
        rows=layers,
        by_operator=sum_by_operator(layers),
        by_part=sum_by_part(layers),
    )
