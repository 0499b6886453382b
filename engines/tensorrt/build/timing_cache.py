"""The timing cache: how long each kernel took on this device, so that the next build need not try
it again.

One file for each kind of device and version of TensorRT, since times of another one mean nothing
(and TensorRT refuses them). It is read before a build and written after it, also when the build was
stopped or failed: what was measured until then is kept. It is replaced as a whole, and what another
build has written meanwhile is merged in. A cache that cannot be read or written costs time and
nothing else: a warning, never an error.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from anyflow_deploy.bundle.atomic_io import write_bytes_atomically
from anyflow_deploy.engines.tensorrt.api import LIBRARY, VERSION, trt
from anyflow_deploy.engines.tensorrt.build.build_device import BuildDevice
from anyflow_deploy.engines.tensorrt.build.settings import PlanSettings, TensorRTSettings
from anyflow_deploy.engines.tensorrt.user_cache import user_cache_file

_log = logging.getLogger("anyflow_deploy.tensorrt")


def open_timing_cache(settings: PlanSettings, device: BuildDevice) -> TimingCache | None:
    """Return the cache of a build; None where the library times no kernels."""
    if not LIBRARY.times_kernels:
        return None
    path = settings.timing_cache if isinstance(settings, TensorRTSettings) else None
    default = user_cache_file(LIBRARY.backend, device.name, f"{VERSION}.timing")
    return TimingCache(Path(path) if path else default)


class TimingCache:
    """The cache of one file.

    Args:
        path: the file; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def attach(self, config: trt.IBuilderConfig) -> None:
        """Give a build what is known so far."""
        if not config.set_timing_cache(config.create_timing_cache(self._read()), False):
            _log.warning(
                "%s is of another device or TensorRT version; its times are not used.", self.path
            )
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def save(self, config: trt.IBuilderConfig) -> None:
        """Write what a build has measured, finished or not."""
        cache = config.get_timing_cache()
        if cache is None:
            return
        if other := self._read():
            cache.combine(config.create_timing_cache(other), False)
        # IHostMemory is a buffer, which its stub does not say
        content = bytes(memoryview(cast(Any, cache.serialize())))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomically(self.path, content)
        except OSError as error:
            _log.warning(
                "the timing cache could not be written to %s (%s); the next build measures again.",
                self.path,
                error,
            )

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            _log.warning("the timing cache %s cannot be read (%s).", self.path, error)
            return b""
