"""The result of a probe, and how all probes run at once.

A probe that raises is one more result: a fault of the thing it looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

WORKS, FAULT, MISSING = "works", "does not work", "missing"


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found out about one thing.

    Attributes:
        state: "works", "does not work" (it is installed, and broken), or "missing".
        detail: versions, sizes, or what went wrong.
        remedy: a command, or what else to do; empty where nothing has to be done.
        facts: values that later checks use, as JSON can hold them.
    """

    state: str
    detail: str
    remedy: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def works(self) -> bool:
        """Whether the thing can be used."""
        return self.state == WORKS


ProbeResults = Mapping[str, ProbeResult]


@dataclass(frozen=True)
class Probe:
    """One row of the table: a name, and the function that looks.

    `run` returns None for a thing that this kind of machine never has.
    """

    name: str
    run: Callable[[], ProbeResult | None]


def run_probes(probes: Sequence[Probe], workers: int = 4) -> dict[str, ProbeResult]:
    """Run all probes, several at a time.

    Returns:
        Result by name, in the order of the table. An exception in a probe is a fault of the thing
        it looks at.
    """
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(lambda probe: _run_safely(probe.run), probes))
    return {
        probe.name: result
        for probe, result in zip(probes, results, strict=True)
        if result is not None
    }


def _run_safely(run: Callable[[], ProbeResult | None]) -> ProbeResult | None:
    try:
        return run()
    except Exception as error:  # noqa: BLE001 - a broken machine breaks probes in ways nobody foresees, and that is the answer
        return ProbeResult(FAULT, f"the probe failed: {type(error).__name__}: {error}")
