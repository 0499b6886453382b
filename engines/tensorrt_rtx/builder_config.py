"""Settings of TensorRT for RTX's builder that TensorRT does not have."""

from __future__ import annotations

from anyflow_deploy.engines.tensorrt.api import TITLE, trt
from anyflow_deploy.engines.tensorrt.build.build_device import BuildDevice
from anyflow_deploy.errors import BackendError


def set_compute_capability(config: trt.IBuilderConfig, device: BuildDevice) -> None:
    """Build for one compute capability; left alone, the builder makes a portable plan.

    Raises:
        BackendError: this release does not know the compute capability.
    """
    if device.compute_capability is None:
        return
    name = "SM{}{}".format(*device.compute_capability)
    known: dict[str, trt.ComputeCapability] = trt.ComputeCapability.__members__
    if name not in known and device.gpu is not None:
        name = "CURRENT"
    if name not in known:
        raise BackendError(
            f"{TITLE} does not build for {device.name} ({name}); it knows {', '.join(known)}."
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(known[name], 0)
