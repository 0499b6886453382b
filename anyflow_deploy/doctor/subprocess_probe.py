"""Run probes in a process of their own: an import that crashes or hangs ends only that."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anyflow_deploy.doctor.probe import FAULT, MISSING, WORKS, ProbeResult

TIMEOUT = 60.0
"""Seconds. The slowest import seen, ModelOpt's on two busy cores, took 20."""

_MARK = "\n@anyflow-doctor@"

_PROGRAM = f"""
import json, os, sys, warnings
warnings.simplefilter("ignore")
# Without the working folder, whose files could shadow a package.
sys.path[:] = [folder for folder in sys.path if folder]
facts = {{}}
try:
    exec(compile(sys.argv[1], "probe", "exec"), {{"facts": facts}})
except ModuleNotFoundError as error:
    facts = {{"no module": error.name or "", "error": str(error)}}
except BaseException as error:
    facts = {{"error": f"{{type(error).__name__}}: {{error}}"}}
sys.stdout.write({_MARK!r} + json.dumps(facts))
sys.stdout.flush()
os._exit(0)  # some libraries crash at exit, which does not matter here
"""


@dataclass(frozen=True)
class SubprocessResult:
    """What the code in a subprocess reported.

    Attributes:
        facts: what the code put into the dict `facts`; empty when it failed.
        missing: name of the module that is not installed.
        error: why the code failed; empty when it did not.
    """

    facts: dict[str, Any]
    missing: str = ""
    error: str = ""


def run_python(
    code: str, timeout: float = TIMEOUT, python: str = sys.executable
) -> SubprocessResult:
    """Run Python code that puts what it learns (as JSON can hold it) into the dict `facts`."""
    try:
        process = run_captured([python, "-c", _PROGRAM, code], timeout)
    except subprocess.TimeoutExpired:
        return SubprocessResult({}, error=f"gave no answer within {timeout:g} s")
    except OSError as error:
        return SubprocessResult({}, error=f"Python could not be started: {error}")
    _, mark, answer = process.stdout.rpartition(_MARK)
    if process.returncode < 0:
        return SubprocessResult({}, error=f"crashed ({_signal_name(-process.returncode)})")
    if not mark or process.returncode:
        return SubprocessResult(
            {},
            error=_last_line(process.stderr)
            or f"ended with status {process.returncode} and said nothing",
        )
    facts = json.loads(answer)
    return (
        SubprocessResult({}, facts.get("no module", ""), facts["error"])
        if "error" in facts
        else SubprocessResult(facts)
    )


def run_captured(command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a program without input, and keep what it prints.

    Raises:
        OSError: it cannot be started.
        subprocess.TimeoutExpired: it did not end within so many seconds, and was killed.
    """
    return subprocess.run(
        list(command),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def run_command(command: Sequence[str], timeout: float = 20.0) -> str | None:
    """Run a program and return what it prints; None where it is missing or fails."""
    try:
        process = run_captured(command, timeout)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout if process.returncode == 0 else None


def probe_import(module: str, code: str, install: str, timeout: float = TIMEOUT) -> ProbeResult:
    """Probe a package by importing it.

    Args:
        module: its top-level name.
        code: imports it and puts "detail" (words) into `facts`, with any other facts.
        install: the command that installs it.
        timeout: seconds.
    """
    answer = run_python(code, timeout)
    if answer.missing == module:
        return ProbeResult(MISSING, f"no module {module}", install)
    if answer.error:
        return ProbeResult(
            FAULT,
            answer.error,
            f"{install.replace('pip install', 'pip install --force-reinstall')}",
        )
    detail = str(answer.facts.pop("detail", ""))
    return ProbeResult(WORKS, detail, facts=answer.facts)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
