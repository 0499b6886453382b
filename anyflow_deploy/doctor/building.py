"""What compiling needs: a C++ compiler that works, OpenMP, and headers for embedding an engine in C++."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from anyflow_deploy.doctor.child import asked
from anyflow_deploy.doctor.finding import FAULT, MISSING, WORKS, Finding

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


def compiler() -> Finding:
    """A C++ compiler makes a library with OpenMP, as AOTInductor does, and the library runs."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    found = next((path for name in wanted if (path := shutil.which(name.split()[0]))), None)
    install = "apt-get install g++ (with clang also libomp-dev)"
    if found is None:
        return Finding(MISSING, f"none of {', '.join(wanted)} is there", install)
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        source.write_text(_SOURCE)
        command = [found, "-std=c++17", "-O2", "-fPIC", "-shared", "-fopenmp", str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, check=False)
        if done.returncode:
            lines = (
                [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no reason given"]
            )
            return Finding(FAULT, f"{found} fails on a small OpenMP program: {lines[0][:200]}", install)
        code = f"import ctypes\nfound['sum'] = ctypes.CDLL({str(library)!r}).probe(1000)"
        answer = asked(code)
    if answer.found.get("sum") != 1000:
        return Finding(FAULT, f"what {found} makes does not run: {answer.error or 'a wrong sum'}", install)
    return Finding(WORKS, f"{found}, C++17 and OpenMP")


def header_finding(name: str, where: Sequence[Path], version: Sequence[tuple[str, str]], install: str) -> Finding:
    """Look for a header.

    Args:
        name: of its file.
        where: folders, the first that has it counts.
        version: files beside it and patterns of the numbers that make its version.
        install: what to do where it is missing.
    """
    folder = next((folder for folder in where if (folder / name).is_file()), None)
    if folder is None:
        return Finding(MISSING, f"no {name}", install)
    numbers = []
    for file, pattern in version:
        path = folder / file
        found = re.search(pattern, path.read_text(errors="replace"), re.MULTILINE) if path.is_file() else None
        numbers += [found[1]] if found else []
    return Finding(WORKS, f"{'.'.join(numbers) + ' ' if numbers else ''}in {folder}", facts={"folder": str(folder)})


def onnxruntime_headers() -> Finding:
    """For ONNX Runtime in C++."""
    names = ("onnxruntime", "onnxruntime/core/session", "onnxruntime-gpu", "")
    folders = [base / name for base in include_folders("ORT_ROOT", "ONNXRUNTIME_ROOT") for name in names]
    install = "unpack ONNX Runtime's release archive and set ORT_ROOT, or: apt-get install libonnxruntime-dev"
    version = [("onnxruntime_c_api.h", r"#define ORT_API_VERSION (\d+)")]
    found = header_finding("onnxruntime_cxx_api.h", folders, version, install)
    return Finding(found.state, f"API {found.detail}" if found.works else found.detail, found.remedy, found.facts)


def tensorrt_headers() -> Finding:
    """For TensorRT in C++."""
    parts = [
        ("NvInferVersion.h", rf"#define (?:NV_TENSORRT|TRT)_{part}(?:_ENTERPRISE)? (\d+)") for part in ("MAJOR", "MINOR", "PATCH")
    ]
    install = "apt-get install libnvinfer-headers-dev (NVIDIA's repository), or set TENSORRT_ROOT"
    return header_finding("NvInfer.h", include_folders("TENSORRT_ROOT", "TRT_ROOT"), parts, install)


def cuda_headers() -> Finding:
    """For CUDA in C++, and for AOTInductor on a GPU."""
    folders = [*include_folders("CUDA_HOME", "CUDA_PATH"), Path("/usr/local/cuda/include"), Path("/opt/cuda/include")]
    folders += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/include"))
    version = [("cuda.h", r"#define CUDA_VERSION (\d+)")]
    install = "apt-get install cuda-cudart-dev (NVIDIA's repository), or set CUDA_HOME"
    found = header_finding("cuda_runtime_api.h", folders, version, install)
    detail = re.sub(r"^(\d+)0(\d)0 ", r"\1.\2 ", found.detail)  # 12060 is 12.6
    return Finding(found.state, detail, found.remedy, found.facts)


def include_folders(*variables: str) -> list[Path]:
    """Where a compiler, or a variable of the environment, says that headers are."""
    paths = [Path(os.environ[name]) for name in variables if os.environ.get(name)]
    named = [part for path in paths for part in (path / "include", path)]
    listed = [Path(part) for name in ("CPLUS_INCLUDE_PATH", "CPATH") for part in _parts(os.environ.get(name, ""))]
    machine = sysconfig.get_config_var("MULTIARCH") or ""
    return [*named, *listed, Path("/usr/local/include"), Path("/usr/include"), Path("/usr/include", machine)]


def _parts(value: str) -> Iterable[str]:
    return filter(None, value.split(os.pathsep))
