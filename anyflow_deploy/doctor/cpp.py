"""Probe what building the C++ library (`engines/cpp`) needs, where its CMake files look."""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from anyflow_deploy.doctor.compiler import find_compiler
from anyflow_deploy.doctor.probe import FAULT, MISSING, WORKS, ProbeResult
from anyflow_deploy.doctor.subprocess_probe import run_captured, run_command

OLDEST_CMAKE = (3, 22)
"""What `engines/cpp/CMakeLists.txt` asks for."""

_CPP20 = (
    "#include <span>\n#include <filesystem>\nint first(std::span<const int> all) { return"
    " all[0]; }\n"
)

_JSON_VERSION = [
    (file, rf"^#define NLOHMANN_JSON_VERSION_{part}\s+(\d+)")
    for part in ("MAJOR", "MINOR", "PATCH")
    for file in ("detail/abi_macros.hpp", "json.hpp")  # the second one in releases before 3.11
]


def probe_library() -> ProbeResult:
    """Probe CMake, a program that builds, a C++20 compiler, and nlohmann-json."""
    parts = [_probe_cmake(), _probe_generator(), _probe_cpp20(), _probe_json()]
    failures = [part for part in parts if not part.works]
    if failures:
        state = FAULT if any(part.state == FAULT for part in failures) else MISSING
        return ProbeResult(
            state,
            "; ".join(part.detail for part in failures),
            "; ".join(part.remedy for part in failures),
        )
    return ProbeResult(WORKS, ", ".join(part.detail for part in parts))


def probe_torch_headers() -> ProbeResult:
    """Probe the headers for the AOTInductor backend."""
    package = _find_package("torch")
    folders = [*([package / "include"] if package else []), *include_folders()]
    install = (
        "pip install 'anyflow-deploy[aotinductor]' (torch's wheel has its headers and libraries)"
    )
    return probe_header(
        "torch/csrc/inductor/aoti_package/model_package_loader.h", folders, [], install
    )


def probe_tensorrt_headers() -> ProbeResult:
    """Probe the headers for the TensorRT backend, which also needs libnvinfer."""
    parts = [
        ("NvInferVersion.h", rf"#define (?:NV_TENSORRT|TRT)_{part}(?:_ENTERPRISE)? (\d+)")
        for part in ("MAJOR", "MINOR", "PATCH")
    ]
    install = "apt-get install libnvinfer-dev (NVIDIA's repository), or set TensorRT_ROOT"
    return probe_header("NvInferRuntime.h", include_folders("TensorRT_ROOT"), parts, install)


def probe_cuda_headers() -> ProbeResult:
    """Probe the headers for the TensorRT backend and for AOTInductor on a GPU."""
    folders = [
        *include_folders("CUDA_HOME", "CUDA_PATH"),
        Path("/usr/local/cuda/include"),
        Path("/opt/cuda/include"),
    ]
    folders += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/include"))
    version = [("cuda.h", r"#define CUDA_VERSION (\d+)")]
    install = "apt-get install cuda-cudart-dev (NVIDIA's repository), or set CUDA_HOME"
    result = probe_header("cuda_runtime_api.h", folders, version, install)
    detail = re.sub(r"^(\d+)0(\d)0 ", r"\1.\2 ", result.detail)  # 12060 is 12.6
    return ProbeResult(result.state, detail, result.remedy, result.facts)


def probe_header(
    name: str, where: Sequence[Path], version: Sequence[tuple[str, str]], install: str
) -> ProbeResult:
    """Look for a header and read its version.

    Args:
        name: of its file.
        where: folders; the first one that has the header is used.
        version: files beside it, and patterns of the numbers that make its version.
        install: what to do where it is missing.
    """
    folder = next((folder for folder in where if (folder / name).is_file()), None)
    if folder is None:
        return ProbeResult(MISSING, f"no {name}", install)
    numbers = []
    for file, pattern in version:
        path = (folder / name).parent / file
        match = (
            re.search(pattern, path.read_text(errors="replace"), re.MULTILINE)
            if path.is_file()
            else None
        )
        numbers += [match[1]] if match else []
    return ProbeResult(
        WORKS,
        f"{'.'.join(numbers) + ' ' if numbers else ''}in {folder}",
        facts={"folder": str(folder)},
    )


def include_folders(*variables: str) -> list[Path]:
    """Return the folders of headers: the compiler's, and those that variables name."""
    paths = [Path(os.environ[name]) for name in variables if os.environ.get(name)]
    package_folders = [part for path in paths for part in (path / "include", path)]
    compiler_folders = [
        Path(part)
        for name in ("CPLUS_INCLUDE_PATH", "CPATH")
        for part in _split_paths(os.environ.get(name, ""))
    ]
    machine = sysconfig.get_config_var("MULTIARCH") or ""
    return [
        *package_folders,
        *compiler_folders,
        Path("/usr/local/include"),
        Path("/usr/include"),
        Path("/usr/include", machine),
    ]


def _probe_cmake() -> ProbeResult:
    path = _find_program("cmake")
    minimum = ".".join(map(str, OLDEST_CMAKE))
    match = re.search(
        r"cmake version (\d+)\.(\d+)\.?\S*",
        (run_command([path, "--version"]) or "") if path else "",
    )
    if match is None:
        return ProbeResult(
            MISSING, "no cmake", f"pip install cmake, or apt-get install cmake ({minimum} or later)"
        )
    version = match[0].replace("cmake version", "CMake")
    if (int(match[1]), int(match[2])) < OLDEST_CMAKE:
        return ProbeResult(FAULT, f"{version}; {minimum} or later is needed", "pip install cmake")
    return ProbeResult(WORKS, version)


def _probe_generator() -> ProbeResult:
    name = next((name for name in ("ninja", "make") if _find_program(name)), None)
    return (
        ProbeResult(WORKS, name)
        if name
        else ProbeResult(MISSING, "neither ninja nor make", "pip install ninja")
    )


def _probe_cpp20() -> ProbeResult:
    names, compiler = find_compiler("c++", "g++", "clang++")
    install = "apt-get install g++ (11 or later)"
    if compiler is None:
        return ProbeResult(MISSING, f"none of {', '.join(names)} is there", install)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(_CPP20)
        command = [compiler, "-std=c++20", "-fsyntax-only", str(source)]
        process = run_captured(command, 60)
    return (
        ProbeResult(FAULT, f"{compiler} does not take C++20", install)
        if process.returncode
        else ProbeResult(WORKS, f"{compiler} with C++20")
    )


def _probe_json() -> ProbeResult:
    package = _find_package("nlohmann_json")
    folders = [*([package / "include"] if package else []), *include_folders()]
    install = "pip install nlohmann-json, or apt-get install nlohmann-json3-dev"
    result = probe_header("nlohmann/json.hpp", folders, _JSON_VERSION, install)
    return ProbeResult(
        result.state,
        f"nlohmann-json {result.detail}" if result.works else result.detail,
        result.remedy,
    )


def _find_program(name: str) -> str | None:
    """Find a program; what pip installs lies beside this Python, on PATH or not."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _find_package(name: str) -> Path | None:
    """Find the folder of an installed package without importing it."""
    spec = find_spec(name)
    return (
        Path(next(iter(spec.submodule_search_locations)))
        if spec and spec.submodule_search_locations
        else None
    )


def _split_paths(value: str) -> Iterable[str]:
    return filter(None, value.split(os.pathsep))
