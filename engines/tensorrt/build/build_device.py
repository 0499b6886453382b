"""What plans are built for: a GPU of this machine, or one that is only named.

TensorRT times kernels on the GPU that it builds for. TensorRT for RTX needs no GPU to build: a
compute capability is enough, or none for a plan that runs on many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from anyflow_deploy.engines.engine_folder import DeviceRecord

if TYPE_CHECKING:
    from anyflow_deploy.engines.tensorrt.cuda import CudaDevice

PORTABLE = "any"
"""Name of the device of a plan that runs on every GPU that TensorRT for RTX supports."""


@dataclass(frozen=True)
class BuildDevice:
    """What plans are built for.

    Attributes:
        name: of the GPU, for messages and for engine.json; `PORTABLE` for many.
        compute_capability: NVIDIA's (major, minor); None for many.
        gpu: the GPU itself, where this machine has it; None where it is only named.
    """

    name: str
    compute_capability: tuple[int, int] | None
    gpu: CudaDevice | None = None

    @classmethod
    def from_index(cls, index: int) -> BuildDevice:
        """Return a GPU of this machine.

        Args:
            index: as CUDA counts them.

        Raises:
            BackendError: no driver, no such device, or cuda-python is missing.
        """
        from anyflow_deploy.engines.tensorrt.cuda import CudaDevice

        return cls.from_gpu(CudaDevice(index))

    @classmethod
    def from_gpu(cls, gpu: CudaDevice) -> BuildDevice:
        """Return an opened GPU."""
        return cls(gpu.name, gpu.compute_capability, gpu)

    @property
    def record(self) -> DeviceRecord:
        """The device as engine.json names it."""
        capability = self.compute_capability
        text = None if capability is None else "{}.{}".format(*capability)
        return DeviceRecord(kind="cuda", name=self.name, compute_capability=text)

    @property
    def minimum_capability(self) -> tuple[int, int]:
        """The lowest compute capability that the plan has to run on."""
        return self.compute_capability or (8, 0)

    def use(self) -> None:
        """Make the GPU the calling thread's device, where there is one."""
        if self.gpu is not None:
            self.gpu.use()
