"""Settings of a build of plans, checked before the library is even imported.

    anyflow-build BUNDLE --backend tensorrt --shapes 480x832x81

`builder` does the work. docs/how-to/tensorrt.md explains every setting.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.build import BuildResult, BuildSettings
from anyflow_deploy.engines.engine_folder import EngineWriter
from anyflow_deploy.engines.tensorrt.build.optimization_profiles import (
    Profile,
    default_video_shape,
    is_bounded,
    parse_video_shape,
    profiles,
)
from anyflow_deploy.engines.tensorrt.library import choose_library
from anyflow_deploy.errors import AnyFlowError, BackendError, suggestion
from anyflow_deploy.progress import Progress

if TYPE_CHECKING:
    from anyflow_deploy.engines.tensorrt.build.build_device import BuildDevice

HARDWARE = ("ampere+", "same-capability")
"""What a plan can be made compatible with: every GPU from compute capability 8.0 on, or every one
of the same capability."""


@dataclass(frozen=True)
class PlanSettings(BuildSettings):
    """What every build of plans can be asked for.

    Attributes:
        shapes: video sizes to build for, as in "480x832x81"; empty for the declared ranges, or,
            where they have no end, the bundle's own size.
        range_profile: cover the declared ranges beside named shapes.
        refit: weights can be replaced in the built engine.
        strip: the plan holds no weights; they are read from the bundle when the engine is opened.
        weight_streaming: weights may stay in host memory and come to the GPU as they are needed;
            slow.
        allow_fallback: keep an engine in which eight-bit layers run in a wider type.
    """

    backend: ClassVar[str] = "tensorrt"
    """Name in the registry."""

    provider: str = "cuda"
    shapes: tuple[str, ...] = ()
    range_profile: bool = False
    refit: bool = False
    strip: bool = False
    weight_streaming: bool = False
    allow_fallback: bool = False

    def check(self, bundle: Bundle) -> None:
        """Refuse settings that cannot be built; see `BuildSettings.check`."""
        super().check(bundle)
        if self.provider != "cuda":
            raise BackendError(
                f"TensorRT runs on NVIDIA GPUs only; provider is {self.provider!r}. Leave it out,"
                " or give cuda."
            )
        if self.strip and self.weight_streaming:
            raise AnyFlowError(
                "--strip and --weight-streaming exclude each other here: a stripped plan is"
                " refitted on the GPU."
            )
        self.profiles(bundle)

    def profiles(self, bundle: Bundle) -> dict[str, list[Profile]]:
        """Return the optimization profiles of every graph.

        Raises:
            AnyFlowError: shapes that are not sizes, or outside the bundle's ranges.
        """
        manifest = bundle.manifest
        video_shapes = [parse_video_shape(text, manifest) for text in dict.fromkeys(self.shapes)]
        ranges = self.range_profile or (not video_shapes and is_bounded(manifest))
        if not video_shapes and not ranges:
            video_shapes = [default_video_shape(manifest)]
        return profiles(manifest, video_shapes, ranges)

    def choose_device(self) -> BuildDevice:
        """Return what the plans are built for.

        Raises:
            BackendError: there is no such device.
        """
        raise NotImplementedError

    def configure(self, config: Any, device: BuildDevice) -> None:
        """Set what only this library's builder config has.

        Args:
            config: TensorRT's IBuilderConfig.
            device: what the plans are built for.
        """

    def build(self, bundle: Bundle, writer: EngineWriter, progress: Progress) -> BuildResult:
        """Build the plans into `writer`; see `BuildSettings.build`."""
        choose_library(self.backend)
        from anyflow_deploy.engines.tensorrt.build.builder import build_plans

        needed = 0 if self.strip else plan_bytes(bundle)
        free = shutil.disk_usage(writer.folder).free
        if free < needed:
            raise BackendError(
                f"{writer.folder.parent} has {free / 1e9:.1f} GB free, and the plans take about"
                f" {needed / 1e9:.1f} GB. Make room, give --output FOLDER, or build without weights"
                " in the plan: --strip."
            )
        return build_plans(self, bundle, writer, progress)


@dataclass(frozen=True)
class TensorRTSettings(PlanSettings):
    """What a build by TensorRT can be asked for, beside `PlanSettings`.

    Attributes:
        workspace: gigabytes that a layer may use for scratch; None for TensorRT's own limit, the
            whole device.
        optimization_level: 0 (fast to build) to 5 (tries most); None for TensorRT's default, 3.
        version_compatible: the plan also runs on later TensorRT releases of the same major version.
        hardware_compatible: one of `HARDWARE`; None for this GPU alone.
        timing_cache: file of measured kernel times; None for the user's cache folder.
    """

    workspace: float | None = None
    optimization_level: int | None = None
    version_compatible: bool = False
    hardware_compatible: str | None = None
    timing_cache: str | None = None

    def check(self, bundle: Bundle) -> None:
        """Refuse settings that cannot be built; see `BuildSettings.check`."""
        level = self.optimization_level
        if level is not None and not 0 <= level <= 5:
            raise AnyFlowError(
                f"--optimization-level is {level}; allowed are 0 (fast to build) to 5 (tries most)."
            )
        if self.workspace is not None and self.workspace <= 0:
            raise AnyFlowError(f"--workspace is {self.workspace}; allowed are gigabytes above 0.")
        compatibility = self.hardware_compatible
        if compatibility is not None and compatibility not in HARDWARE:
            raise AnyFlowError(
                f"--hardware-compatible is {compatibility!r}; allowed are {', '.join(HARDWARE)}."
                f"{suggestion(compatibility, HARDWARE)}"
            )
        super().check(bundle)

    def choose_device(self) -> BuildDevice:
        """Return the GPU at hand: TensorRT builds for no other."""
        from anyflow_deploy.engines.tensorrt.build.build_device import BuildDevice

        return BuildDevice.from_index(self.device)

    def configure(self, config: Any, device: BuildDevice) -> None:
        """Set scratch memory, optimization level and compatibility."""
        from anyflow_deploy.engines.tensorrt.build.builder_config import configure_tensorrt

        configure_tensorrt(config, self)


def plan_bytes(bundle: Bundle) -> int:
    """Return about how many bytes the plans of a bundle take: its weights, in each large graph."""
    weights = sum(bundle.manifest.achieved.weight_bytes.values())
    return weights * sum(graph != "text" for graph in bundle.manifest.graphs)
