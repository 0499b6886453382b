"""Compiles a bundle's programs with AOTInductor, and summarizes the packages.

Options that differ from torch's defaults, and why:

- weights stay outside the package (`package_constants_in_so`), see `engines/aotinductor/build.py`;
- threads are asked for when the package runs (`dynamic_threads`), not fixed at as many as the
  builder had;
- a package uses its own copies of the C++ library's templates, not libtorch's, and an fp8 package
  gets a header that torch 2.11 forgets (`torch_common/compat.py`);
- no precompiled headers: they took a minute and 290 MB to make and saved nothing (9.4 s with, 9.4 s
  without, for one file).
"""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch._inductor import aoti_compile_and_package
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.engine_folder import EngineWriter
from anyflow_deploy.engines.torch_common.compat import (
    find_cpp_compiler,
    make_compiler_script,
    select_known_options,
)
from anyflow_deploy.engines.torch_common.weights import TorchWeights
from anyflow_deploy.errors import BackendError
from anyflow_deploy.export.program import program_from_bundle
from anyflow_deploy.progress import Progress

OPTIONS: dict[str, Any] = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.precompile_headers": False,
    "aot_inductor.enable_line_tables": False,
    "cpp.dynamic_threads": True,
}

_CALL = re.compile(r"aoti_torch_(?:cpu|cuda)_(\w+)\(")
_ATTENTION = ("flash", "efficient", "cudnn")
_PRODUCTS = {"fp8": "_scaled_mm", "int8": "_int_mm"}


def compile_graphs(
    bundle: Bundle, device: str, writer: EngineWriter, max_autotune: bool, progress: Progress
) -> None:
    """Compile a package for each graph into the engine's folder.

    Args:
        bundle: an opened bundle.
        device: torch device.
        writer: of the engine.
        max_autotune: see `AotInductorSettings`.
        progress: shows the progress of the work.

    Raises:
        BackendError: the compiler failed, or there is no space or no memory.
    """
    compiler = make_compiler_script(find_cpp_compiler())
    options = select_known_options(
        {**OPTIONS, "cpp.cxx": (None, compiler), "max_autotune": max_autotune}
    )
    with progress.stage("reading weights"):
        weights = TorchWeights(torch, bundle, device)
    tensors = weights.select(list(weights))
    try:
        for graph in bundle.manifest.graphs:
            with (
                _translate_errors(bundle),
                prefer_fused_attention(device),
                progress.stage(f"tracing {graph}"),
            ):
                program = program_from_bundle(bundle, graph, tensors, device)
            with (
                _translate_errors(bundle),
                prefer_fused_attention(device),
                progress.stage(f"compiling {graph}"),
            ):
                path = writer.folder / f"{graph}.pt2"
                aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
            writer.add_existing(path.name)
            del program
    finally:
        weights.release()


@contextlib.contextmanager
def prefer_fused_attention(device: str) -> Any:
    """Prefer fused attention on a GPU, and never one that writes out its scores.

    The order is cuDNN's, flash, then the memory-efficient one.
    """
    if device == "cpu":
        yield
        return
    kernels = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ]
    with (
        torch.cuda.device(device),
        torch.backends.cudnn.flags(allow_tf32=False),
        sdpa_kernel(kernels, set_priority=True),
    ):
        yield


@contextlib.contextmanager
def _translate_errors(bundle: Bundle) -> Any:
    """Turn the compiler's errors into a `BackendError` that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise BackendError(
            f"{bundle.path} cannot be compiled, out of memory: {reason} Leave --max-autotune out."
        ) from None
    except OSError as error:
        raise BackendError(
            f"{bundle.path} cannot be compiled: {error}. Make room, or choose the compiler's folder"
            " with TORCHINDUCTOR_CACHE_DIR."
        ) from None
    except (RuntimeError, AssertionError) as error:
        raise BackendError(
            f"{bundle.path} cannot be compiled ({type(error).__name__}): {_find_reason(str(error))}"
        ) from error


def _find_reason(message: str) -> str:
    """Return a C++ compiler's first complaint, or the beginning of a message that has none.

    Inductor writes the command first, which is a page long.
    """
    complaints = [line for line in message.splitlines() if "error:" in line]
    return " ".join((complaints[0] if complaints else message).split())[:600]


def summarize_package(bundle: Bundle, graph: str, package: Path) -> str:
    """Describe the calls of a package in words, read back from its code.

    Raises:
        BackendError: an attention that writes out its table of scores.
    """
    calls = count_calls(package)
    fused = sum(
        count
        for name, count in calls.items()
        if "attention" in name and any(kind in name for kind in _ATTENTION)
    )
    layers = bundle.manifest.architecture.num_layers
    expected = 2 * {"text": 0, "compress": layers - 1}.get(graph, layers)
    if fused != expected:
        raise BackendError(
            f"{fused} of {expected} attentions of {graph} became one operator; the others would"
            f" need memory for every pair of tokens. Calls: {dict(calls)}. Please report this with"
            " the output of python -m torch.utils.collect_env."
        )
    summary = f"{fused} of {expected} attentions fused"
    product = _PRODUCTS.get(bundle.manifest.precision)
    return (
        summary
        if product is None
        else (
            f"{summary}, {sum(n for name, n in calls.items() if product in name)} calls of"
            f" {product}"
        )
    )


def count_calls(package: Path) -> Counter[str]:
    """Count the calls of torch's operators in a package's wrapper."""
    with zipfile.ZipFile(package) as archive:
        sources = [
            archive.read(name).decode()
            for name in archive.namelist()
            if name.endswith("wrapper.cpp")
        ]
    return Counter(name for source in sources for name in _CALL.findall(source))
