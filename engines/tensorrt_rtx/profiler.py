"""TensorRT for RTX watched; see `engines.tensorrt.profiler`."""

from __future__ import annotations

from anyflow_deploy.engines.tensorrt.library import choose_library

choose_library("tensorrt-rtx")  # before the modules below import it

# ruff: noqa: E402
from anyflow_deploy.engines.tensorrt.profiler import ProfiledEngine
from anyflow_deploy.engines.tensorrt_rtx.engine import TensorRTRtxEngine


class ProfiledRtxEngine(ProfiledEngine, TensorRTRtxEngine):
    """A `TensorRTRtxEngine` that is watched; see `ProfiledEngine`."""
