"""torch-tensorrt: TensorRT for the parts it supports, and AOTInductor around it.

The result is a `.pt2` package like AOTInductor's and runs in the same class; TensorRT's engines,
weights included, lie in it. NVIDIA GPUs only. **Not run yet**: it is written against torch-tensorrt
2.14, whose signatures a test compares.
"""

from __future__ import annotations

import importlib
from typing import Any

from anyflow_deploy.engines.aotinductor.package_engine import PackageEngine
from anyflow_deploy.engines.registry import BACKENDS, EngineOptions
from anyflow_deploy.engines.torch_common.device import import_torch, runtime_versions
from anyflow_deploy.errors import BackendError

INSTALL_COMMAND = BACKENDS["torch-tensorrt"].install_command("cuda")


class TorchTensorRTEngine(PackageEngine):
    """An engine whose packages hold TensorRT's engines and their weights.

    Args:
        bundle: an opened bundle.
        options: a GPU, and which engine.

    Raises:
        BackendError: torch, torch-tensorrt or the GPU is missing, nothing was built, or it was
            built elsewhere.
    """

    backend = "torch-tensorrt"
    title = "torch-tensorrt"

    def _import_torch(self, options: EngineOptions) -> Any:
        torch = import_cuda_torch(options.provider, options.device)
        import_torch_tensorrt()  # registers the operator that runs an engine inside a package
        return torch

    def _required_versions(self) -> dict[str, str]:
        return {**runtime_versions(self._torch, self.provider), **package_versions()}


def import_cuda_torch(provider: str, index: int) -> Any:
    """Import torch, and check that it has the GPU.

    Raises:
        BackendError: another provider, no torch, no GPU.
    """
    if provider != "cuda":
        raise BackendError(
            f"torch-tensorrt runs on NVIDIA GPUs only; provider is {provider!r}. Give cuda, or"
            " backend aotinductor."
        )
    return import_torch(provider, index)


def import_torch_tensorrt() -> Any:
    """Import torch_tensorrt.

    Raises:
        BackendError: it, or TensorRT, is missing, or was built for another torch.
    """
    try:
        return importlib.import_module("torch_tensorrt")
    except (
        ImportError,
        OSError,
        RuntimeError,
        AttributeError,
    ) as error:  # a library of another CUDA or torch, too
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackendError(
            f"torch-tensorrt cannot be imported ({reason}). It has to be of the same release as"
            f" torch. Run: {INSTALL_COMMAND}"
        ) from None


def package_versions() -> dict[str, str]:
    """Return the package versions that have to be the same when a package is loaded."""
    import tensorrt  # type: ignore[import-not-found, unused-ignore]  # only where torch-tensorrt is

    return {
        "torch-tensorrt": str(import_torch_tensorrt().__version__),
        "TensorRT": str(tensorrt.__version__),
    }
