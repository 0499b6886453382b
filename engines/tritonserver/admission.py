"""Admission of streams, so that memory stays bounded.

There are limits on the streams at once, on the bytes of their caches, and on the requests that
wait. They are served in order: a large video at the head of the queue waits for its room, and
smaller ones behind it do not pass, or it would wait forever. The cost of a stream is known before
it begins (`CachePlan.bytes`).
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

from anyflow_deploy.errors import AnyFlowError

_POLL_SECONDS = 0.2
"""Seconds between two checks whether a waiting request was cancelled."""


class CapacityError(AnyFlowError):
    """Too many requests are waiting already."""


class Ticket:
    """A place in the queue, from `Admission.enqueue`."""

    def __init__(self, cost: int) -> None:
        self.cost = cost


class Admission:
    """The queue of streams, and the streams that run.

    Args:
        streams: the most that run at once.
        cache_bytes: the most bytes of all their caches together.
        waiting: the most that may wait.
        on_change: called with (active streams, waiting, bytes of cache) after every change, one
            call at a time.
    """

    def __init__(
        self,
        streams: int,
        cache_bytes: int,
        waiting: int,
        on_change: Callable[[int, int, int], None] = lambda *_: None,
    ) -> None:
        self._max_streams = streams
        self._max_cache_bytes = cache_bytes
        self._max_waiting = waiting
        self._on_change = on_change
        self._active: set[Ticket] = set()
        self._waiting: deque[Ticket] = deque()
        self._condition = threading.Condition()

    def enqueue(self, cost: int) -> Ticket:
        """Take a place in the queue; always give it up again, with `admit` or `release`.

        Args:
            cost: bytes of cache.

        Raises:
            AnyFlowError: it would never fit.
            CapacityError: too many requests wait already.
        """
        if cost > self._max_cache_bytes:
            raise AnyFlowError(
                f"the cache of this video takes {cost / 1e6:,.1f} MB and this server has"
                f" {self._max_cache_bytes / 1e6:,.1f} MB for all videos. Ask for fewer or smaller"
                " frames, or for a window."
            )
        with self._condition:
            ticket = Ticket(cost)
            if self._waiting or not self._fits(ticket):
                if len(self._waiting) >= self._max_waiting:
                    raise CapacityError(
                        f"the server is full: {len(self._active)} videos are running and"
                        f" {len(self._waiting)} wait. Try again later."
                    )
                self._waiting.append(ticket)
            else:
                self._active.add(ticket)
            self._notify()
        return ticket

    @contextlib.contextmanager
    def admit(self, ticket: Ticket, check: Callable[[], None]) -> Iterator[None]:
        """Wait for room, and hold it until the block ends.

        Args:
            ticket: from `enqueue`.
            check: called repeatedly while waiting; an exception it raises ends the waiting.
        """
        try:
            while True:
                with self._condition:
                    if ticket in self._active:
                        break
                    self._condition.wait(_POLL_SECONDS)
                check()
            yield
        finally:
            self.release(ticket)

    def release(self, ticket: Ticket) -> None:
        """Give a place up, and admit the waiting streams that fit now."""
        with self._condition:
            self._active.discard(ticket)
            with contextlib.suppress(ValueError):
                self._waiting.remove(ticket)
            while self._waiting and self._fits(self._waiting[0]):
                self._active.add(self._waiting.popleft())
            self._notify()
            self._condition.notify_all()

    def _fits(self, ticket: Ticket) -> bool:
        return (
            len(self._active) < self._max_streams
            and self._used_bytes() + ticket.cost <= self._max_cache_bytes
        )

    def _used_bytes(self) -> int:
        return sum(ticket.cost for ticket in self._active)

    def _notify(self) -> None:
        self._on_change(len(self._active), len(self._waiting), self._used_bytes())
