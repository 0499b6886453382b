"""Find the backend that runs a bundle.

`BACKENDS` is the whole registry: a name, and the module and class that make the engine. A module is imported only when
its backend is asked for, so a device needs the runtime of the one it uses and no other. Backends that compile have a
second entry, in `build.BUILDERS`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from anyflow_deploy.bundle.bundle import Bundle, load_bundle
from anyflow_deploy.engines.engine import BundleEngine
from anyflow_deploy.errors import AnyFlowError, BackendError, suggestion

BACKENDS = {
    "onnxruntime": "anyflow_deploy.engines.onnxruntime.engine:OnnxRuntimeEngine",
    "aotinductor": "anyflow_deploy.engines.aotinductor.engine:AotInductorEngine",
    "torch-tensorrt": "anyflow_deploy.engines.torch_tensorrt.engine:TorchTensorRTEngine",
    "tensorrt": "anyflow_deploy.engines.tensorrt.engine:TensorRTEngine",
}

PROVIDERS = ("cpu", "cuda")

ON_GPUS_ONLY = ("tensorrt", "torch-tensorrt")
"""Backends whose provider is cuda when nobody says; for all others it is cpu."""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is to run; every backend takes these.

    Attributes:
        provider: "cpu" or "cuda"; there is no fallback from one to the other.
        device: which GPU, counted from 0.
        threads: CPU threads; None for as many as there are physical cores.
        engine: name or path of a built engine, for backends that compile; None where the bundle has only one.
        cuda_graphs: record a step once for each shape and replay it, where the backend can.
    """

    provider: str = "cpu"
    device: int = 0
    threads: int | None = None
    engine: str | Path | None = None
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        check_provider(self.provider)
        if self.device < 0:
            raise AnyFlowError(f"device is {self.device}; allowed are whole numbers from 0.")
        if self.threads is not None and self.threads < 1:
            raise AnyFlowError(f"threads is {self.threads}; allowed are whole numbers from 1.")


def load_engine(
    bundle: Bundle | str | Path,
    backend: str = "onnxruntime",
    provider: str | None = None,
    threads: int | None = None,
    *,
    device: int = 0,
    engine: str | Path | None = None,
    cuda_graphs: bool = True,
) -> BundleEngine:
    """Make an engine from a bundle.

    Args:
        bundle: from `load_bundle`, or the folder (all hashes are then verified).
        backend: a name in `BACKENDS`. All but onnxruntime need an engine built on this machine: `anyflow-build`.
        provider: "cpu" or "cuda"; None for cuda with a backend that knows nothing else, cpu with all others.
        threads, device, engine, cuda_graphs: see `EngineOptions`.

    Raises:
        BackendError: the backend or provider is not installed, cannot run the bundle's precision, or has no built engine;
            or an engine is named for a backend that has none.
    """
    check_backend(backend)
    if engine is not None and backend == "onnxruntime":  # or the engine asked for would silently not be the one that runs
        raise BackendError(
            f"the engine {str(engine)!r} was built by another backend than onnxruntime, which runs the bundle itself: name that, "
            f"one of {', '.join(name for name in BACKENDS if name != backend)}, or leave the engine out."
        )
    provider = provider or ("cuda" if backend in ON_GPUS_ONLY else "cpu")
    options = EngineOptions(provider, device, threads, engine, cuda_graphs)
    module, name = BACKENDS[backend].split(":")
    make = getattr(importlib.import_module(module), name)
    opened = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    return cast(BundleEngine, make(opened, options))


def check_provider(provider: str) -> None:
    """Refuse an unknown name.

    Raises:
        AnyFlowError: with the known ones.
    """
    if provider not in PROVIDERS:
        raise AnyFlowError(f"unknown provider {provider!r}: allowed are {', '.join(PROVIDERS)}.")


def check_backend(backend: str) -> None:
    """Refuse an unknown name.

    Raises:
        AnyFlowError: with the nearest known one.
    """
    if backend not in BACKENDS:
        raise AnyFlowError(f"unknown backend {backend!r}: this version has {', '.join(BACKENDS)}.{suggestion(backend, BACKENDS)}")
