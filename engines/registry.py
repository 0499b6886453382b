"""Find the backend that runs a bundle.

`BACKENDS` is the whole registry: one row for each backend says all that the rest of the project has
to know about it. Commands, builds, the doctor and the profiler read their part there. A backend's
modules are imported only when that backend is loaded, so a device needs the runtime of the one it
uses and no other. This module imports nothing but errors, so that the doctor can read it where a
runtime is missing or broken.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anyflow_deploy.errors import AnyFlowError, BackendError, suggestion

if TYPE_CHECKING:  # these modules need numpy and pydantic
    from anyflow_deploy.bundle.bundle import Bundle
    from anyflow_deploy.engines.engine import BundleEngine
    from anyflow_deploy.progress import Progress

PROVIDERS = ("cpu", "cuda")

KERNEL_SPECIALIZATIONS = ("lazy", "eager", "none")
"""When TensorRT for RTX compiles kernels for one shape: in the background, while a general kernel
runs; before the first run; or never."""


@dataclass(frozen=True)
class Backend:
    """One row of the registry.

    Attributes:
        name: what `--backend` takes, and the folder's name with `-` for `_`.
        engine: module:class of the engine, which is made from `(bundle, options)`.
        packages: what pip installs, by provider. Other providers are refused.
        build_settings: module:class of the settings of a build; None: it runs the bundle as it is.
        probes: names of the doctor's probes that have to pass on every provider.
        gpu_probes: further probes that have to pass on a GPU.
        quantized: whether it runs the eight-bit precisions.
        profiled_providers: providers on which its `profiler.py` times layers.
        specializes_kernels: whether it takes `EngineOptions.kernel_specialization`.
    """

    name: str
    engine: str
    packages: Mapping[str, str]
    build_settings: str | None = None
    probes: tuple[str, ...] = ()
    gpu_probes: tuple[str, ...] = ()
    quantized: bool = True
    profiled_providers: tuple[str, ...] = ()
    specializes_kernels: bool = False

    @property
    def gpu_only(self) -> bool:
        """Whether it runs on NVIDIA GPUs only."""
        return "cpu" not in self.packages

    @property
    def default_provider(self) -> str:
        """The provider when the caller names none: the CPU where the backend has one."""
        return "cuda" if self.gpu_only else "cpu"

    def install_command(self, provider: str) -> str:
        """Return the shell command that installs the runtime."""
        return f"pip install '{self.packages[provider]}'"


BACKENDS = {
    row.name: row
    for row in (
        Backend(
            "onnxruntime",
            "anyflow_deploy.engines.onnxruntime.engine:OnnxRuntimeEngine",
            {"cpu": "anyflow-deploy[cpu]", "cuda": "anyflow-deploy[gpu]"},
            probes=("ONNX Runtime",),
            gpu_probes=("ONNX Runtime on CUDA",),
            profiled_providers=("cpu",),
        ),
        Backend(
            "tensorrt",
            "anyflow_deploy.engines.tensorrt.engine:TensorRTEngine",
            {"cuda": "anyflow-deploy[tensorrt]"},
            "anyflow_deploy.engines.tensorrt.build.settings:TensorRTSettings",
            probes=("TensorRT", "cuda-python"),
            profiled_providers=("cuda",),
        ),
        Backend(
            "tensorrt-rtx",
            "anyflow_deploy.engines.tensorrt_rtx.engine:TensorRTRtxEngine",
            {"cuda": "anyflow-deploy[tensorrt-rtx]"},
            "anyflow_deploy.engines.tensorrt_rtx.settings:TensorRTRtxSettings",
            probes=("TensorRT for RTX", "cuda-python"),
            profiled_providers=("cuda",),
            specializes_kernels=True,
        ),
        Backend(
            "aotinductor",
            "anyflow_deploy.engines.aotinductor.engine:AotInductorEngine",
            {"cpu": "anyflow-deploy[aotinductor]", "cuda": "anyflow-deploy[aotinductor]"},
            "anyflow_deploy.engines.aotinductor.build:AotInductorSettings",
            probes=("PyTorch", "C++ compiler"),
            gpu_probes=("CUDA headers",),
        ),
        Backend(
            "torch-tensorrt",
            "anyflow_deploy.engines.torch_tensorrt.engine:TorchTensorRTEngine",
            {"cuda": "anyflow-deploy[torch-tensorrt]"},
            "anyflow_deploy.engines.torch_tensorrt.build:TorchTensorRTSettings",
            probes=("PyTorch", "torch-tensorrt"),
            quantized=False,
        ),
    )
}

DEFAULT_BACKEND = next(iter(BACKENDS))
"""The backend when the caller names none: the one that runs on every machine."""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is to run; every backend takes these.

    Attributes:
        provider: "cpu" or "cuda"; there is no fallback from one to the other.
        device: which GPU, counted from 0.
        threads: CPU threads; None for as many as there are physical cores.
        engine: name or path of a built engine, for backends that compile; None where the bundle has
            only one.
        cuda_graphs: record a step once for each shape and replay it, where the backend can.
        kernel_specialization: one of `KERNEL_SPECIALIZATIONS`, for backends that specialize
            kernels; None for "lazy" there, and the only value for all others.
        progress: where long work at the opening is shown.
    """

    provider: str = "cpu"
    device: int = 0
    threads: int | None = None
    engine: str | Path | None = None
    cuda_graphs: bool = True
    kernel_specialization: str | None = None
    progress: Progress | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_provider(self.provider)
        if self.device < 0:
            raise AnyFlowError(f"device is {self.device}; allowed are whole numbers from 0.")
        if self.threads is not None and self.threads < 1:
            raise AnyFlowError(f"threads is {self.threads}; allowed are whole numbers from 1.")
        if self.kernel_specialization not in (None, *KERNEL_SPECIALIZATIONS):
            raise AnyFlowError(
                f"kernel specialization is {self.kernel_specialization!r}; allowed are"
                f" {', '.join(KERNEL_SPECIALIZATIONS)}."
            )


def backend_of(engine: object) -> str:
    """Return the name of the backend that made an engine.

    Raises:
        AnyFlowError: no backend of the registry makes engines of this class.
    """
    home = f"{type(engine).__module__}:{type(engine).__qualname__}"
    for name, row in BACKENDS.items():
        if row.engine == home:
            return name
    raise AnyFlowError(f"{home} is no engine of a backend; known are {', '.join(BACKENDS)}.")


def load_engine(
    bundle: Bundle | str | Path,
    backend: str = DEFAULT_BACKEND,
    provider: str | None = None,
    threads: int | None = None,
    *,
    device: int = 0,
    engine: str | Path | None = None,
    cuda_graphs: bool = True,
    kernel_specialization: str | None = None,
    progress: Progress | None = None,
) -> BundleEngine:
    """Make an engine from a bundle.

    Args:
        bundle: from `load_bundle`, or the folder (all hashes are then verified).
        backend: a name in `BACKENDS`. All but onnxruntime need an engine built on this machine:
            `anyflow-build`.
        provider: "cpu" or "cuda"; None for cuda with a backend that runs on GPUs only, cpu with all
            others.
        threads, device, engine, cuda_graphs, kernel_specialization, progress: see `EngineOptions`.

    Raises:
        BackendError: the backend or provider is not installed, cannot run the bundle's precision,
            or has no built engine; or an engine is named for a backend that has none, or an option
            is given that it does not take.
    """
    from anyflow_deploy.bundle.bundle import Bundle, load_bundle

    check_backend(backend)
    row = BACKENDS[backend]
    # Otherwise the engine that the caller names would silently not be the one that runs
    if engine is not None and row.build_settings is None:
        others = ", ".join(name for name, other in BACKENDS.items() if other.build_settings)
        raise BackendError(
            f"the engine {str(engine)!r} cannot run with backend {backend}, which runs the bundle"
            f" itself. Name the backend that built it, one of {others}, or leave the engine out."
        )
    check_kernel_specialization(backend, kernel_specialization)
    options = EngineOptions(
        provider or row.default_provider,
        device,
        threads,
        engine,
        cuda_graphs,
        kernel_specialization,
        progress,
    )
    loaded_bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    return cast("BundleEngine", import_name(row.engine)(loaded_bundle, options))


def import_name(place: str) -> Any:
    """Import an object that a row names as `module:name`."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def check_provider(provider: str) -> None:
    """Refuse an unknown provider.

    Raises:
        AnyFlowError: with the known ones.
    """
    if provider not in PROVIDERS:
        raise AnyFlowError(f"unknown provider {provider!r}: allowed are {', '.join(PROVIDERS)}.")


def check_kernel_specialization(backend: str, specialization: str | None) -> None:
    """Refuse `kernel_specialization` for a backend that has no such kernels.

    Args:
        backend: a name in `BACKENDS`.
        specialization: what was given; None: nothing.

    Raises:
        BackendError: with the backends that take it.
    """
    if specialization is not None and not BACKENDS[backend].specializes_kernels:
        able = ", ".join(name for name, row in BACKENDS.items() if row.specializes_kernels)
        raise BackendError(
            f"kernel specialization means nothing to backend {backend}; it is an option of {able}."
            " Leave it out."
        )


def check_backend(backend: str) -> None:
    """Refuse an unknown backend.

    Raises:
        AnyFlowError: with the nearest known one.
    """
    if backend not in BACKENDS:
        raise AnyFlowError(
            f"unknown backend {backend!r}: this version has"
            f" {', '.join(BACKENDS)}.{suggestion(backend, BACKENDS)}"
        )
