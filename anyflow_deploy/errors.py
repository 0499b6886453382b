"""The errors that users read.

Every refusal in this project is an `AnyFlowError` (or a subclass of it) whose text says three
things: what was given, what is allowed, and what to do. Command lines print the text alone;
any other exception that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AnyFlowError(Exception):
    """Bad input, a broken file or a missing dependency, with what to do about it."""


class BundleError(AnyFlowError):
    """A bundle that is incomplete, changed, too new, or names files outside its own folder."""


class OutputError(AnyFlowError, OSError):
    """A file or folder that cannot be written where it was asked for.

    It is an OSError, too: a cache that cannot be written is no reason to stop.

    Attributes:
        errno, strerror: the system's, where it refused; else None.
    """

    def __init__(self, message: str, cause: OSError | None = None) -> None:
        super().__init__(message)
        self.errno = None if cause is None else cause.errno
        self.strerror = None if cause is None else cause.strerror

    def __str__(self) -> str:
        return str(self.args[0])


class CheckpointError(AnyFlowError):
    """A checkpoint that cannot be found, is not AnyFlow, or is not stored as safetensors."""


class ShapeError(AnyFlowError):
    """A tensor whose shape lies outside what the bundle declares."""


class BackendError(AnyFlowError):
    """A runtime, provider or precision that is not available."""


class UnavailableError(BackendError):
    """This machine lacks what an engine needs: a runtime, a provider, or a kernel.

    The bundle may be good and run on another machine.

    Attributes:
        flags: flags with which a command runs the bundle on another machine, such as
            "--provider cuda".
    """

    def __init__(self, message: str, flags: str = "") -> None:
        super().__init__(message)
        self.flags = flags


class InvalidRequestError(AnyFlowError):
    """A request for a video that the model, the bundle or the server cannot carry out.

    Attributes:
        param: the field that is wrong; None where it is no single one.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def reraise_interrupt(error: BaseException) -> None:
    """Raise `KeyboardInterrupt` where Ctrl-C is what made an import fail.

    Extension modules made with pybind11 (TensorRT, ONNX Runtime) turn every exception of their
    start into `ImportError("initialization failed")`, with the exception as its cause.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        cause = cause.__cause__


def suggestion(word: str, allowed: Iterable[str]) -> str:
    """Return a sentence that names the nearest allowed word; empty when none is near."""
    near = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def unreadable(path: object, error: OSError) -> str:
    """Return the sentences for a file that cannot be read: it is not there, or may not be read.

    Args:
        path: of the file or folder.
        error: what the system said.
    """
    if isinstance(error, PermissionError):
        return (
            f"{path} is there and may not be read (permission denied). Change its permissions, or"
            " those of its folder."
        )
    return f"{path} cannot be read: {error.strerror or error}."
