"""Compile a bundle for the device this runs on.

    folder = build_engine(load_bundle("bundle"), "aotinductor", Settings(provider="cuda"))

A backend that compiles names its `BuildSettings` in its row of the registry. Their `build` fills a
folder that is written whole or not at all, and returns a `BuildResult`. This module holds the parts
that all builds share.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.bundle.manifest import AxisRange
from anyflow_deploy.engines.engine_folder import (
    ENGINES,
    DeviceRecord,
    EngineFolder,
    EngineRecord,
    EngineWriter,
)
from anyflow_deploy.engines.registry import BACKENDS, check_backend, check_provider, import_name
from anyflow_deploy.errors import AnyFlowError, BackendError
from anyflow_deploy.progress import NullProgress, Progress


@dataclass(frozen=True)
class BuildResult:
    """What the build of a backend returns; `EngineRecord` describes the fields."""

    device: DeviceRecord
    versions: dict[str, str]
    ranges: dict[str, AxisRange]
    profiles: dict[str, dict[str, dict[str, list[list[int]]]]] = dataclasses.field(
        default_factory=dict
    )
    achieved: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class BuildSettings:
    """The settings that every build takes.

    A backend adds fields of its own. Each field is a flag of `anyflow-build`.

    Attributes:
        provider: "cpu" or "cuda".
        device: which GPU, counted from 0.
    """

    provider: str = "cpu"
    device: int = 0

    @property
    def label(self) -> str:
        """What tells engines of one bundle and backend apart: part of the folder's default name."""
        return self.provider

    def check(self, bundle: Bundle) -> None:
        """Refuse what cannot be built, before any work starts.

        Raises:
            AnyFlowError: with the reason.
        """
        check_provider(self.provider)

    def build(self, bundle: Bundle, writer: EngineWriter, progress: Progress) -> BuildResult:
        """Write the engine's files through `writer`.

        Raises:
            BackendError: the device, or the compiler, refuses.
        """
        raise NotImplementedError


def settings_type(backend: str) -> type[BuildSettings]:
    """Return the class of a backend's build settings.

    Raises:
        AnyFlowError: an unknown backend, or one that needs no building.
    """
    check_backend(backend)
    place = BACKENDS[backend].build_settings
    if place is None:
        raise AnyFlowError(
            f"backend {backend!r} runs the bundle as it is; nothing has to be built."
        )
    return cast(type[BuildSettings], import_name(place))


def build_engine(
    bundle: Bundle,
    backend: str,
    settings: BuildSettings,
    destination: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> EngineFolder:
    """Build an engine folder for the device of this machine.

    Args:
        bundle: an opened bundle.
        backend: a backend that compiles.
        settings: of that backend, see `settings_type`.
        destination: folder to write; None for `BUNDLE/engines/BACKEND-LABEL`, where
            the label is the provider or, for tensorrt-rtx, the target.
        overwrite: replace an engine that is there.
        progress: shows the progress of the work.
        clock: seconds.

    Raises:
        AnyFlowError: refused settings, a destination that is taken or cannot be written, a failed
            build. Nothing is left.
    """
    settings.check(bundle)
    writer = EngineWriter(_prepare_destination(bundle, backend, settings, destination), overwrite)
    start_time = clock()
    with writer:
        result = settings.build(bundle, writer, progress or NullProgress())
        return writer.finish(
            EngineRecord(
                backend=backend,
                bundle=bundle.digest,
                device=result.device,
                versions={
                    "anyflow-deploy": importlib.metadata.version("anyflow-deploy"),
                    **result.versions,
                },
                settings=dataclasses.asdict(settings),
                ranges=result.ranges,
                profiles=result.profiles,
                achieved=result.achieved,
                seconds=round(clock() - start_time, 3),
            )
        )


def _prepare_destination(
    bundle: Bundle, backend: str, settings: BuildSettings, destination: Path | None
) -> Path:
    """Return the destination; create the bundle's folder of engines where it lies in it."""
    parent = bundle.path / ENGINES
    if destination is not None and destination.parent != parent:
        return destination
    try:
        parent.mkdir(exist_ok=True)
    except OSError as error:
        raise BackendError(
            f"{parent} cannot be created ({error.strerror}). Copy the bundle to where you may"
            " write, or give --output FOLDER."
        ) from None
    if not os.access(parent, os.W_OK):
        raise BackendError(
            f"{parent} cannot be written to. Copy the bundle to where you may write, or give"
            " --output FOLDER."
        )
    return destination or parent / f"{backend}-{settings.label}"
