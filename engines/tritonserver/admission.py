"""Who may begin, so that memory stays bounded: so many streams at once, so many bytes of cache, so
many that wait.

First come, first served: a large video at the head of the queue waits for its room, and smaller
ones behind it do not pass, or it would wait forever. What a stream costs is known before it begins
(`CachePlan.bytes`).
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

from anyflow_deploy.errors import AnyFlowError

_LOOK = 0.2
"""Seconds between two looks whether who waits is still wanted."""


class CapacityError(AnyFlowError):
    """So many wait already that no more are taken."""


class Ticket:
    """A place in the queue; from `Admission.ask`."""

    def __init__(self, cost: int) -> None:
        self.cost = cost


class Admission:
    """See the module.

    Args:
        streams: at once.
        cache_bytes: of all of them together.
        waiting: may wait.
        changed: told of (active streams, waiting, bytes of cache) after every change, one call at a
            time.
    """

    def __init__(
        self,
        streams: int,
        cache_bytes: int,
        waiting: int,
        changed: Callable[[int, int, int], None] = lambda *_: None,
    ) -> None:
        self._most = streams
        self._bytes = cache_bytes
        self._most_waiting = waiting
        self._changed = changed
        self._active: set[Ticket] = set()
        self._waiting: deque[Ticket] = deque()
        self._news = threading.Condition()

    def ask(self, cost: int) -> Ticket:
        """Take a place in the queue; give it up with `within` or `leave`, whatever happens.

        Args:
            cost: bytes of cache.

        Raises:
            AnyFlowError: it would never fit.
            FullError: too many wait.
        """
        if cost > self._bytes:
            raise AnyFlowError(
                f"the cache of this video takes {cost / 1e6:,.1f} MB and this server has"
                f" {self._bytes / 1e6:,.1f} MB for all videos. Ask for fewer or smaller frames, or"
                " for a window."
            )
        with self._news:
            ticket = Ticket(cost)
            if self._waiting or not self._fits(ticket):
                if len(self._waiting) >= self._most_waiting:
                    raise CapacityError(
                        f"{len(self._active)} videos are being made and {len(self._waiting)} wait;"
                        " this server takes no more. Ask again later."
                    )
                self._waiting.append(ticket)
            else:
                self._active.add(ticket)
            self._tell()
        return ticket

    @contextlib.contextmanager
    def within(self, ticket: Ticket, check: Callable[[], None]) -> Iterator[None]:
        """Wait for room; it is held until the block ends.

        Args:
            ticket: from `ask`.
            check: called now and then while waiting; what it raises ends the waiting.
        """
        try:
            while True:
                with self._news:
                    if ticket in self._active:
                        break
                    self._news.wait(_LOOK)
                check()
            yield
        finally:
            self.leave(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Give a place up, and let those in that fit now."""
        with self._news:
            self._active.discard(ticket)
            with contextlib.suppress(ValueError):
                self._waiting.remove(ticket)
            while self._waiting and self._fits(self._waiting[0]):
                self._active.add(self._waiting.popleft())
            self._tell()
            self._news.notify_all()

    def _fits(self, ticket: Ticket) -> bool:
        return len(self._active) < self._most and self._held() + ticket.cost <= self._bytes

    def _held(self) -> int:
        return sum(ticket.cost for ticket in self._active)

    def _tell(self) -> None:
        self._changed(len(self._active), len(self._waiting), self._held())
