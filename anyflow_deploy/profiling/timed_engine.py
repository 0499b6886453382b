"""An engine that notes how long its calls take, around any other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from anyflow_deploy.engines.engine import Engine
from anyflow_deploy.engines.wrapper import EngineOperation, EngineWrapper
from anyflow_deploy.profiling.timing import clock


class TimedEngine(EngineWrapper):
    """See `EngineWrapper`.

    Args:
        engine: does the work.

    Attributes:
        steps: seconds of every transition since the list was last emptied.
        append_seconds: the same of every chunk that went into a cache.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, self._timed)
        self.steps: list[float] = []
        self.append_seconds: list[float] = []

    @contextlib.contextmanager
    def _timed(self, operation: EngineOperation) -> Iterator[None]:
        began = clock()
        yield
        if operation != "open":
            (self.steps if operation == "step" else self.append_seconds).append(clock() - began)
