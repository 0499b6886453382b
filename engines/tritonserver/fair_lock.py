"""A fair lock: threads get the device in the order in which they asked for it.

A thread that releases a plain lock may take it again at once, and a stream of many transitions
would block all others.
"""

from __future__ import annotations

import threading


class FairLock:
    """A lock that is first come, first served; use it as a context manager, from any thread."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._next_ticket = 0
        self._now_serving = 0

    def __enter__(self) -> None:
        with self._condition:
            ticket = self._next_ticket
            self._next_ticket += 1
            self._condition.wait_for(lambda: self._now_serving == ticket)

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._now_serving += 1
            self._condition.notify_all()
