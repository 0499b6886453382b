"""Makes `import tensorrt` import TensorRT for RTX, so that our TensorRT backend runs on it.

Import it before `anyflow_deploy.engines.tensorrt…`. It is needed until there is a backend
`tensorrt-rtx`. TensorRT for RTX has no timing cache (kernels are compiled when an engine is
opened), and builds for the GPU of this machine with `CURRENT`.
"""

from __future__ import annotations

import sys
from typing import Any


def use_tensorrt_rtx(current: bool = True) -> str:
    """Make `import tensorrt` import TensorRT for RTX, and return its version.

    Args:
        current: build for the GPU of this machine; False builds the portable engine (compute
            capability 8.0 and later).

    Raises:
        ImportError: it is not installed.
    """
    import tensorrt_rtx_bindings as rtx

    sys.modules["tensorrt"] = rtx
    from anyflow_deploy.engines.tensorrt.build import builder, timing_cache

    def do_nothing(*_: Any) -> None:
        """Replace the timing cache, which TensorRT for RTX does not have."""

    builder._check_graphs = do_nothing  # type: ignore[assignment]  # its table has TensorRT's releases only
    timing_cache.TimingCache.attach = timing_cache.TimingCache.save = do_nothing  # type: ignore[method-assign]
    configure = builder._GraphBuild._configure

    def configure_for_rtx(build: Any, config: Any) -> None:
        configure(build, config)
        if current:
            config.num_compute_capabilities = 1
            config.set_compute_capability(rtx.ComputeCapability.CURRENT, 0)

    builder._GraphBuild._configure = configure_for_rtx  # type: ignore[method-assign]
    return str(rtx.__version__)
