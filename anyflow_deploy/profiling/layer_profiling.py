"""The pass under the runtime's own profiler, for the backends that have one."""

from __future__ import annotations

import statistics
import tempfile
from contextlib import closing
from pathlib import Path

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.layer_timing import Timed
from anyflow_deploy.engines.registry import EngineOptions
from anyflow_deploy.profiling.errors import AbsentError
from anyflow_deploy.profiling.layers import by_operator, by_part, rows
from anyflow_deploy.profiling.record import Latency, Layers, Point
from anyflow_deploy.profiling.summary_statistics import latency_from_samples
from anyflow_deploy.profiling.timed_engine import Watched
from anyflow_deploy.profiling.workload import Video, last_chunk

WARM, COUNTED = 2, 3
"""Transitions under the profiler that are forgotten, and those that count."""

ENQUEUES_WARM, ENQUEUES = 8, 20
"""The same for enqueueing: CUDA graphs are captured at a call's fourth run, and the two state buffers make two calls."""


def watched(bundle: Bundle, backend: str, options: EngineOptions, video: Video, point: Point) -> tuple[Layers, Latency | None]:
    """Where one transition's time goes, and how long it takes to launch it where that can be told.

    Raises:
        AbsentError: the backend has no profiler that times layers on its device.
    """
    if backend == "onnxruntime" and options.provider == "cpu":
        return _onnxruntime(bundle, options, video, point), None
    if backend == "tensorrt":
        return _tensorrt(bundle, options, video, point)
    if backend == "onnxruntime":
        raise AbsentError(
            "on a GPU ONNX Runtime's profiler times launches, not kernels; Nsight Systems shows those (nsys profile)"
        )
    raise AbsentError(f"the code that {backend} compiles has no layers left to time; the onnxruntime and tensorrt backends have")


def _onnxruntime(bundle: Bundle, options: EngineOptions, video: Video, point: Point) -> Layers:
    from anyflow_deploy.engines.onnxruntime.profiler import ProfiledEngine

    graph = graph_of(bundle)
    with tempfile.TemporaryDirectory() as folder, closing(ProfiledEngine(bundle, options, Path(folder))) as engine:
        seconds = _run(Watched(engine), video)
        timed = engine.layers(graph, COUNTED)
    return _record("ONNX Runtime's profiler", graph, timed, seconds, point)


def _tensorrt(bundle: Bundle, options: EngineOptions, video: Video, point: Point) -> tuple[Layers, Latency]:
    from anyflow_deploy.engines.tensorrt.profiler import ProfiledEngine

    graph = graph_of(bundle)
    with closing(ProfiledEngine(bundle, options, layers=False)) as engine:
        last_chunk(Watched(engine), video, ENQUEUES_WARM, ENQUEUES, engine.forget)
        enqueue = latency_from_samples(engine.enqueued)
    with closing(ProfiledEngine(bundle, options, layers=True)) as engine:
        seconds = _run(Watched(engine), video, engine)
        timed = engine.layers(graph)
    return _record("TensorRT's IProfiler and engine inspector", graph, timed, seconds, point), enqueue


def graph_of(bundle: Bundle) -> str:
    """The graph that a transition runs."""
    return "transition" if bundle.manifest.kind == "bidirectional" else "chunk"


def _run(engine: Watched, video: Video, profiled: object = None) -> list[float]:
    """Seconds of the transitions that count."""
    forget = getattr(profiled, "forget", lambda: None)
    last_chunk(engine, video, WARM, COUNTED, forget)
    return engine.steps[-COUNTED:]


def _record(source: str, graph: str, timed: list[Timed], seconds: list[float], point: Point) -> Layers:
    layers = rows(timed, COUNTED)
    return Layers(
        source=source,
        graph=graph,
        shape=point.shape,
        transitions=COUNTED,
        seconds=sum(layer.seconds for layer in layers),
        overhead=statistics.median(seconds) / point.largest_transition - 1,
        rows=layers,
        by_operator=by_operator(layers),
        by_part=by_part(layers),
    )
