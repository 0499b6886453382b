"""Builds with torch-tensorrt: the program of a bundle, for shapes up to the default video.

TensorRT takes a least, a usual and a largest shape, and plans memory for the largest; the bundle's
default video is both of the latter, since a declared range may have no end. Causal bundles are
refused: a stream begins with an empty cache, which is no shape for TensorRT here. So are eight
bits: this backend has no place for the bundle's scales.
"""

from __future__ import annotations

from dataclasses import dataclass

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.aotinductor.build import check_exporter
from anyflow_deploy.engines.build import BuildResult, BuildSettings
from anyflow_deploy.engines.engine_folder import EngineWriter, narrow_ranges
from anyflow_deploy.engines.torch_common.compat import find_cpp_compiler
from anyflow_deploy.engines.torch_common.device import (
    describe_device,
    runtime_versions,
    torch_device,
)
from anyflow_deploy.engines.torch_tensorrt.engine import (
    import_cuda_torch,
    import_torch_tensorrt,
    package_versions,
)
from anyflow_deploy.errors import BackendError
from anyflow_deploy.progress import Progress
from anyflow_deploy.shape_ranges import Range

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class TorchTensorRTSettings(BuildSettings):
    """The settings of a torch-tensorrt build."""

    provider: str = "cuda"

    def check(self, bundle: Bundle) -> None:
        """Refuse a bundle or a machine that torch-tensorrt cannot build on.

        Raises:
            BackendError: with what to install or to choose.
        """
        super().check(bundle)
        if bundle.manifest.kind == "causal":
            raise BackendError(
                f"{bundle.path} is causal, and torch-tensorrt takes no empty cache. Use backend"
                " tensorrt or aotinductor."
            )
        if bundle.manifest.quantization is not None:
            raise BackendError(
                f"{bundle.path} is {bundle.manifest.precision}, and this backend takes fp32, fp16"
                " and bf16. Use backend tensorrt, onnxruntime or aotinductor."
            )
        import_cuda_torch(self.provider, self.device)
        import_torch_tensorrt()
        check_exporter()
        find_cpp_compiler()

    def build(self, bundle: Bundle, writer: EngineWriter, progress: Progress) -> BuildResult:
        """Compile the package of the bundle's transition."""
        from anyflow_deploy.engines.torch_tensorrt.compiler import build_package

        torch = import_cuda_torch(self.provider, self.device)
        device = torch_device(self.provider, self.device)
        axis_ranges = profile_ranges(bundle)
        shapes = input_profile(bundle)
        achieved = build_package(
            import_torch_tensorrt(), bundle, device, axis_ranges, shapes, writer, progress
        )
        return BuildResult(
            describe_device(torch, self.provider, self.device),
            {**runtime_versions(torch, self.provider), **package_versions()},
            narrow_ranges(bundle, **axis_ranges),
            profiles={
                "transition": {
                    "shapes": {
                        name: [list(shape) for shape in bounds] for name, bounds in shapes.items()
                    }
                }
            },
            achieved=achieved,
        )


def profile_ranges(bundle: Bundle) -> dict[str, Range]:
    """Return each axis's range, from its least size to that of the bundle's default video."""
    manifest, video = bundle.manifest, bundle.manifest.video
    largest = {
        "batch": manifest.shape_ranges.batch.nearest(1),
        "frames": (video.frames - 1) // video.temporal_factor + 1,
        "height": video.height // video.spatial_factor,
        "width": video.width // video.spatial_factor,
        "text": video.text_tokens,
    }
    ranges = vars(manifest.shape_ranges)
    return {
        axis: Range(ranges[axis].minimum, size, ranges[axis].multiple)
        for axis, size in largest.items()
    }


def input_profile(bundle: Bundle) -> dict[str, Shapes]:
    """Return the least, usual and largest shape of each input, by name."""
    ranges = profile_ranges(bundle)
    low, high = (
        {axis: getattr(r, end) for axis, r in ranges.items()} for end in ("minimum", "maximum")
    )
    return {
        tensor.name: (
            _resolve_shape(tensor.shape, low),
            _resolve_shape(tensor.shape, high),
            _resolve_shape(tensor.shape, high),
        )
        for tensor in bundle.manifest.graphs["transition"].inputs
    }


def _resolve_shape(shape: list[int | str], sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in shape)
