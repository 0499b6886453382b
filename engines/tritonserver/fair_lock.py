"""Turns on one device, in the order in which they were asked for.

A plain lock lets whoever has just put it down take it again at once, and a stream of many
transitions would hold up all others.
"""

from __future__ import annotations

import threading


class FairLock:
    """A fair lock; use it as a context manager, from any thread."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._given = self._due = 0

    def __enter__(self) -> None:
        with self._news:
            mine = self._given
            self._given += 1
            self._news.wait_for(lambda: self._due == mine)

    def __exit__(self, *_: object) -> None:
        with self._news:
            self._due += 1
            self._news.notify_all()
