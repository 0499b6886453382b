"""TensorRT for RTX under the name of TensorRT, so that our TensorRT backend runs on it unchanged.

Imported before `anyflow_deploy.engines.tensorrt…`. It exists until the backend `tensorrt-rtx` does:
TensorRT for RTX has no timing cache to keep (kernels are made when an engine is opened), and builds
for the GPU at hand when asked for `CURRENT`.
"""

from __future__ import annotations

import sys
from typing import Any


def use_tensorrt_rtx(current: bool = True) -> str:
    """Make `import tensorrt` mean TensorRT for RTX; returns its version.

    Args:
        current: build for the GPU at hand; False builds the portable engine (compute capability 8.0
            and later).

    Raises:
        ImportError: it is not installed.
    """
    import tensorrt_rtx_bindings as rtx

    sys.modules["tensorrt"] = rtx
    from anyflow_deploy.engines.tensorrt.build import builder, timing_cache

    def do_nothing(*_: Any) -> None:
        """There is nothing to time."""

    builder._check_graphs = do_nothing  # type: ignore[assignment]  # its table knows TensorRT's releases alone
    timing_cache.TimingCache.attach = timing_cache.TimingCache.save = do_nothing  # type: ignore[method-assign]
    configure = builder._GraphBuild._configure

    def configure_for_rtx(build: Any, config: Any) -> None:
        configure(build, config)
        if current:
            config.num_compute_capabilities = 1
            config.set_compute_capability(rtx.ComputeCapability.CURRENT, 0)

    builder._GraphBuild._configure = configure_for_rtx  # type: ignore[method-assign]
    return str(rtx.__version__)
