"""Polygraphy, made ready for one backend, with its messages collected.

Polygraphy decides between TensorRT and TensorRT for RTX when it is imported, by an environment
variable; so a process compares one of the two. It prints what goes wrong and then raises "see log":
here its log goes to Python's, and what it had to say of the last errors is kept for ours.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import deque

from anyflow_deploy.errors import BackendError, UnavailableError

RTX = "tensorrt-rtx"
"""The backend that is TensorRT for RTX."""

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
    if backend != "onnxruntime" and bool(config.USE_TENSORRT_RTX) != bool(wanted):
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
    """An exception in one line, with what Polygraphy and TensorRT logged before it."""
    text = " ".join(str(error).split())
    return " | ".join(dict.fromkeys((*_errors.errors, text)))
