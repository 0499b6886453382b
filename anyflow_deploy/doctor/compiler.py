"""Probe what compiling an engine needs: a C++ compiler that works, with OpenMP.

`cpp.py` probes what the C++ library needs.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from anyflow_deploy.doctor.probe import FAULT, MISSING, WORKS, ProbeResult
from anyflow_deploy.doctor.subprocess_probe import run_captured, run_python

_SOURCE = """
#include <omp.h>
#include <vector>
extern "C" int probe(int count) {
    std::vector<int> ones(count, 1);
    int sum = 0;
#pragma omp parallel for reduction(+ : sum)
    for (int i = 0; i < count; ++i) sum += ones[i];
    return sum;
}
"""


def find_compiler(*names: str) -> tuple[list[str], str | None]:
    """Look for a C++ compiler.

    Args:
        names: of the programs, the first one that is there is taken; $CXX replaces them all.

    Returns:
        The names that were looked for, and where the compiler is.
    """
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else list(names)
    paths = (shutil.which(name.split()[0]) for name in candidates)
    return candidates, next((path for path in paths if path), None)


def probe_compiler() -> ProbeResult:
    """Compile a small library with OpenMP, as AOTInductor does, and call it."""
    names, compiler = find_compiler("g++", "clang++", "c++")
    install = "apt-get install g++ (with clang also libomp-dev)"
    if compiler is None:
        return ProbeResult(MISSING, f"none of {', '.join(names)} is there", install)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        library = Path(folder, "probe.so")
        source.write_text(_SOURCE)
        command = [
            compiler,
            "-std=c++17",
            "-O2",
            "-fPIC",
            "-shared",
            "-fopenmp",
            str(source),
            "-o",
            str(library),
        ]
        process = run_captured(command, 120)
        if process.returncode:
            lines = (
                [line for line in process.stderr.splitlines() if "error" in line]
                or process.stderr.splitlines()
                or ["no reason given"]
            )
            return ProbeResult(
                FAULT, f"{compiler} fails on a small OpenMP program: {lines[0][:200]}", install
            )
        code = f"import ctypes\nfacts['sum'] = ctypes.CDLL({str(library)!r}).probe(1000)"
        answer = run_python(code)
    if answer.facts.get("sum") != 1000:
        return ProbeResult(
            FAULT,
            f"a library made by {compiler} does not run: {answer.error or 'a wrong sum'}",
            install,
        )
    return ProbeResult(WORKS, f"{compiler}, C++17 and OpenMP")
