"""Builds for AOTInductor: one `.pt2` package for each graph of a bundle.

The network is rebuilt from the bundle (`export/program.py`), recorded with every declared axis
symbolic, and compiled for this device. The weights stay in the bundle, where all packages read
them: a package is native code, a few MB whatever the model, and the graphs of a causal bundle share
one copy in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.bundle.manifest import AxisRange
from anyflow_deploy.engines.build import BuildResult, BuildSettings
from anyflow_deploy.engines.engine_folder import EngineWriter, narrow_ranges
from anyflow_deploy.engines.torch_common.compat import check_packages_open, find_cpp_compiler
from anyflow_deploy.engines.torch_common.device import (
    describe_device,
    import_torch,
    runtime_versions,
    torch_device,
)
from anyflow_deploy.errors import BackendError
from anyflow_deploy.progress import Progress
from anyflow_deploy.shape_ranges import Range

_FP8_CAPABILITY = (8, 9)
"""Ada. Hopper is 9.0."""

_INT8_ROWS = 17
"""The fewest rows of an integer product in cuBLAS."""


@dataclass(frozen=True)
class AotInductorSettings(BuildSettings):
    """The settings of an AOTInductor build.

    Attributes:
        max_autotune: time several kernels for each product and keep the fastest; a build takes
            many times as long.
    """

    max_autotune: bool = False

    def check(self, bundle: Bundle) -> None:
        """Refuse a device, a precision or a machine without compiler, before any work starts.

        Raises:
            BackendError: with what to install or to choose.
        """
        super().check(bundle)
        torch = import_torch(self.provider, self.device)
        check_precision(torch, bundle, self.provider, self.device)
        check_exporter()
        find_cpp_compiler()

    def build(self, bundle: Bundle, writer: EngineWriter, progress: Progress) -> BuildResult:
        """Compile one package for each graph, and check that they open."""
        from anyflow_deploy.engines.aotinductor.compiler import compile_graphs, summarize_package

        torch = import_torch(self.provider, self.device)
        device = torch_device(self.provider, self.device)
        achieved: dict[str, Any] = {}
        compile_graphs(bundle, device, writer, self.max_autotune, progress)
        for graph in bundle.manifest.graphs:
            achieved[graph] = summarize_package(bundle, graph, writer.folder / f"{graph}.pt2")
        with progress.stage("opening the compiled packages"):
            index = self.device if self.provider == "cuda" else -1
            check_packages_open(
                [writer.folder / f"{graph}.pt2" for graph in bundle.manifest.graphs], index
            )
        return BuildResult(
            describe_device(torch, self.provider, self.device),
            runtime_versions(torch, self.provider),
            _buildable_ranges(bundle, self.provider),
            achieved=achieved,
        )


def check_precision(torch: Any, bundle: Bundle, provider: str, index: int) -> None:
    """Refuse a bundle whose precision the device cannot multiply in.

    Raises:
        BackendError: with what to do instead.
    """
    manifest = bundle.manifest
    if manifest.quantization is not None and manifest.quantization.attention == "fp8":
        raise BackendError(
            f"{bundle.path} has attention in fp8, and torch's fused attention takes 16 bits and"
            " more. Export with --attention high, or use backend tensorrt or onnxruntime."
        )
    if provider == "cuda" and manifest.precision == "fp8":
        capability = torch.cuda.get_device_capability(index)
        if capability < _FP8_CAPABILITY:
            raise BackendError(
                f"{bundle.path} is fp8, and {torch.cuda.get_device_name(index)} (compute capability"
                f" {capability[0]}.{capability[1]}) has no FP8 products: those begin with 8.9 (Ada,"
                " Hopper). Export int8 or bf16."
            )


def check_exporter() -> None:
    """Check that the exporter is installed, which rebuilds the network.

    Raises:
        BackendError: they are not installed.
    """
    try:
        import anyflow_deploy.export.trace  # noqa: F401
    except ImportError as error:
        raise BackendError(
            f"building needs the exporter ({error}). Run: pip install 'anyflow-deploy[export]'"
        ) from None


def _buildable_ranges(bundle: Bundle, provider: str) -> dict[str, AxisRange]:
    if bundle.manifest.precision != "int8" or provider != "cuda":
        return narrow_ranges(bundle)
    ranges = bundle.manifest.shape_ranges
    patch = bundle.manifest.architecture.patch_size[1]
    overrides = {"text": _raise_minimum(ranges.text, _INT8_ROWS)}
    side = (bundle.manifest.architecture.compressed_patch_size or (1, patch))[1]
    overrides |= {
        axis: _raise_minimum(getattr(ranges, axis), 5 * side) for axis in ("height", "width")
    }
    return narrow_ranges(bundle, **overrides)


def _raise_minimum(axis_range: Range, minimum: int) -> Range:
    """Raise a range's minimum to at least `minimum`, in the range's own multiples."""
    low = max(axis_range.minimum, -(-minimum // axis_range.multiple) * axis_range.multiple)
    return Range(low, axis_range.maximum, axis_range.multiple)
