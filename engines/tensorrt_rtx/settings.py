"""Settings of a build by TensorRT for RTX, checked before the library is even imported.

anyflow-build BUNDLE --backend tensorrt-rtx --target rtx4090 --shapes 480x832x81
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.build import BuildResult
from anyflow_deploy.engines.engine_folder import EngineWriter
from anyflow_deploy.engines.tensorrt.build.build_device import PORTABLE, BuildDevice
from anyflow_deploy.engines.tensorrt.build.settings import PlanSettings
from anyflow_deploy.engines.tensorrt_rtx.devices import check_gpu, device_of_target
from anyflow_deploy.errors import BackendError
from anyflow_deploy.memory.host import available_host_memory
from anyflow_deploy.progress import Progress


@dataclass(frozen=True)
class TensorRTRtxSettings(PlanSettings):
    """What a build by TensorRT for RTX can be asked for, beside `PlanSettings`.

    Attributes:
        target: the GPU to build for, a name in the table of targets; "any" for every GPU that
            TensorRT for RTX supports; None for the GPU at hand, or "any" where there is none.
    """

    backend: ClassVar[str] = "tensorrt-rtx"

    target: str | None = None

    def check(self, bundle: Bundle) -> None:
        """Refuse settings that cannot be built; see `BuildSettings.check`."""
        super().check(bundle)
        if self.target is not None:
            device_of_target(self.target)

    @property
    def label(self) -> str:
        """What tells engines of one bundle apart: the target, or the provider for the GPU at hand.

        It is part of the default name of the engine's folder.
        """
        return self.target or (self.provider if self._gpu_at_hand() else PORTABLE)

    def choose_device(self) -> BuildDevice:
        """Return the named target, else the GPU at hand, else the portable device.

        Raises:
            BackendError: TensorRT for RTX does not run on the GPU at hand, or it has to be there
                for what was asked.
        """
        if self.target is not None:
            device = device_of_target(self.target)
        else:
            device = self._gpu_at_hand() or BuildDevice(PORTABLE, None)
        if device.gpu is None and (self.refit or self.strip):
            flag = "--strip" if self.strip else "--refit"
            raise BackendError(
                f"{flag} needs a GPU: TensorRT for RTX 1.7.1 fails to build a refittable plan of"
                " any graph on a machine without a driver, or for another GPU. Leave it out; the"
                " plan then carries its weights. Or build where the GPU is, without --target."
            )
        return device

    def _gpu_at_hand(self) -> BuildDevice | None:
        try:
            device = BuildDevice.from_index(self.device)
        except BackendError:  # no driver, no GPU or no cuda-python: none of them is needed
            return None
        check_gpu(device)
        return device

    def build(self, bundle: Bundle, writer: EngineWriter, progress: Progress) -> BuildResult:
        """Build the plans into `writer`; see `BuildSettings.build`.

        Raises:
            BackendError: the disk or the memory is too small, or the build failed.
        """
        needed = build_memory(bundle)
        free = available_host_memory()
        if free is not None and free < needed:
            raise BackendError(
                f"a build of {bundle.path} takes about {needed / 1e9:.1f} GB of memory, and"
                f" {free / 1e9:.1f} GB are free. Close other programs, build on a larger machine"
                " (it needs no GPU), or export with a precision of fewer bytes."
            )
        return super().build(bundle, writer, progress)

    def configure(self, config: Any, device: BuildDevice) -> None:
        """Name the compute capability to build for."""
        from anyflow_deploy.engines.tensorrt_rtx.builder_config import set_compute_capability

        set_compute_capability(config, device)


def build_memory(bundle: Bundle) -> int:
    """Return about how many bytes of host memory the largest build of a bundle takes.

    The weights 1.7 times (measured: 1.66, with a plan that goes to the file piece by piece), and
    half a gigabyte for the library.
    """
    weights = sum(bundle.manifest.achieved.weight_bytes.values())
    return int(1.7 * weights) + 500_000_000
