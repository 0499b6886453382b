"""An engine that notes how long its calls take, around any other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from anyflow_deploy.engines.engine import Engine
from anyflow_deploy.engines.wrapper import EngineAround, Work
from anyflow_deploy.profiling.timing import clock


class Watched(EngineAround):
    """See `EngineAround`.

    Args:
        engine: does the work.

    Attributes:
        steps: seconds of every transition since the list was last emptied.
        remembered: the same of every chunk that went into a cache.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, self._timed)
        self.steps: list[float] = []
        self.remembered: list[float] = []

    @contextlib.contextmanager
    def _timed(self, work: Work) -> Iterator[None]:
        began = clock()
        yield
        if work != "open":
            (self.steps if work == "step" else self.remembered).append(clock() - began)
