"""Polygraphy, made ready for one backend, with its messages collected, and what it can compare.

Polygraphy decides between TensorRT and TensorRT for RTX when it is imported, by an environment
variable; so a process compares one of the two. It prints what goes wrong and then raises "see log":
here its log goes to Python's, and what it had to say of the last errors is kept for ours.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections import deque

from anyflow_deploy.engines.registry import DEFAULT_BACKEND
from anyflow_deploy.engines.tensorrt.library import LIBRARIES
from anyflow_deploy.errors import AnyFlowError, BackendError, UnavailableError, suggestion

RTX = "tensorrt-rtx"
"""The backend that is TensorRT for RTX."""

DEBUG_BACKENDS = (DEFAULT_BACKEND, *LIBRARIES)
"""Backends that run an ONNX graph."""

_SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"
_MAX_ERRORS = 3


class _ErrorLog(logging.Handler):
    """Keeps the last errors."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: deque[str] = deque(maxlen=_MAX_ERRORS)

    def emit(self, record: logging.LogRecord) -> None:
        """Called by Python's logging."""
        text = " ".join(record.getMessage().split()).removeprefix("[E] ").removeprefix("[!] ")
        if text not in self.errors:
            self.errors.append(text)


_errors = _ErrorLog()


def check_debug_backend(backend: str, provider: str | None) -> None:
    """Refuse what cannot be compared, before any work.

    Raises:
        AnyFlowError: a backend that runs no ONNX graph.
        BackendError: TensorRT on another provider than cuda.
        UnavailableError: TensorRT without a GPU.
    """
    if backend not in DEBUG_BACKENDS:
        raise AnyFlowError(
            f"--backend is {backend!r}; allowed are those that run an ONNX graph,"
            f" {', '.join(DEBUG_BACKENDS)}.{suggestion(backend, DEBUG_BACKENDS)}"
        )
    if backend == DEFAULT_BACKEND:
        return
    if provider not in (None, "cuda"):
        raise BackendError(f"{backend} runs on NVIDIA GPUs only; leave --provider {provider} out.")
    if not has_gpu():
        raise UnavailableError(
            f"{backend} runs its layers on a GPU, and this machine has none that NVIDIA's driver"
            " can use (nvidia-smi shows them). Run this where there is one; here --backend"
            " onnxruntime compares what the graph computes."
        )


def has_gpu() -> bool:
    """Tell whether NVIDIA's driver is there and knows a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    answers = driver.cuInit(0), driver.cuDeviceGetCount(ctypes.byref(count))
    return answers == (0, 0) and count.value > 0


def use_polygraphy(backend: str) -> None:
    """Import Polygraphy for a backend, and keep it from printing.

    Raises:
        UnavailableError: it is not installed.
        BackendError: this process has it imported for the other TensorRT.
    """
    wanted = int(backend == RTX)
    if "polygraphy" not in sys.modules:
        os.environ[_SWITCH] = str(wanted)
    try:
        from polygraphy import config
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise UnavailableError(
            f"Polygraphy cannot be imported ({error}). Run: pip install 'anyflow-deploy[debug]'"
        ) from None
    if backend != DEFAULT_BACKEND and bool(config.USE_TENSORRT_RTX) != bool(wanted):
        raise BackendError(
            f"Polygraphy was imported in this process with {_SWITCH}={1 - wanted}, and {backend}"
            f" needs {wanted}. Start another process."
        )
    G_LOGGER.colors = False
    G_LOGGER.use_python_logging_system = True
    G_LOGGER.module_severity = G_LOGGER.ERROR
    log = logging.getLogger("Polygraphy")
    log.propagate = False
    if _errors not in log.handlers:
        log.addHandler(_errors)


def forget_errors() -> None:
    """Start anew, before something that may fail."""
    _errors.errors.clear()


def describe_failure(error: Exception) -> str:
    """Put an exception into one line, with what Polygraphy and TensorRT logged before it."""
    text = " ".join(str(error).split())
    return " | ".join(dict.fromkeys((*_errors.errors, text)))
