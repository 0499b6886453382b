"""`anyflow-doctor`: what works on this machine, and why not.

Where even the packages that every command stands on are broken (pydantic, rich, fire, numpy), it
still answers, in plain text and with no flags but --help.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from anyflow_deploy.doctor.backends import (
    REQUIREMENTS,
    BackendVerdict,
    check_requirement,
    judge_backends,
)
from anyflow_deploy.doctor.probe import FAULT, WORKS, ProbeResult, run_probes
from anyflow_deploy.doctor.probes import PROBES, adjust_remedies
from anyflow_deploy.doctor.report import format_plain, report_json, report_rows
from anyflow_deploy.errors import AnyFlowError

if TYPE_CHECKING:
    from anyflow_deploy.cli.doctor_options import DoctorOptions

UNMET = 1
"""Exit status where --require names something that does not run here."""


def doctor(options: DoctorOptions) -> int:
    """Do it; returns the exit status."""
    wishes = options.require
    for wish in wishes:  # refuse misspelt ones before looking at anything
        check_requirement(wish, options.provider, judge_backends({}))
    found, verdicts = probe_machine()
    unmet = {
        wish: why for wish in wishes if (why := check_requirement(wish, options.provider, verdicts))
    }
    if options.json_output:
        print(json.dumps(report_json(found, verdicts, unmet), indent=1))  # noqa: T201
    else:
        _show(report_rows(found, verdicts))
    _complain(unmet)
    return UNMET if unmet else 0


def probe_machine() -> tuple[dict[str, ProbeResult], list[BackendVerdict]]:
    """Everything that can be said of this machine."""
    found = adjust_remedies(run_probes(PROBES))
    return found, judge_backends(found)


def _show(rows: list[tuple[str, str, str, str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    colours = {WORKS: "green", "runs": "green", FAULT: "red"}
    for index, (name, state, detail, remedy) in enumerate(rows):
        if index == len(rows) - len(REQUIREMENTS):
            table.add_row()
        advice = f"\n[dim]{escape(remedy)}[/]" if remedy else ""
        table.add_row(
            escape(name), f"[{colours.get(state, 'yellow')}]{state}[/]", f"{escape(detail)}{advice}"
        )
    Console(highlight=False).print(table)


def _complain(unmet: dict[str, str]) -> None:
    for wish, why in unmet.items():
        print(f"error: {wish} does not run here: {why}", file=sys.stderr)  # noqa: T201


def _plain(reason: BaseException) -> int:
    """What is left to say where the command's own packages cannot be imported."""
    problem = (
        f"the packages that every command needs are broken ({type(reason).__name__}: {reason})."
    )
    print(problem, file=sys.stderr)  # noqa: T201
    print("  ->  pip install --force-reinstall anyflow-deploy\n", file=sys.stderr)  # noqa: T201
    print(format_plain(report_rows(*probe_machine())))  # noqa: T201
    return 1


def main() -> None:
    """Entry point."""
    run: Any
    try:
        from anyflow_deploy.cli.doctor_options import DoctorOptions
        from anyflow_deploy.cli.options import run
    except Exception as error:
        if isinstance(error, AnyFlowError):
            raise
        sys.exit(_plain(error))
    run("anyflow-doctor", DoctorOptions, doctor)
