"""The findings as text and as JSON, with the standard library alone: it is what remains where
nothing else works."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterable
from typing import Any

from anyflow_deploy.doctor.backends import BackendVerdict
from anyflow_deploy.doctor.probe import ProbeResults

SCHEMA = 1

NOTES = {("onnxruntime", "cpu", "fp8"): " (emulated: its numbers, not its speed)"}


def report_rows(
    found: ProbeResults, verdicts: Iterable[BackendVerdict]
) -> list[tuple[str, str, str, str]]:
    """Rows of a table: name, state, detail, remedy. Backends come last; their state is the
    precisions that run."""
    rows = [
        (name, finding.state, finding.detail, finding.remedy) for name, finding in found.items()
    ]
    for verdict in verdicts:
        backend = verdict.backend
        running = [
            f"{p}{NOTES.get((backend.name, backend.provider, p), '')}" for p in verdict.running
        ]
        rows.append(
            (
                f"{backend.name}, {backend.provider}",
                "runs" if running else "does not run",
                _describe_verdict(verdict, running),
                "",
            )
        )
    return rows


def format_plain(rows: Iterable[tuple[str, str, str, str]]) -> str:
    """The table without any library."""
    return "\n".join(
        f"{name:22} {state:14} {detail}{f'  ->  {remedy}' if remedy else ''}"
        for name, state, detail, remedy in rows
    )


def report_json(
    found: ProbeResults, verdicts: Iterable[BackendVerdict], unmet: dict[str, str]
) -> dict[str, Any]:
    """What --json prints; `schema` counts changes that a program would notice."""
    try:
        version = importlib.metadata.version("anyflow-deploy")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    return {
        "schema": SCHEMA,
        "anyflow_deploy": version,
        "findings": {name: dataclasses.asdict(finding) for name, finding in found.items()},
        "backends": [
            {
                "backend": v.backend.name,
                "provider": v.backend.provider,
                "precisions": v.running,
                "reasons": {name: reason for name, reason in v.reasons.items() if reason},
            }
            for v in verdicts
        ],
        "unmet": unmet,
    }


def _describe_verdict(verdict: BackendVerdict, running: list[str]) -> str:
    reasons: dict[str, list[str]] = {}
    for precision, reason in verdict.reasons.items():
        if reason:
            reasons.setdefault(reason, []).append(precision)
    if not running and len(reasons) == 1:
        return next(iter(reasons))
    missing = [f"no {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "; ".join([", ".join(running), *missing] if running else missing)
