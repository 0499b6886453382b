"""The kernels that TensorRT for RTX compiled for an engine on this GPU, kept on disk: the next
opening reads them instead of compiling again.

One file for each engine, GPU, driver and release, in the user's cache folder. It begins with the
SHA-256 of the rest, so that a damaged file is found here and not by the library. A cache that
cannot be read or written costs time and nothing else: a warning, never an error.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from anyflow_deploy.bundle.atomic_io import write_bytes_atomically
from anyflow_deploy.engines.engine_folder import EngineFolder
from anyflow_deploy.engines.tensorrt.api import LIBRARY, VERSION, trt
from anyflow_deploy.engines.tensorrt.cuda import CudaDevice
from anyflow_deploy.engines.tensorrt.user_cache import user_cache_file

_log = logging.getLogger("anyflow_deploy.tensorrt")
_DIGEST_BYTES = 32


def kernel_file(folder: EngineFolder, device: CudaDevice) -> Path:
    """Return where the kernels of an engine on a GPU are kept.

    Args:
        folder: the engine.
        device: the GPU.
    """
    capability = "{}.{}".format(*device.compute_capability)
    name = f"{capability}-cuda{device.driver_version}-{VERSION}-{folder.digest[:16]}.kernels"
    return user_cache_file(LIBRARY.backend, device.name, name)


class RuntimeCache:
    """The kernels of one engine. Any thread may use it.

    Args:
        path: the file; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._digest = b""
        self._config: trt.IRuntimeConfig | None = None
        self._cache: trt.IRuntimeCache | None = None

    def open(self, engine: trt.ICudaEngine) -> bool:
        """Read what is on disk; once, before `attach`.

        Args:
            engine: any of those that share the cache.

        Returns:
            Whether there were kernels that can be used.
        """
        self._config = engine.create_runtime_config()  # kept: it made the cache
        self._cache = self._config.create_runtime_cache()
        content = self._read()
        if content is None:
            return False
        digest, kernels = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(kernels).digest() != digest:
            self._drop("is damaged")
        elif not self._cache.deserialize(kernels):
            self._drop(f"was refused by {LIBRARY.title}")
        else:
            self._digest = digest
            return True
        return False

    def attach(self, config: trt.IRuntimeConfig) -> None:
        """Let the contexts of a config use the kernels, and add those that they compile."""
        if not config.set_runtime_cache(self._cache):
            _log.warning("%s takes no runtime cache; it compiles again.", LIBRARY.title)

    def save(self) -> None:
        """Write the file, if kernels have come since it was read or written."""
        with self._lock:
            content = self._cache.serialize() if self._cache is not None else None
            if content is None:
                return
            # IHostMemory is a buffer, which its stub does not say
            kernels = bytes(memoryview(cast(Any, content)))
            digest = hashlib.sha256(kernels).digest()
            if digest == self._digest:
                return
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes_atomically(self.path, digest + kernels)
            except OSError as error:
                _log.warning(
                    "the compiled kernels could not be written to %s (%s); the next opening"
                    " compiles them again.",
                    self.path,
                    error,
                )
            else:
                self._digest = digest

    def _read(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("the compiled kernels in %s cannot be read (%s).", self.path, error)
            return None

    def _drop(self, fault: str) -> None:
        _log.warning("%s %s; it is dropped, and kernels are compiled again.", self.path, fault)
        with suppress(OSError):
            self.path.unlink()
