"""TensorRT: plans built by `anyflow-build --backend tensorrt`, run with cuda-python and without torch.

A run keeps its state on the device, in two buffers that are exchanged after a step, and runs on a CUDA stream of its own
(`execution.Lane`). The lane of the last closed run is kept for the next one of the same shapes: contexts, buffers
and captured graphs are then there already.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

from numpy.typing import ArrayLike

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.engine import checked_inputs, checked_text
from anyflow_deploy.engines.engine_folder import EngineFolder, check_here, find_engine
from anyflow_deploy.engines.kv_cache import CachePlan
from anyflow_deploy.engines.registry import EngineOptions
from anyflow_deploy.engines.streaming import CacheStream
from anyflow_deploy.engines.tensorrt.api import VERSION
from anyflow_deploy.engines.tensorrt.build.builder import device_record
from anyflow_deploy.engines.tensorrt.build.optimization_profiles import chosen
from anyflow_deploy.engines.tensorrt.cuda import Buffer, Device
from anyflow_deploy.engines.tensorrt.execution import Lane
from anyflow_deploy.engines.tensorrt.kv_cache import TensorRTCache
from anyflow_deploy.engines.tensorrt.plan import Opening, Plan
from anyflow_deploy.engines.tensorrt.run import TensorRTRun
from anyflow_deploy.errors import AnyFlowError, BackendError
from anyflow_deploy.models import Architecture
from anyflow_deploy.shape_ranges import Ranges


class TensorRTEngine:
    """A bundle's graphs as TensorRT plans.

    Args:
        bundle: an opened bundle.
        options: how to run.

    Raises:
        BackendError: TensorRT, cuda-python or the GPU is missing, nothing was built, or it was built elsewhere.
    """

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        if options.provider != "cuda":
            raise BackendError(f"TensorRT runs on NVIDIA GPUs only; provider is {options.provider!r}. Choose provider 'cuda'.")
        self.bundle = bundle
        folder = find_engine(bundle, "tensorrt", options.engine)
        self.device = Device(options.device)
        check_compatible(folder, self.device)
        self._record = folder.record
        streaming = bool(self._record.settings.get("weight_streaming"))
        self._graphs = options.cuda_graphs and not streaming  # a run that waits for weights cannot be captured
        self.plans = {graph: self._opened(folder, graph, streaming) for graph in self._record.profiles}
        self._idle: tuple[Hashable, Lane] | None = None
        self._lock = threading.Lock()
        self._closed = False

    def _opened(self, folder: EngineFolder, graph: str, streaming: bool) -> Plan:
        settings = folder.record.settings
        model = self.bundle.manifest.graphs[graph]
        opening = Opening(
            host_code=bool(settings.get("version_compatible")),
            refit_from=self.bundle.file(model.file) if settings.get("strip") else None,
            weight_streaming=streaming,
        )
        return Plan(folder.file(f"{graph}.plan"), graph, model, list(folder.record.profiles[graph]), opening)

    @property
    def description(self) -> str:
        """See `Engine`."""
        return f"TensorRT {VERSION}, {self.device.name}, {self.bundle.manifest.precision}"

    @property
    def architecture(self) -> Architecture:
        """See `Engine`."""
        return self.bundle.manifest.architecture

    @property
    def ranges(self) -> Ranges:
        """See `Engine`. A shape inside may still lie in no profile."""
        return self._record.shape_ranges

    def start(self, latents: ArrayLike, text: ArrayLike) -> TensorRTRun:
        """See `Engine`."""
        self._check_open()
        if self.bundle.manifest.kind == "causal":
            raise AnyFlowError(f"{self.bundle.path} is a causal model, which is made chunk by chunk: use stream(), not sample().")
        a, plan = self.architecture, self.plans["transition"]
        z, words = checked_inputs(self.ranges, a.in_channels, a.text_dim, latents, text)
        chosen(plan.profiles, {"latents": z.shape, "text": words.shape, "t": z.shape[:2], "r": z.shape[:2]}, plan.name)
        key = (z.shape, words.shape)
        lane = self.lane(key)
        try:
            held = lane.take(words.nbytes)
            lane.queue.upload(held.address, words)
            inputs = {"text": (words.shape, held.address)}
            run = TensorRTRun(lane, plan, z, lambda: (inputs, {}), self._returning(lane, key, held))
        except BaseException:
            lane.close()
            raise
        return run

    def _returning(self, lane: Lane, key: Hashable, held: Buffer) -> Callable[[], None]:
        def closed() -> None:
            lane.give(held)
            self.leave(key, lane)

        return closed

    def open_stream(self, text: ArrayLike, plan: CachePlan) -> CacheStream:
        """See `BundleEngine`."""
        self._check_open()
        if self.bundle.manifest.kind != "causal":
            raise AnyFlowError(f"{self.bundle.path} is a bidirectional model: use sample(), not stream().")
        words = checked_text(self.ranges, self.architecture.text_dim, text)
        return CacheStream(TensorRTCache(self, self.plans, words, plan), plan)

    def lane(self, key: Hashable) -> Lane:
        """A lane: the idle one if it is of the same shapes, else a new one in its place."""
        with self._lock:
            idle, self._idle = self._idle, None
        if idle is not None:
            if idle[0] == key:
                return idle[1]
            idle[1].close()  # its memory may be needed
        return self._new_lane()

    def _new_lane(self) -> Lane:
        return Lane(self.device, self._graphs)

    def leave(self, key: Hashable, lane: Lane) -> None:
        """Hand a lane back; it is kept until one of other shapes is asked for."""
        with self._lock:
            other, self._idle = self._idle, (None if self._closed else (key, lane))
            closed = self._closed
        if other is not None:
            other[1].close()
        if closed:
            lane.close()

    def close(self) -> None:
        """See `Engine`. Runs that are open go on; what they use is released with them."""
        with self._lock:
            idle, self._idle, self._closed = self._idle, None, True
        if idle is not None:
            idle[1].close()
        self.plans = {}

    def _check_open(self) -> None:
        if self._closed:
            raise AnyFlowError("this engine is closed; load another with load_engine(bundle).")


def check_compatible(folder: EngineFolder, device: Device) -> None:
    """Refuse an engine of another GPU or TensorRT, unless it was built to be compatible.

    Raises:
        BackendError: with both names.
    """
    record, here = folder.record, device_record(device)
    same_device = record.device
    wanted, built_for = record.settings.get("hardware_compatible"), record.device.compute_capability
    if (wanted == "ampere+" and device.compute_capability >= (8, 0)) or (
        wanted == "same-capability" and built_for == here.compute_capability
    ):
        same_device = here
    built_with = record.versions.get("tensorrt", "")
    versions = {"tensorrt": VERSION}
    if record.settings.get("version_compatible") and _later_of_the_same(VERSION, built_with):
        versions = {}
    check_here(EngineFolder(folder.path, record.model_copy(update={"device": same_device})), here, versions)


def _later_of_the_same(version: str, built_with: str) -> bool:
    """Whether a version-compatible plan of `built_with` runs on `version`: the same major release, not an older one."""
    here, there = (tuple(int(n) for n in text.split(".")[:3] if n.isdecimal()) for text in (version, built_with))
    return bool(there) and here[:1] == there[:1] and here >= there
