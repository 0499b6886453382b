"""A finding, and how probes are run: all at once, each so that its failure is one more finding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

WORKS, FAULT, MISSING = "works", "does not work", "missing"


@dataclass(frozen=True)
class ProbeResult:
    """What was found out about one thing.

    Attributes:
        state: "works", "does not work" (it is there, and broken), or "missing".
        detail: versions, sizes, or what went wrong.
        remedy: a command, or what else to do; empty where nothing has to be done.
        facts: what other questions depend on, as JSON can hold it.
    """

    state: str
    detail: str
    remedy: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def works(self) -> bool:
        """Whether it can be used."""
        return self.state == WORKS


ProbeResults = Mapping[str, ProbeResult]


@dataclass(frozen=True)
class Probe:
    """One row of the table: a name, and what looks. `run` returns None for a thing this kind of
    machine has none of."""

    name: str
    run: Callable[[], ProbeResult | None]


def run_probes(probes: Sequence[Probe], workers: int = 4) -> dict[str, ProbeResult]:
    """Run all probes.

    Returns:
        By name, in the order of the table; an exception in a probe is a fault of the thing it looks
        at.
    """
    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(lambda probe: _run_guarded(probe.run), probes))
    return {
        probe.name: finding
        for probe, finding in zip(probes, found, strict=True)
        if finding is not None
    }


def _run_guarded(run: Callable[[], ProbeResult | None]) -> ProbeResult | None:
    try:
        return run()
    except Exception as error:  # noqa: BLE001 - a broken machine breaks probes in ways nobody foresees, and that is the answer
        return ProbeResult(FAULT, f"could not be looked at: {type(error).__name__}: {error}")
