"""What building the C++ library (`engines/cpp`, docs/how-to/cpp.md) needs, looked for where its
CMake files look."""

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
    """CMake, something that it writes files for, a compiler of C++20, and nlohmann-json."""
    parts = [_probe_cmake(), _probe_generator(), _probe_cpp20(), _probe_json()]
    lacking = [part for part in parts if not part.works]
    if lacking:
        state = FAULT if any(part.state == FAULT for part in lacking) else MISSING
        return ProbeResult(
            state,
            "; ".join(part.detail for part in lacking),
            "; ".join(part.remedy for part in lacking),
        )
    return ProbeResult(WORKS, ", ".join(part.detail for part in parts))


def probe_torch_headers() -> ProbeResult:
    """For its AOTInductor backend."""
    package = _package("torch")
    folders = [*([package / "include"] if package else []), *include_folders()]
    install = (
        "pip install 'anyflow-deploy[aotinductor]' (torch's wheel has its headers and libraries)"
    )
    return probe_header(
        "torch/csrc/inductor/aoti_package/model_package_loader.h", folders, [], install
    )


def probe_tensorrt_headers() -> ProbeResult:
    """For its TensorRT backend; libnvinfer itself has to be there, too."""
    parts = [
        ("NvInferVersion.h", rf"#define (?:NV_TENSORRT|TRT)_{part}(?:_ENTERPRISE)? (\d+)")
        for part in ("MAJOR", "MINOR", "PATCH")
    ]
    install = "apt-get install libnvinfer-dev (NVIDIA's repository), or set TensorRT_ROOT"
    return probe_header("NvInferRuntime.h", include_folders("TensorRT_ROOT"), parts, install)


def probe_cuda_headers() -> ProbeResult:
    """For the same, and for AOTInductor in Python on a GPU."""
    folders = [
        *include_folders("CUDA_HOME", "CUDA_PATH"),
        Path("/usr/local/cuda/include"),
        Path("/opt/cuda/include"),
    ]
    folders += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/include"))
    version = [("cuda.h", r"#define CUDA_VERSION (\d+)")]
    install = "apt-get install cuda-cudart-dev (NVIDIA's repository), or set CUDA_HOME"
    found = probe_header("cuda_runtime_api.h", folders, version, install)
    detail = re.sub(r"^(\d+)0(\d)0 ", r"\1.\2 ", found.detail)  # 12060 is 12.6
    return ProbeResult(found.state, detail, found.remedy, found.facts)


def probe_header(
    name: str, where: Sequence[Path], version: Sequence[tuple[str, str]], install: str
) -> ProbeResult:
    """Look for a header.

    Args:
        name: of its file.
        where: folders, the first that has it counts.
        version: files beside it and patterns of the numbers that make its version.
        install: what to do where it is missing.
    """
    folder = next((folder for folder in where if (folder / name).is_file()), None)
    if folder is None:
        return ProbeResult(MISSING, f"no {name}", install)
    numbers = []
    for file, pattern in version:
        path = (folder / name).parent / file
        found = (
            re.search(pattern, path.read_text(errors="replace"), re.MULTILINE)
            if path.is_file()
            else None
        )
        numbers += [found[1]] if found else []
    return ProbeResult(
        WORKS,
        f"{'.'.join(numbers) + ' ' if numbers else ''}in {folder}",
        facts={"folder": str(folder)},
    )


def include_folders(*variables: str) -> list[Path]:
    """Where a compiler, or a variable of the environment, says that headers are."""
    paths = [Path(os.environ[name]) for name in variables if os.environ.get(name)]
    named = [part for path in paths for part in (path / "include", path)]
    listed = [
        Path(part)
        for name in ("CPLUS_INCLUDE_PATH", "CPATH")
        for part in _parts(os.environ.get(name, ""))
    ]
    machine = sysconfig.get_config_var("MULTIARCH") or ""
    return [
        *named,
        *listed,
        Path("/usr/local/include"),
        Path("/usr/include"),
        Path("/usr/include", machine),
    ]


def _probe_cmake() -> ProbeResult:
    path = _program("cmake")
    wanted = ".".join(map(str, OLDEST_CMAKE))
    found = re.search(
        r"cmake version (\d+)\.(\d+)\.?\S*",
        (run_command([path, "--version"]) or "") if path else "",
    )
    if found is None:
        return ProbeResult(
            MISSING, "no cmake", f"pip install cmake, or apt-get install cmake ({wanted} or later)"
        )
    shown = found[0].replace("cmake version", "CMake")
    if (int(found[1]), int(found[2])) < OLDEST_CMAKE:
        return ProbeResult(FAULT, f"{shown}, needed is {wanted} or later", "pip install cmake")
    return ProbeResult(WORKS, shown)


def _probe_generator() -> ProbeResult:
    name = next((name for name in ("ninja", "make") if _program(name)), None)
    return (
        ProbeResult(WORKS, name)
        if name
        else ProbeResult(MISSING, "neither ninja nor make", "pip install ninja")
    )


def _probe_cpp20() -> ProbeResult:
    wanted, found = find_compiler("c++", "g++", "clang++")
    install = "apt-get install g++ (11 or later)"
    if found is None:
        return ProbeResult(MISSING, f"none of {', '.join(wanted)} is there", install)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(_CPP20)
        command = [found, "-std=c++20", "-fsyntax-only", str(source)]
        done = run_captured(command, 60)
    return (
        ProbeResult(FAULT, f"{found} does not take C++20", install)
        if done.returncode
        else ProbeResult(WORKS, f"{found} with C++20")
    )


def _probe_json() -> ProbeResult:
    package = _package("nlohmann_json")
    folders = [*([package / "include"] if package else []), *include_folders()]
    install = "pip install nlohmann-json, or apt-get install nlohmann-json3-dev"
    found = probe_header("nlohmann/json.hpp", folders, _JSON_VERSION, install)
    return ProbeResult(
        found.state, f"nlohmann-json {found.detail}" if found.works else found.detail, found.remedy
    )


def _program(name: str) -> str | None:
    """Where a program is: what pip installs lies beside this Python, also where its environment is
    not active."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _package(name: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    spec = find_spec(name)
    return (
        Path(next(iter(spec.submodule_search_locations)))
        if spec and spec.submodule_search_locations
        else None
    )


def _parts(value: str) -> Iterable[str]:
    return filter(None, value.split(os.pathsep))
