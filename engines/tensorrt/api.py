"""TensorRT, imported in one place, with its messages collected.

Every module that touches TensorRT takes `trt` from here, so a machine without it gets one error
with the command that installs it. TensorRT reports failure by returning nothing and logging why;
`TensorRTLogger` keeps what it logged, so that an error of ours can say it. All of it is written for
10.3 (JetPack 6) to 11 alike: only what every release between has is called, and mypy holds it
against each (docs/how-to/tensorrt.md).
"""

from __future__ import annotations

import logging

from anyflow_deploy.engines.registry import BACKENDS
from anyflow_deploy.errors import BackendError

try:
    import tensorrt as trt
except ImportError as error:
    raise BackendError(
        f"TensorRT cannot be imported ({error}). On a Jetson it comes with JetPack (make the"
        " virtual environment with --system-site-packages); elsewhere run: "
        + BACKENDS["tensorrt"].install_command("cuda")
    ) from None

__all__ = ["VERSION", "TensorRTLogger", "trt"]

VERSION: str = trt.__version__
"""Of the TensorRT on this machine, as in "10.3.0"."""

_log = logging.getLogger("anyflow_deploy.tensorrt")
_MAX_ERRORS = 20


class TensorRTLogger(trt.ILogger):
    """TensorRT's logger: errors are kept, everything goes to Python's logging as
    `anyflow_deploy.tensorrt`."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Called by TensorRT, from any of its threads."""
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.errors = [*self.errors[1 - _MAX_ERRORS :], msg]
            _log.error(msg)
        elif severity == trt.ILogger.Severity.WARNING:
            _log.warning(msg)
        else:
            _log.debug(msg)

    def summary(self, otherwise: str = "it gave no reason") -> str:
        """The last errors in one line: the first of them is often the cause, the last one only says
        that it failed."""
        return " | ".join(dict.fromkeys(self.errors[-3:])) or otherwise
