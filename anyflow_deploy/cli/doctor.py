"""`anyflow-doctor`: what works on this machine, and why not.

It also answers where the packages that every command needs (pydantic, rich, fire, numpy) are
broken: then as plain text, and without flags.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from anyflow_deploy.cli.json_output import print_json
from anyflow_deploy.cli.terminal import replace_unencodable
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

REQUIREMENT_FAILED = 1
"""Exit status where --require names something that does not run here."""


def doctor(options: DoctorOptions) -> int:
    """Probe this machine and print the report; return the exit status."""
    requirements = options.require
    for requirement in requirements:  # refuse misspelt ones before looking at anything
        check_requirement(requirement, options.provider, judge_backends({}))
    results, verdicts = probe_machine()
    failures = {
        requirement: why
        for requirement in requirements
        if (why := check_requirement(requirement, options.provider, verdicts))
    }
    if options.json_output:
        print_json(report_json(results, verdicts, failures))
    else:
        _print_table(report_rows(results, verdicts))
    _print_failures(failures)
    return REQUIREMENT_FAILED if failures else 0


def probe_machine() -> tuple[dict[str, ProbeResult], list[BackendVerdict]]:
    """Probe everything on this machine, and judge each backend from the results."""
    results = adjust_remedies(run_probes(PROBES))
    return results, judge_backends(results)


def _print_table(rows: list[tuple[str, str, str, str]]) -> None:
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


def _print_failures(failures: dict[str, str]) -> None:
    for requirement, why in failures.items():
        print(f"error: {requirement} does not run here: {why}", file=sys.stderr)  # noqa: T201


def _report_plainly(reason: BaseException) -> int:
    """Print what can be said where the command's own packages cannot be imported."""
    problem = (
        f"the packages that every command needs are broken ({type(reason).__name__}: {reason})."
    )
    print(problem, file=sys.stderr)  # noqa: T201
    print("  ->  pip install --force-reinstall anyflow-deploy\n", file=sys.stderr)  # noqa: T201
    print(format_plain(report_rows(*probe_machine())))  # noqa: T201
    return 1


def main() -> None:
    """Run `anyflow-doctor` with the flags of the command line."""
    run: Any
    replace_unencodable()
    try:
        import fire  # noqa: F401 - what reads the flags, later

        from anyflow_deploy.cli.doctor_options import DoctorOptions
        from anyflow_deploy.cli.options import run
    except Exception as error:
        if isinstance(error, AnyFlowError):
            raise
        sys.exit(_report_plainly(error))
    run("anyflow-doctor", DoctorOptions, doctor)
