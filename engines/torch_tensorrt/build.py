"""Building with torch-tensorrt: the program of a bundle, for shapes up to the bundle's own video.

TensorRT wants a least, a usual and a largest shape, and plans memory for the largest; the bundle's default video is both of
the latter, since a declared range may have no end. Causal bundles are refused: a stream begins with an empty cache, which is
no shape for TensorRT here. So are eight bits: this way has no place for the bundle's scales.
"""

from __future__ import annotations

from dataclasses import dataclass

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.aotinductor.build import check_exporter
from anyflow_deploy.engines.build import BuildSettings, Built
from anyflow_deploy.engines.engine_folder import EngineWriter, ranges_of
from anyflow_deploy.engines.torch_common.compat import find_cpp_compiler
from anyflow_deploy.engines.torch_common.device import device_here, torch_device, versions_here
from anyflow_deploy.engines.torch_tensorrt.engine import imported_torch_tensorrt, runtime, versions
from anyflow_deploy.errors import BackendError
from anyflow_deploy.progress import Report
from anyflow_deploy.shape_ranges import Range

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class TorchTensorRTSettings(BuildSettings):
    """See `BuildSettings`."""

    provider: str = "cuda"

    def check(self, bundle: Bundle) -> None:
        """See `BuildSettings`."""
        super().check(bundle)
        if bundle.manifest.kind == "causal":
            raise BackendError(
                f"{bundle.path} is causal, and torch-tensorrt takes no empty cache. Use backend tensorrt or aotinductor."
            )
        if bundle.manifest.quantization is not None:
            raise BackendError(
                f"{bundle.path} is {bundle.manifest.precision}, and this backend takes fp32, fp16 and bf16. "
                "Use backend tensorrt, onnxruntime or aotinductor."
            )
        runtime(self.provider, self.device)
        imported_torch_tensorrt()
        check_exporter()
        find_cpp_compiler()

    def build(self, bundle: Bundle, writer: EngineWriter, report: Report) -> Built:
        """See `BuildSettings`."""
        from anyflow_deploy.engines.torch_tensorrt.compiler import built

        torch, device = runtime(self.provider, self.device), torch_device(self.provider, self.device)
        narrower, shapes = profile_ranges(bundle), profile(bundle)
        achieved = built(imported_torch_tensorrt(), bundle, device, narrower, shapes, writer, report)
        return Built(
            device_here(torch, self.provider, self.device),
            {**versions_here(torch, self.provider), **versions()},
            ranges_of(bundle, **narrower),
            profiles={"transition": {"shapes": {name: [list(shape) for shape in three] for name, three in shapes.items()}}},
            achieved=achieved,
        )


def profile_ranges(bundle: Bundle) -> dict[str, Range]:
    """Each axis from its least size to that of the bundle's own video."""
    manifest, video = bundle.manifest, bundle.manifest.video
    most = {
        "batch": manifest.shape_ranges.batch.nearest(1),
        "frames": (video.frames - 1) // video.temporal_factor + 1,
        "height": video.height // video.spatial_factor,
        "width": video.width // video.spatial_factor,
        "text": video.text_tokens,
    }
    declared = vars(manifest.shape_ranges)
    return {axis: Range(declared[axis].minimum, size, declared[axis].multiple) for axis, size in most.items()}


def profile(bundle: Bundle) -> dict[str, Shapes]:
    """Input name -> its least, usual and largest shape."""
    ranges = profile_ranges(bundle)
    low, high = ({axis: getattr(r, end) for axis, r in ranges.items()} for end in ("minimum", "maximum"))
    return {
        tensor.name: (_sized(tensor.shape, low), _sized(tensor.shape, high), _sized(tensor.shape, high))
        for tensor in bundle.manifest.graphs["transition"].inputs
    }


def _sized(shape: list[int | str], sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in shape)
