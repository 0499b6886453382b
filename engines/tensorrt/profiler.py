"""TensorRT watched: how long its layers take, and how long it takes to hand them to the GPU.

Two questions, two ways to run. With `layers`, an `IProfiler` is attached to every context and
TensorRT times each layer on the device; nothing is captured then, and every run waits for itself.
Without, everything runs as it always does (CUDA graphs included), and only the time until a run was
put on its stream is noted: where that is most of a step, the GPU waits for the processor.

The names of layers are the inspector's, which knows the kernel and the ONNX nodes behind each.
Written against the real bindings of three releases and run on a stand-in; no GPU has run it yet.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.layer_timing import LayerTiming
from anyflow_deploy.engines.registry import EngineOptions
from anyflow_deploy.engines.tensorrt.api import trt
from anyflow_deploy.engines.tensorrt.build.achieved import inspect_layers
from anyflow_deploy.engines.tensorrt.build.optimization_profiles import Shape
from anyflow_deploy.engines.tensorrt.cuda import CudaDevice
from anyflow_deploy.engines.tensorrt.engine import TensorRTEngine
from anyflow_deploy.engines.tensorrt.execution import ExecutionSlot
from anyflow_deploy.engines.tensorrt.plan import LoadedPlan

_NODES = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


class LayerTimer(trt.IProfiler):
    """Adds up what TensorRT reports.

    Attributes:
        times: (seconds, calls) of each layer, by name.
    """

    def __init__(self) -> None:
        trt.IProfiler.__init__(self)
        self.times: dict[str, tuple[float, int]] = {}

    def report_layer_time(self, layer_name: str, ms: Any) -> None:
        """Called by TensorRT, for every layer of a run, in order."""
        seconds, calls = self.times.get(layer_name, (0.0, 0))
        self.times[layer_name] = (seconds + 1e-3 * float(ms), calls + 1)


class ProfiledSlot(ExecutionSlot):
    """A slot that notes how long it takes to put a run on the stream."""

    def __init__(
        self,
        device: CudaDevice,
        graphs: bool,
        profiler: trt.IProfiler | None,
        enqueued: list[float],
    ) -> None:
        super().__init__(device, graphs, profiler)
        self._enqueued = enqueued

    def run(self, plan: LoadedPlan, shapes: dict[str, Shape], addresses: dict[str, int]) -> None:
        """See `ExecutionSlot`."""
        began = time.perf_counter()
        super().run(plan, shapes, addresses)
        self._enqueued.append(time.perf_counter() - began)


class ProfiledEngine(TensorRTEngine):
    """A `TensorRTEngine` that is watched.

    Args:
        bundle: an opened bundle.
        options: how to run.
        layers: time every layer; otherwise only what it takes to enqueue.

    Attributes:
        enqueued: seconds of every run until it was on the stream, since the list was last emptied.
    """

    def __init__(self, bundle: Bundle, options: EngineOptions, layers: bool) -> None:
        super().__init__(bundle, options)
        self._profiler = LayerTimer() if layers else None
        self.enqueued: list[float] = []

    def _new_slot(self) -> ExecutionSlot:
        graphs = self._graphs and self._profiler is None
        return ProfiledSlot(self.device, graphs, self._profiler, self.enqueued)

    def forget(self) -> None:
        """Begin anew: what came so far was warm-up."""
        self.enqueued.clear()
        if self._profiler is not None:
            self._profiler.times.clear()

    def layers(self, graph: str) -> list[LayerTiming]:
        """Every layer of a graph since `forget`."""
        assert self._profiler is not None, "the engine was opened without layers"
        known = {layer["Name"]: layer for layer in _inspect_layers(self.plans[graph])}
        return [
            LayerTiming(
                name=name,
                operator=str(known.get(name, {}).get("LayerType", "unknown")),
                seconds=seconds,
                calls=calls,
                module=next(iter(_NODES.findall(str(known.get(name, {}).get("Metadata", "")))), ""),
            )
            for name, (seconds, calls) in self._profiler.times.items()
        ]


def _inspect_layers(plan: LoadedPlan) -> Iterator[dict[str, Any]]:
    """The inspector's list of a plan's layers; without names (less verbose plans list only those),
    nothing."""
    for layer in json.loads(inspect_layers(plan.engine)).get("Layers", []):
        if isinstance(layer, dict) and "Name" in layer:
            yield layer
