"""The GPUs that TensorRT for RTX builds for, by name; see `compute_capability`."""

from __future__ import annotations

from anyflow_deploy.engines.tensorrt.build.build_device import PORTABLE, BuildDevice
from anyflow_deploy.engines.tensorrt_rtx.compute_capability import (
    SUPPORTED,
    SUPPORTED_TEXT,
    is_supported,
)
from anyflow_deploy.errors import AnyFlowError, BackendError, suggestion
from anyflow_deploy.targets import TARGETS


def supported_targets() -> list[str]:
    """Return the names that `--target` takes."""
    rows = TARGETS.values()
    return [row.name for row in rows if row.compute_capability in SUPPORTED] + [PORTABLE]


def device_of_target(name: str) -> BuildDevice:
    """Return the device to build for, by its name in the table of targets.

    Args:
        name: a row of `targets.TARGETS`, or "any" for every supported GPU.

    Raises:
        AnyFlowError: an unknown name.
        BackendError: a device that TensorRT for RTX does not run on.
    """
    if name == PORTABLE:
        return BuildDevice(PORTABLE, None)
    allowed = supported_targets()
    if name not in TARGETS:
        raise AnyFlowError(
            f"unknown target {name!r}: TensorRT for RTX builds for {', '.join(allowed)}."
            f"{suggestion(name, allowed)}"
        )
    row = TARGETS[name]
    if row.compute_capability not in SUPPORTED:
        raise BackendError(
            f"TensorRT for RTX does not run on target {name!r} ({row.device}). It builds for"
            f" {', '.join(allowed)}. For {name} use {_alternative(row.compute_capability)}."
        )
    return BuildDevice(row.device, row.compute_capability)


def check_gpu(device: BuildDevice) -> None:
    """Refuse a GPU of this machine that cannot open the plans.

    Raises:
        BackendError: with the GPU's compute capability and the backend to use there.
    """
    capability = device.compute_capability
    if capability is not None and not is_supported(capability):
        raise BackendError(
            f"{device.name} has compute capability {capability[0]}.{capability[1]}; TensorRT for"
            f" RTX opens engines on {SUPPORTED_TEXT}. Build with --backend tensorrt for this"
            f" GPU, or for another one with --target {' or '.join(supported_targets())}."
        )


def _alternative(compute_capability: tuple[int, int] | None) -> str:
    return "--backend onnxruntime" if compute_capability is None else "--backend tensorrt"
