"""Log lines: time, level, what happened, and `request=` and `video=` where they are known: one word
finds all of a request.

Prompts are never logged.
"""

from __future__ import annotations

import contextvars
import logging
import time

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""Of the HTTP request that is being answered."""


class LogFormatter(logging.Formatter):
    """One line a record; tracebacks follow on lines of their own."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        request = getattr(record, "request", "") or request_id.get()
        video = getattr(record, "video", "")
        words = [
            f"{moment}.{int(record.msecs):03d}Z",
            record.levelname.lower(),
            record.getMessage().replace("\n", " "),
        ]
        words += [
            f"{name}={value}" for name, value in (("request", request), ("video", video)) if value
        ]
        line = " ".join(words)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def log_to_stderr(level: int = logging.INFO) -> None:
    """Have the server's lines, and uvicorn's, on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    for name in ("anyflow.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
