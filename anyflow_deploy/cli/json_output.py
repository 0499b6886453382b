"""`--json`: the result of a command as one JSON document on standard output.

Everything else goes to standard error, and so does what libraries and compilers print: while such a
command works, `reserve_stdout` keeps standard output for the document. docs/reference/json.md lists
the fields of every document. Only the standard library is used here, as in the doctor.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_STDOUT, _STDERR = 1, 2

_documents: list[TextIO] = []
"""Where documents go while standard output is reserved."""


def format_json(content: Any) -> str:
    """Format a document as every command does.

    Raises:
        ValueError: a number that is infinite or undefined; JSON has none.
    """
    return json.dumps(content, indent=1, allow_nan=False)


def print_json(content: Any) -> None:
    """Print a document to standard output; a command prints one."""
    print_json_text(format_json(content))


def print_json_text(text: str) -> None:
    """Print a document that is formatted already."""
    stream = _documents[-1] if _documents else sys.stdout
    stream.write(text + "\n")
    stream.flush()


@contextlib.contextmanager
def reserve_stdout() -> Iterator[None]:
    """Send all that is printed in the block to standard error, but for `print_json`.

    That holds for Python, for libraries in C, and for processes that they start.
    """
    copy = _redirect_descriptor()
    _documents.append(sys.stdout if copy is None else copy)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _documents.pop()
        if copy is not None:
            os.dup2(copy.fileno(), _STDOUT)
            copy.close()


def _redirect_descriptor() -> TextIO | None:
    """Point descriptor 1 at standard error; return a stream to what it was.

    None where Python's own standard output is something else already, or a descriptor is closed.
    """
    stream = sys.__stdout__
    if stream is None or sys.stdout is not stream:
        return None
    stream.flush()
    try:
        os.fstat(_STDERR)
        copy = os.fdopen(os.dup(_STDOUT), "w", encoding="utf-8")
    except OSError:
        return None
    os.dup2(_STDERR, _STDOUT)
    return copy
