"""An engine around another one that records how long its calls take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from anyflow_deploy.engines.engine import Engine
from anyflow_deploy.engines.wrapper import EngineOperation, EngineWrapper
from anyflow_deploy.profiling.timing import clock


class TimedEngine(EngineWrapper):
    """Runs another engine and records the seconds of its transitions and appends.

    Args:
        engine: the engine to time.

    Attributes:
        steps: seconds of every transition since the list was last emptied.
        append_seconds: the same of every chunk that was appended to a cache.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, self._time_operation)
        self.steps: list[float] = []
        self.append_seconds: list[float] = []

    @contextlib.contextmanager
    def _time_operation(self, operation: EngineOperation) -> Iterator[None]:
        start = clock()
        yield
        if operation != "open":
            (self.steps if operation == "step" else self.append_seconds).append(clock() - start)
