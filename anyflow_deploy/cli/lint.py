"""Show the TensorRT lint's findings: a table, or warnings at the end of an export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.registry import BACKENDS
from anyflow_deploy.errors import AnyFlowError, BackendError
from anyflow_deploy.progress import console
from anyflow_deploy.targets import get_target

if TYPE_CHECKING:
    from anyflow_deploy.engines.tensorrt.lint.lint import Finding

_JETSON_OF_JETPACK_6 = ("orin", "orin-nx", "orin-nano")
_MAX_WARNINGS = 5
"""Kinds of findings that an export prints; `anyflow-inspect --lint` has them all."""


def check_versions(versions: Sequence[str]) -> None:
    """Refuse text that is no TensorRT version, with a ValueError for pydantic."""
    from anyflow_deploy.engines.tensorrt.lint.operators import version_from_text

    for text in versions:
        try:
            version_from_text(text)
        except AnyFlowError as error:
            raise ValueError(f"--tensorrt: {error}") from None


@dataclass(frozen=True)
class LintResult:
    """The findings of a lint.

    Attributes:
        versions: the TensorRT versions that the rule table was checked for.
        findings: of the rule table and of the installed parsers.
        parsers: one line for each of NVIDIA's parsers: its answer, or why it was not run.
    """

    versions: tuple[str, ...]
    findings: list[Finding]
    parsers: list[str]


def run_lint(bundle: Bundle, versions: Sequence[str] | None) -> LintResult:
    """Check a bundle against the rule table, and with NVIDIA's installed parsers.

    Args:
        bundle: an opened bundle.
        versions: of TensorRT, as "10.3"; None for the default ones.
    """
    from anyflow_deploy.engines.tensorrt.lint.lint import DEFAULT_VERSIONS, lint_bundle
    from anyflow_deploy.engines.tensorrt.lint.real_parser import installed_parsers

    versions = tuple(versions or DEFAULT_VERSIONS)
    result = LintResult(versions, lint_bundle(bundle, versions), [])
    for backend in installed_parsers():
        findings, line = _run_parser(bundle, backend)
        result.findings.extend(findings)
        result.parsers.append(line)
    if not result.parsers:
        command = BACKENDS["tensorrt-rtx"].install_command("cuda")
        result.parsers.append(f"NVIDIA's own parser is not installed; to run it, too: {command}")
    return result


def _run_parser(bundle: Bundle, backend: str) -> tuple[list[Finding], str]:
    from anyflow_deploy.engines.tensorrt.lint.lint import Finding
    from anyflow_deploy.engines.tensorrt.lint.real_parser import parse_graphs

    paths = [bundle.file(record.file) for record in bundle.manifest.graphs.values()]
    try:
        answer = parse_graphs(paths, backend)
    except BackendError as error:
        return [], f"NVIDIA's parser was not run: {error}"
    version = answer.title.removeprefix("TensorRT ").removeprefix("for ")
    findings = [
        Finding(
            rule="parser",
            graph=problem.path.name,
            node=problem.node,
            operator=problem.operator,
            problem=problem.message,
            remedy="these are the parser's own words; docs/reference/lint.md says what to do",
            versions=(version,),
        )
        for problem in answer.problems
    ]
    verdict = "refuses the bundle" if findings else "accepts every graph"
    return findings, f"the parser of {answer.title} {verdict}"


def print_findings(out: Console, result: LintResult) -> None:
    """Print the findings, one row for all nodes with the same fault.

    `--json` lists every node.
    """
    findings = result.findings
    names = ", ".join(result.versions)
    for line in result.parsers:
        out.print(escape(line))
    if not findings:
        out.print(
            f"[green]TensorRT {escape(names)}: nothing found.[/] docs/reference/lint.md says what"
            " was looked for."
        )
        return
    table = Table(title=f"{len(findings)} findings")
    for title in ("rule", "graph", "node", "what is wrong", "TensorRT", "remedy"):
        table.add_column(title, overflow="fold")
    for group in group_findings(findings):
        first, more = group[0], len(group) - 1
        place = f"{first.node or 'all of it'}{f' ({first.operator})' if first.operator else ''}"
        place += f" and {more} more" if more else ""
        cells = (
            first.rule,
            first.graph,
            place,
            first.problem,
            ", ".join(first.versions),
            first.remedy,
        )
        table.add_row(*map(escape, cells))
    out.print(table)


def group_findings(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Group findings that differ in the node alone, in the order they came."""
    groups: dict[tuple[object, ...], list[Finding]] = {}
    for finding in findings:
        key = (
            finding.rule,
            finding.graph,
            finding.operator,
            finding.problem,
            finding.remedy,
            finding.versions,
        )
        groups.setdefault(key, []).append(finding)
    return list(groups.values())


def warn_about_tensorrt(bundle: Bundle) -> None:
    """Lint a new bundle with its target's TensorRT and print what was found.

    A bundle for the CPU is not linted. Findings never fail an export.
    """
    from anyflow_deploy.engines.tensorrt.lint.lint import DEFAULT_VERSIONS, lint_bundle

    target = get_target(bundle.manifest.target)
    if target.compute_capability is None:
        return
    versions = DEFAULT_VERSIONS if target.name in _JETSON_OF_JETPACK_6 else DEFAULT_VERSIONS[1:]
    groups = group_findings(lint_bundle(bundle, versions))
    for group in groups[:_MAX_WARNINGS]:
        count = f" ({len(group)} nodes)" if len(group) > 1 else ""
        console.print(f"[yellow]warning:[/] {escape(str(group[0]))}{count}")
    if len(groups) > _MAX_WARNINGS:
        path = escape(str(bundle.path))
        console.print(
            f"[yellow]warning:[/] {len(groups) - _MAX_WARNINGS} more: anyflow-inspect {path} --lint"
        )
