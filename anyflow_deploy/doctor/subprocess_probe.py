"""Asking in a process of its own: an import that crashes, hangs or prints takes only itself
down."""

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
# Not what happens to lie in the working folder.
sys.path[:] = [folder for folder in sys.path if folder]
found = {{}}
try:
    exec(compile(sys.argv[1], "probe", "exec"), {{"found": found}})
except ModuleNotFoundError as error:
    found = {{"no module": error.name or "", "error": str(error)}}
except BaseException as error:
    found = {{"error": f"{{type(error).__name__}}: {{error}}"}}
sys.stdout.write({_MARK!r} + json.dumps(found))
sys.stdout.flush()
os._exit(0)  # some libraries crash when they are taken down; that is not the question
"""


@dataclass(frozen=True)
class SubprocessResult:
    """What a child said.

    Attributes:
        found: what its code put into `found`; empty when it failed.
        missing: name of the module that is not installed.
        error: why there is no answer; empty when there is one.
    """

    found: dict[str, Any]
    missing: str = ""
    error: str = ""


def run_python(
    code: str, timeout: float = TIMEOUT, python: str = sys.executable
) -> SubprocessResult:
    """Run Python code that puts what it learns (as JSON can hold it) into the dict `found`."""
    try:
        done = run_captured([python, "-c", _PROGRAM, code], timeout)
    except subprocess.TimeoutExpired:
        return SubprocessResult({}, error=f"gave no answer within {timeout:g} s")
    except OSError as error:
        return SubprocessResult({}, error=f"Python could not be started: {error}")
    _, mark, answer = done.stdout.rpartition(_MARK)
    if done.returncode < 0:
        return SubprocessResult({}, error=f"crashed ({_signal_name(-done.returncode)})")
    if not mark or done.returncode:
        return SubprocessResult(
            {},
            error=_last_line(done.stderr)
            or f"ended with status {done.returncode} and said nothing",
        )
    found = json.loads(answer)
    return (
        SubprocessResult({}, found.get("no module", ""), found["error"])
        if "error" in found
        else SubprocessResult(found)
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
    """What a program prints; None where there is no such program or it fails."""
    try:
        done = run_captured(command, timeout)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def probe_import(module: str, code: str, install: str, timeout: float = TIMEOUT) -> ProbeResult:
    """Look at a package by importing it.

    Args:
        module: its top-level name.
        code: imports it and puts "detail" (words) into `found`, with any facts beside it.
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
    detail = str(answer.found.pop("detail", ""))
    return ProbeResult(WORKS, detail, facts=answer.found)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
