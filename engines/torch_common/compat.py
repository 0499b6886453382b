"""Every private interface of torch that this project uses, in one place.

torch's public interface has no call for some of what a deployment needs: opening a compiled package
with its weights outside, asking which C++ compiler would be used, recording a network on fake
tensors, 8-bit matrix products. Those calls are made here and nowhere else. `PRIVATE_NAMES` lists
them, `TESTED_RELEASES` the releases they were run with, and a test
(`tests/unit/test_torch_compat.py`) fails with the name of the one that a new release of torch has
moved.

torch is imported inside the functions: this module can be imported without it.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyflow_deploy.bundle.atomic_io import atomic_file
from anyflow_deploy.errors import BackendError

if TYPE_CHECKING:
    from torch import Tensor

TESTED_RELEASES = ("2.11.0", "2.13.0")
"""Releases of torch in which everything below was run."""

PRIVATE_NAMES = (
    "torch._C._aoti.AOTIModelPackageLoader",
    "torch._inductor.aoti_compile_and_package",
    "torch._inductor.config.get_config_copy",
    "torch._inductor.cpp_builder.get_cpp_compiler",
    "torch._inductor.exc.InvalidCxxCompiler",
    "torch._int_mm",
    "torch._scaled_mm",
    "torch._subclasses.fake_tensor.FakeTensorMode",
)
"""Dotted names of all that is private."""

_OPEN = """
import sys, torch
for path in sys.argv[2:]:
    loader = torch._C._aoti.AOTIModelPackageLoader(path, "model", True, 1, int(sys.argv[1]))
    loader.get_constant_fqns()
"""


_FP8_HEADER = "torch/headeronly/util/Float8_e4m3fn.h"

_COMPILER_SCRIPT = """#!/bin/sh
for word; do
    case "$word" in *.wrapper.cpp) set -- -include {header} "$@"; break ;; esac
done
exec {compiler} -Wl,-Bsymbolic-functions "$@"
"""


def open_package(path: Path, index: int) -> Any:
    """Open a package that AOTInductor compiled, without weights.

    Args:
        path: the `.pt2` file.
        index: of the GPU; -1 for the CPU.

    Returns:
        torch's loader: `get_constant_fqns`, `load_constants`, `boxed_run`.
        `torch._inductor.aoti_load_package`, the public one, reads the archive through Python first,
        which could load a pickle.

    Raises:
        RuntimeError: the file is damaged, or of another release.
    """
    import torch

    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, index)


def check_packages_open(paths: Sequence[Path], index: int, timeout: float = 300) -> None:
    """Open packages in a process of its own, which may crash without harm.

    A package is native code. One that was linked against the wrong symbols ends the process that
    opens it with a segmentation fault (seen on an H200 with torch 2.11.0 and g++ 13.3), which no
    exception handler sees.

    Args:
        paths: `.pt2` files.
        index: of the GPU; -1 for the CPU.
        timeout: seconds.

    Raises:
        BackendError: the process failed, with its signal or its last message.
    """
    command = [sys.executable, "-c", _OPEN, str(index), *map(str, paths)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise BackendError(
            f"the process that opens the compiled packages did not end within {timeout:.0f} s."
        ) from None
    if process.returncode == 0:
        return
    if process.returncode < 0:
        reason = f"crash the process that opens them (signal {-process.returncode})"
    else:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        reason = f"cannot be opened: {last}"
    raise BackendError(
        f"the compiled packages {reason}. Nothing was written. Try another C++ compiler"
        " (CXX=clang++ or an older g++) or another release of torch, and please report this with"
        " the output of python -m torch.utils.collect_env."
    )


def select_known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of Inductor's options that this release of torch has.

    Line tables, for example, came with 2.13.
    """
    from torch._inductor import config

    known_options = config.get_config_copy()
    return {name: value for name, value in options.items() if name in known_options}


def find_cpp_compiler() -> str:
    """Return the C++ compiler that Inductor would use.

    Raises:
        BackendError: there is none that runs, with the packages that have one.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = str(get_cpp_compiler())
        subprocess.run([compiler, "--version"], check=True, capture_output=True)
    except (InvalidCxxCompiler, OSError, subprocess.CalledProcessError):
        raise BackendError(
            "AOTInductor needs a C++ compiler, and none was found. Install g++ (Debian, Ubuntu: apt"
            " install g++; Fedora: dnf install gcc-c++), or name another in the environment"
            " variable CXX."
        ) from None
    return compiler


def make_compiler_script(compiler: str, cache: Path | None = None) -> str:
    """Return a script that calls a C++ compiler with what Inductor's own command lacks.

    - A package contains copies of templates of the C++ library (std::regex, for one) that libtorch
      exports as well. Without `-Bsymbolic-functions` the dynamic linker may give a package
      libtorch's copies, made by another compiler.
    - The wrapper of an fp8 package names `at::Float8_e4m3fn`, and torch 2.11 includes no header
      that declares it (2.13 does).

    Args:
        compiler: name or path of g++ or clang++; the script has the same name, by which Inductor
            tells them apart.
        cache: folder for scripts; None for `anyflow_deploy/compiler` in the user's cache folder.
            The path does not change from build to build, so that Inductor finds again what it has
            compiled.

    Raises:
        OSError: the folder cannot be written.
    """
    if cache is None:
        cache = (
            Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            / "anyflow_deploy"
            / "compiler"
        )
    text = _COMPILER_SCRIPT.format(compiler=shlex.quote(compiler), header=_FP8_HEADER)
    folder = cache / hashlib.sha256(text.encode()).hexdigest()[:16]
    script = folder / Path(compiler).name
    if not script.exists() or script.read_text() != text:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(script) as partial:
            partial.write_text(text)
            partial.chmod(0o755)
    return str(script)


def make_fake_tensor_mode(shape_env: Any) -> Any:
    """Return a context in which tensors have shapes and types but no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)


def multiply_int8(a: Tensor, b: Tensor) -> Tensor:
    """Multiply int8 matrices (N, K) and (K, M) into int32 (N, M)."""
    import torch

    return torch._int_mm(a, b)


def multiply_fp8(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: Any) -> Tensor:
    """Multiply float8_e4m3fn matrices (N, K) and (K, M) into `dtype` (N, M).

    The second matrix lies by columns in memory.

    Args:
        a, b: the rounded matrices.
        scale_a, scale_b: float32, one number each.
        dtype: of the result.
    """
    import torch

    return torch._scaled_mm(
        a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=True
    )
