"""What every command agrees on with the terminal and the system that runs it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType

from anyflow_deploy._version import __version__


def print_version(program: str, words: Sequence[str]) -> bool:
    """Print name and version where a command line asks for them; return whether it did."""
    if "--version" not in words or "--help" in words or "-h" in words:
        return False
    sys.stdout.write(f"{program} {__version__}\n")
    return True


def replace_unencodable() -> None:
    """Print a question mark for a character that a stream cannot encode, in place of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def handle_sigterm_as_ctrl_c() -> None:
    """Let SIGTERM do what Ctrl-C does at that moment.

    `docker stop`, systemd and schedulers send it; without a handler Python would end without
    cleaning up. A signal that is ignored, or that has a handler, is left as it is.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    owner = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        handler = signal.getsignal(signal.SIGINT)
        if os.getpid() != owner:  # a worker that was forked
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        elif callable(handler):
            handler(signal.SIGINT, frame)
        else:  # Ctrl-C is ignored, as in the background of a shell; this signal is not
            raise KeyboardInterrupt

    with contextlib.suppress(ValueError):  # not the main interpreter
        signal.signal(signal.SIGTERM, interrupt)
