"""Log lines: time, level, message, and `request=` and `video=` where they are known.

The id of a request finds all of its lines. Prompts are never logged.
"""

from __future__ import annotations

import contextvars
import logging
import time

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""Id of the HTTP request that is being answered."""


class LogFormatter(logging.Formatter):
    """Formats a record as one line; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
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
    """Write the server's log lines, and uvicorn's, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    for name in ("anyflow.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
