"""TensorRT: plans built by `anyflow-build --backend tensorrt`, run with cuda-python and without
torch.

A run keeps its state on the device, in two buffers that are exchanged after a step, and runs on a
CUDA stream of its own (`execution.ExecutionSlot`). The slot of the last closed run is kept for the
next one of the same shapes: contexts, buffers and captured graphs are then there already.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import ClassVar

from numpy.typing import ArrayLike

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.engine import BundleEngineBase
from anyflow_deploy.engines.engine_folder import (
    EngineFolder,
    check_device,
    check_versions,
    find_engine,
)
from anyflow_deploy.engines.kv_cache import CachePlan
from anyflow_deploy.engines.registry import EngineOptions
from anyflow_deploy.engines.streaming import CacheStream
from anyflow_deploy.engines.tensorrt.api import LIBRARY, TITLE, VERSION
from anyflow_deploy.engines.tensorrt.build.build_device import BuildDevice
from anyflow_deploy.engines.tensorrt.build.optimization_profiles import select_profile
from anyflow_deploy.engines.tensorrt.cuda import CudaDevice, DeviceBuffer
from anyflow_deploy.engines.tensorrt.execution import ExecutionSlot
from anyflow_deploy.engines.tensorrt.kv_cache import TensorRTCache
from anyflow_deploy.engines.tensorrt.library import choose_library
from anyflow_deploy.engines.tensorrt.plan import LoadedPlan, PlanFile
from anyflow_deploy.engines.tensorrt.run import TensorRTRun
from anyflow_deploy.errors import BackendError
from anyflow_deploy.shape_ranges import ShapeRanges


class TensorRTEngine(BundleEngineBase):
    """A bundle's graphs as TensorRT plans.

    Args:
        bundle: an opened bundle.
        options: how to run.

    Attributes:
        device: the GPU.
        plans: the opened plans, by graph.
        achieved: what the plans really hold, as `EngineRecord.achieved` has it.

    Raises:
        BackendError: TensorRT, cuda-python or the GPU is missing, nothing was built, or it was
            built elsewhere.
    """

    backend: ClassVar[str] = "tensorrt"
    """Name in the registry."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        choose_library(self.backend)
        if options.provider != "cuda":
            raise BackendError(
                f"{LIBRARY.title} runs on NVIDIA GPUs only; provider is {options.provider!r}."
                " Choose provider 'cuda'."
            )
        super().__init__(bundle)
        folder = find_engine(bundle, self.backend, options.engine)
        self._options = options
        self.device = CudaDevice(options.device)
        self._check_device(folder)
        self._check_version(folder)
        self._record = folder.record
        self.achieved = folder.record.achieved
        # A run that waits for weights cannot be captured
        self._graphs = options.cuda_graphs and not folder.record.settings.get("weight_streaming")
        self.plans = self._load_plans(folder)
        self._idle: tuple[Hashable, ExecutionSlot] | None = None
        self._lock = threading.Lock()

    def _check_device(self, folder: EngineFolder) -> None:
        """Refuse an engine of another GPU, unless it was built to run on this one, too.

        Raises:
            BackendError: with both names.
        """
        here = BuildDevice.from_gpu(self.device).record
        built_for = folder.record.device
        compatibility = folder.record.settings.get("hardware_compatible")
        if compatibility == "ampere+" and self.device.compute_capability >= (8, 0):
            return
        same_capability = built_for.compute_capability == here.compute_capability
        if compatibility == "same-capability" and same_capability:
            return
        check_device(folder, here)

    def _check_version(self, folder: EngineFolder) -> None:
        """Refuse an engine of another release, unless it was built to run on later ones, too.

        Raises:
            BackendError: with both versions.
        """
        built_with = folder.record.versions.get(LIBRARY.version_key, "")
        compatible = folder.record.settings.get("version_compatible")
        if not compatible or not _is_forward_compatible(VERSION, built_with):
            check_versions(folder, {LIBRARY.version_key: VERSION})

    def _load_plans(self, folder: EngineFolder) -> dict[str, LoadedPlan]:
        """Open every plan of an engine that was found to fit."""
        return {
            graph: LoadedPlan(PlanFile.from_folder(folder, self.bundle, graph))
            for graph in folder.record.profiles
        }

    @property
    def runtime(self) -> str:
        """See `BundleEngineBase`."""
        return f"{TITLE}, {self.device.name}"

    @property
    def ranges(self) -> ShapeRanges:
        """See `Engine`. A shape inside may still lie in no profile."""
        return self._record.shape_ranges

    def start(self, latents: ArrayLike, text: ArrayLike) -> TensorRTRun:
        """See `Engine`."""
        z, prompt_embeds = self._prepare_run(latents, text)
        plan = self.plans["transition"]
        select_profile(
            plan.profiles,
            {"latents": z.shape, "text": prompt_embeds.shape, "t": z.shape[:2], "r": z.shape[:2]},
            plan.name,
        )
        key = (z.shape, prompt_embeds.shape)
        slot = self.acquire_slot(key)
        try:
            text_buffer = slot.acquire(prompt_embeds.nbytes)
            slot.stream.upload(text_buffer.address, prompt_embeds)
            inputs = {"text": (prompt_embeds.shape, text_buffer.address)}
            run = TensorRTRun(
                slot, plan, z, lambda: (inputs, {}), self._release_callback(slot, key, text_buffer)
            )
        except BaseException:
            slot.close()
            raise
        return run

    def _release_callback(
        self, slot: ExecutionSlot, key: Hashable, text_buffer: DeviceBuffer
    ) -> Callable[[], None]:
        def closed() -> None:
            slot.release(text_buffer)
            self.release_slot(key, slot)

        return closed

    def open_stream(self, text: ArrayLike, plan: CachePlan) -> CacheStream:
        """See `BundleEngine`."""
        prompt_embeds = self._prepare_stream(text)
        return CacheStream(TensorRTCache(self, self.plans, prompt_embeds, plan), plan)

    def acquire_slot(self, key: Hashable) -> ExecutionSlot:
        """A slot: the idle one if it is of the same shapes, else a new one in its place."""
        with self._lock:
            idle, self._idle = self._idle, None
        if idle is not None:
            if idle[0] == key:
                return idle[1]
            idle[1].close()  # its memory may be needed
        return self._new_slot()

    def _new_slot(self) -> ExecutionSlot:
        return ExecutionSlot(self.device, self._graphs)

    def release_slot(self, key: Hashable, slot: ExecutionSlot) -> None:
        """Hand a slot back; it is kept until one of other shapes is asked for."""
        with self._lock:
            other = self._idle
            self._idle = None if self._closed else (key, slot)
            closed = self._closed
        if other is not None:
            other[1].close()
        if closed:
            slot.close()

    def close(self) -> None:
        """See `Engine`. Runs that are open go on; what they use is released with them."""
        with self._lock:
            idle, self._idle = self._idle, None
            super().close()
        if idle is not None:
            idle[1].close()
        self.plans = {}


def _is_forward_compatible(version: str, built_with: str) -> bool:
    """Whether a version-compatible plan of `built_with` runs on `version`: the same major release,
    not an older one."""
    here, there = (
        tuple(int(n) for n in text.split(".")[:3] if n.isdecimal())
        for text in (version, built_with)
    )
    return bool(there) and here[:1] == there[:1] and here >= there
