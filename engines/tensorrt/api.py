"""TensorRT, imported in one place, with its messages collected.

Every module that touches TensorRT takes `trt` from here, so a machine without it gets one error
with the command that installs it. `trt` is TensorRT (10.3 of JetPack 6 to 11) or TensorRT for RTX,
as `library` says: only what every release of both has is called, and mypy checks the calls against
each (docs/how-to/tensorrt.md).

TensorRT reports failure by returning nothing and logging why. `LOGGER` keeps what it logged, so
that an error of ours can say it. There is one logger: TensorRT uses the first one of a process for
everything, whatever it is given later.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

from anyflow_deploy.engines.registry import BACKENDS
from anyflow_deploy.engines.tensorrt.library import chosen_library, forget_choice
from anyflow_deploy.errors import BackendError, reraise_interrupt

LIBRARY = chosen_library()
"""The library of this process."""

if TYPE_CHECKING:
    import tensorrt as trt
else:
    try:
        trt = importlib.import_module(LIBRARY.module)
    except ImportError as error:
        forget_choice()
        reraise_interrupt(error)
        raise BackendError(
            f"{LIBRARY.title} cannot be imported ({error}). {LIBRARY.install_hint}"
            + BACKENDS[LIBRARY.backend].install_command("cuda")
        ) from None

__all__ = ["LIBRARY", "LOGGER", "TITLE", "VERSION", "MessageLog", "TensorRTLogger", "trt"]

VERSION: str = trt.__version__
"""Of the library on this machine, as in "10.3.0"."""

TITLE = f"{LIBRARY.title} {VERSION}"
"""For messages, as in "TensorRT 10.3.0"."""

_log = logging.getLogger("anyflow_deploy.tensorrt")
_MAX_ERRORS = 100


class TensorRTLogger(trt.ILogger):
    """TensorRT's logger: keeps errors, and passes everything to Python's logging.

    The messages go to the logger `anyflow_deploy.tensorrt`.
    """

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[tuple[int, str]] = []
        self.count = 0

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Take a message; TensorRT calls this from any of its threads."""
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.count += 1
            self.errors = [*self.errors[1 - _MAX_ERRORS :], (self.count, msg)]
            _log.error(msg)
        elif severity == trt.ILogger.Severity.WARNING:
            _log.warning(msg)
        else:
            _log.debug(msg)


LOGGER = TensorRTLogger()


class MessageLog:
    """The errors that TensorRT has logged since this object was made."""

    def __init__(self) -> None:
        self._start = LOGGER.count

    def summary(self, otherwise: str = "it gave no reason") -> str:
        """Return the last errors in one line.

        The first of them is often the cause; the last one only says that it failed.
        """
        messages = [message for number, message in LOGGER.errors if number > self._start]
        return " | ".join(dict.fromkeys(messages[-3:])) or otherwise
