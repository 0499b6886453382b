"""Settings of TensorRT's builder that TensorRT for RTX does not have."""

from __future__ import annotations

from anyflow_deploy.engines.tensorrt.api import TITLE, trt
from anyflow_deploy.engines.tensorrt.build.settings import TensorRTSettings
from anyflow_deploy.errors import BackendError


def configure_tensorrt(config: trt.IBuilderConfig, settings: TensorRTSettings) -> None:
    """Set scratch memory, optimization level and compatibility.

    Raises:
        BackendError: this release lacks the level of hardware compatibility.
    """
    if settings.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(settings.workspace * 1e9))
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware_compatible is not None:
        config.hardware_compatibility_level = _hardware_level(settings.hardware_compatible)


def _hardware_level(requested: str) -> trt.HardwareCompatibilityLevel:
    name = {"ampere+": "AMPERE_PLUS", "same-capability": "SAME_COMPUTE_CAPABILITY"}[requested]
    levels: dict[str, trt.HardwareCompatibilityLevel] = trt.HardwareCompatibilityLevel.__members__
    if name not in levels:
        raise BackendError(
            f"--hardware-compatible {requested} is not in {TITLE}, which has {', '.join(levels)}."
        )
    return levels[name]
