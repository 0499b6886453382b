"""Print the probes' results as text and as JSON, with the standard library alone."""

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
    results: ProbeResults, verdicts: Iterable[BackendVerdict]
) -> list[tuple[str, str, str, str]]:
    """Make the rows of a table: name, state, detail, remedy.

    Backends come last; their state is the precisions that run.
    """
    rows = [(name, result.state, result.detail, result.remedy) for name, result in results.items()]
    for verdict in verdicts:
        backend = verdict.backend
        precisions = [
            f"{p}{NOTES.get((backend.name, backend.provider, p), '')}"
            for p in verdict.runnable_precisions
        ]
        rows.append(
            (
                f"{backend.name}, {backend.provider}",
                "runs" if precisions else "does not run",
                _describe_verdict(verdict, precisions),
                "",
            )
        )
    return rows


def format_plain(rows: Iterable[tuple[str, str, str, str]]) -> str:
    """Format the table as text, without any library."""
    return "\n".join(
        f"{name:22} {state:14} {detail}{f'  ->  {remedy}' if remedy else ''}"
        for name, state, detail, remedy in rows
    )


def report_json(
    results: ProbeResults, verdicts: Iterable[BackendVerdict], failures: dict[str, str]
) -> dict[str, Any]:
    """Make what --json prints; `schema` counts changes that a program would notice."""
    try:
        version = importlib.metadata.version("anyflow-deploy")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    return {
        "schema": SCHEMA,
        "anyflow_deploy": version,
        "findings": {name: dataclasses.asdict(result) for name, result in results.items()},
        "backends": [
            {
                "backend": v.backend.name,
                "provider": v.backend.provider,
                "precisions": v.runnable_precisions,
                "reasons": {name: reason for name, reason in v.reasons.items() if reason},
            }
            for v in verdicts
        ],
        "unmet": failures,
    }


def _describe_verdict(verdict: BackendVerdict, precisions: list[str]) -> str:
    reasons: dict[str, list[str]] = {}
    for precision, reason in verdict.reasons.items():
        if reason:
            reasons.setdefault(reason, []).append(precision)
    if not precisions and len(reasons) == 1:
        return next(iter(reasons))
    gaps = [f"no {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "; ".join([", ".join(precisions), *gaps] if precisions else gaps)
