"""A `Progress` for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from anyflow_deploy.progress import Advance


class Recorder:
    """A report that notes stages and how far they came."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self.open: list[str] = []

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Advance]:
        self.stages[name] = 0
        self.open.append(name)

        def advance(amount: float) -> None:
            self.stages[name] += amount

        yield advance
        self.open.remove(name)
