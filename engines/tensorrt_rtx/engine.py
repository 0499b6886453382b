"""TensorRT for RTX: plans built by `anyflow-build --backend tensorrt-rtx`.

Runs, streams and caches are those of the tensorrt backend. What differs is the opening. Plans hold
no kernels: those are compiled on the GPU when a plan is opened there for the first time, and kept
(`runtime_cache`). What precision was achieved is read then, too. And a plan fits every GPU of its
compute capability, or, built for "any", every one that the library supports.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from typing import Any, ClassVar

from anyflow_deploy.engines.tensorrt.library import choose_library

choose_library("tensorrt-rtx")  # before the modules below import it

# ruff: noqa: E402
from anyflow_deploy.engines.engine_folder import EngineFolder, check_device, device_label
from anyflow_deploy.engines.tensorrt.api import LIBRARY
from anyflow_deploy.engines.tensorrt.build.achieved import check_shortfall
from anyflow_deploy.engines.tensorrt.build.build_device import BuildDevice
from anyflow_deploy.engines.tensorrt.engine import TensorRTEngine
from anyflow_deploy.engines.tensorrt.execution import ExecutionSlot
from anyflow_deploy.engines.tensorrt.plan import LoadedPlan, PlanFile
from anyflow_deploy.engines.tensorrt_rtx.achieved import read_achieved
from anyflow_deploy.engines.tensorrt_rtx.compute_capability import is_supported
from anyflow_deploy.engines.tensorrt_rtx.plan import RtxPlan
from anyflow_deploy.engines.tensorrt_rtx.runtime_cache import RuntimeCache, kernel_file
from anyflow_deploy.errors import BackendError
from anyflow_deploy.progress import NullProgress

_log = logging.getLogger("anyflow_deploy.tensorrt")


class TensorRTRtxEngine(TensorRTEngine):
    """A bundle's graphs as plans of TensorRT for RTX; see `TensorRTEngine`.

    Raises:
        BackendError: as there; or eight-bit layers run in a wider type on this GPU, and the build
            did not allow that.
    """

    backend: ClassVar[str] = "tensorrt-rtx"

    @property
    def runtime(self) -> str:
        """See `BundleEngineBase`."""
        share = self.achieved.get("eight_bit_products", 1.0)
        note = "" if share == 1.0 else f", {100 * share:.0f} % of its eight-bit products in 8 bits"
        return super().runtime + note

    def _check_device(self, folder: EngineFolder) -> None:
        here = BuildDevice.from_gpu(self.device).record
        build = f"Build for this GPU: anyflow-build {self.bundle.path} --backend"
        if not is_supported(self.device.compute_capability):
            built_for = folder.record.device
            name = "several GPUs" if _is_portable(folder) else device_label(built_for)
            raise BackendError(
                f"{folder.path} was built for {name}, and this is {device_label(here)}, on which"
                f" {LIBRARY.title} opens no engines. {build} tensorrt"
            )
        if _is_portable(folder) or (
            folder.record.device.compute_capability == here.compute_capability
        ):
            return
        check_device(folder, here, f"{build} {self.backend}")

    def _load_plans(self, folder: EngineFolder) -> dict[str, LoadedPlan]:
        path = kernel_file(folder, self.device)
        self._kernels = RuntimeCache(path)
        self._used = False
        specialization = self._options.kernel_specialization or "lazy"
        plans = {}
        for graph in folder.record.profiles:
            file = PlanFile.from_folder(folder, self.bundle, graph)
            plans[graph] = RtxPlan(file, self._kernels, specialization)
        self._compile_kernels(list(plans.values()))
        if not self.achieved:
            record = read_achieved(path.with_suffix(".json"), self.bundle, plans)
            self.achieved = record.achieved
            _log.info("%s on %s: %s", folder.path, self.device.name, _in_words(record.achieved))
            allowed = bool(folder.record.settings.get("allow_fallback"))
            check_shortfall(record.shortfall, self.device.name, allowed)
        return dict(plans)

    def _compile_kernels(self, plans: list[RtxPlan]) -> None:
        """Make each plan's first context, and say so where its kernels are not there yet."""
        known = self._kernels.open(plans[0].engine)
        title = f"compiling kernels for {self.device.name}"
        if not known:
            _log.info("%s; the next opening is fast", title)
        progress = NullProgress() if known else self._options.progress or NullProgress()
        with progress.stage(title, len(plans)) as advance:
            for plan in plans:
                plan.prepare()
                advance(1)
        self._kernels.save()

    def release_slot(self, key: Hashable, slot: ExecutionSlot) -> None:
        """See `TensorRTEngine`. After the first run its kernels are kept, too."""
        super().release_slot(key, slot)
        if self._closed or not self._used:
            self._used = True
            self._kernels.save()

    def close(self) -> None:
        """See `TensorRTEngine`."""
        super().close()
        self.device.use()
        self._kernels.save()


def _is_portable(folder: EngineFolder) -> bool:
    return folder.record.device.compute_capability is None


def _in_words(achieved: dict[str, Any]) -> str:
    shares = {name: value for name, value in achieved.items() if isinstance(value, float)}
    words = (f"{name.replace('_', ' ')} {100 * value:.0f} %" for name, value in shares.items())
    return ", ".join(words) or "no eight-bit products and no attention to look for"
