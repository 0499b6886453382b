"""What compiling an engine needs: a C++ compiler that works, with OpenMP. (`cpp.py` has what the
C++ library needs.)"""

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
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else list(names)
    return wanted, next((path for name in wanted if (path := shutil.which(name.split()[0]))), None)


def probe_compiler() -> ProbeResult:
    """A C++ compiler makes a library with OpenMP, as AOTInductor does, and the library runs."""
    wanted, found = find_compiler("g++", "clang++", "c++")
    install = "apt-get install g++ (with clang also libomp-dev)"
    if found is None:
        return ProbeResult(MISSING, f"none of {', '.join(wanted)} is there", install)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        library = Path(folder, "probe.so")
        source.write_text(_SOURCE)
        command = [
            found,
            "-std=c++17",
            "-O2",
            "-fPIC",
            "-shared",
            "-fopenmp",
            str(source),
            "-o",
            str(library),
        ]
        done = run_captured(command, 120)
        if done.returncode:
            lines = (
                [line for line in done.stderr.splitlines() if "error" in line]
                or done.stderr.splitlines()
                or ["no reason given"]
            )
            return ProbeResult(
                FAULT, f"{found} fails on a small OpenMP program: {lines[0][:200]}", install
            )
        code = f"import ctypes\nfound['sum'] = ctypes.CDLL({str(library)!r}).probe(1000)"
        answer = run_python(code)
    if answer.found.get("sum") != 1000:
        return ProbeResult(
            FAULT, f"what {found} makes does not run: {answer.error or 'a wrong sum'}", install
        )
    return ProbeResult(WORKS, f"{found}, C++17 and OpenMP")
