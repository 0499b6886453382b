"""TensorRT for RTX: plans built by `anyflow-build --backend tensorrt-rtx`.

Runs, streams and caches are those of the tensorrt backend. Kernels are compiled when a plan is
opened on a GPU for the first time.
"""

from __future__ import annotations

from anyflow_deploy.engines.tensorrt.library import choose_library

choose_library("tensorrt-rtx")

from anyflow_deploy.engines.tensorrt.engine import TensorRTEngine  # noqa: E402 - after the choice


class TensorRTRtxEngine(TensorRTEngine):
    """A bundle's graphs as plans of TensorRT for RTX; see `TensorRTEngine`."""
