"""Which of NVIDIA's two libraries this process uses: TensorRT, or TensorRT for RTX.

Both have the same classes under different module names, so one source serves both. What differs
is written here, one row each. A process uses one of them: both keep state for the whole process
(a logger, for example). `choose_library` selects it before `api` imports it. This module imports
neither.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from anyflow_deploy.errors import BackendError


@dataclass(frozen=True)
class TensorRTLibrary:
    """One library.

    Attributes:
        backend: its row in `registry.BACKENDS`.
        title: as NVIDIA calls it.
        module: what Python imports.
        version_key: its name in `EngineRecord.versions`.
        times_kernels: whether a build times kernels on the GPU, and can keep the times in a file.
            TensorRT for RTX compiles kernels when an engine is opened instead.
        builds_without_gpu: whether a build can name the GPU instead of having it.
        install_hint: where the library comes from, besides our own extra.
    """

    backend: str
    title: str
    module: str
    version_key: str
    times_kernels: bool
    builds_without_gpu: bool
    install_hint: str


LIBRARIES = {
    row.backend: row
    for row in (
        TensorRTLibrary(
            "tensorrt",
            "TensorRT",
            "tensorrt",
            "tensorrt",
            times_kernels=True,
            builds_without_gpu=False,
            install_hint="On a Jetson it comes with JetPack (make the virtual environment with"
            " --system-site-packages); elsewhere run: ",
        ),
        TensorRTLibrary(
            "tensorrt-rtx",
            "TensorRT for RTX",
            "tensorrt_rtx",
            "tensorrt_rtx",
            times_kernels=False,
            builds_without_gpu=True,
            install_hint="It exists for Linux; there run: ",
        ),
    )
}

_API = "anyflow_deploy.engines.tensorrt.api"
_choice = "tensorrt"


def choose_library(backend: str) -> TensorRTLibrary:
    """Select the library of this process.

    Args:
        backend: "tensorrt" or "tensorrt-rtx".

    Raises:
        BackendError: the other one is already in use.
    """
    global _choice
    if backend != _choice and _API in sys.modules:
        raise BackendError(
            f"this process already uses {LIBRARIES[_choice].title}, and one process can use only"
            f" one of the two libraries. Run {LIBRARIES[backend].title} in a process of its own."
        )
    _choice = backend
    return LIBRARIES[backend]


def forget_choice() -> None:
    """Undo `choose_library`, after the library turned out not to be installed."""
    global _choice
    _choice = "tensorrt"


def chosen_library() -> TensorRTLibrary:
    """Return the library of this process: TensorRT, unless `choose_library` said otherwise."""
    return LIBRARIES[_choice]
