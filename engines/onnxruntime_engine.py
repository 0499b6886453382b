"""ONNX Runtime: the backend that works everywhere.

One session serves every run. A run keeps its buffers on the provider's device (`IOBinding`): a step writes z_r into a
second buffer and the two are exchanged, so nothing crosses to the device but two small arrays of times. The CPU and
CUDA providers share this code; CUDA has not been run by us yet (see the README's table).

The provider is the caller's choice and is never replaced by another: ONNX Runtime itself falls back to the CPU with a
warning, which on a server means a hundred times slower and nobody notices.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from anyflow_deploy.bundle import Bundle
from anyflow_deploy.engines.engine import Array, checked_inputs, frame_times
from anyflow_deploy.engines.onnxruntime_graph import graph_with_fused_attention
from anyflow_deploy.errors import AnyFlowError, BackendError
from anyflow_deploy.ranges import Ranges
from anyflow_deploy.targets import CPU_HAS_NO_BF16

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_PROVIDER_OPTIONS = {"cpu": {}, "cuda": {"use_tf32": "0"}}
"""TF32 is on by default in the CUDA provider: float32 products would keep 11 bits of mantissa, and say nothing."""
_PACKAGES = {"cpu": "anyflow-deploy[cpu]", "cuda": "anyflow-deploy[gpu]"}


class OnnxRuntimeEngine:
    """A bundle's transition in an ONNX Runtime session.

    Args:
        bundle: an opened bundle.
        provider: "cpu" or "cuda".
        threads: for operators on the CPU; None leaves it to ONNX Runtime.

    Raises:
        BackendError: ONNX Runtime or the provider is missing, or the provider lacks the bundle's precision.
    """

    def __init__(self, bundle: Bundle, provider: str = "cpu", threads: int | None = None) -> None:
        self.bundle = bundle
        self.provider = provider
        self._runtime = _imported(provider)
        if bundle.manifest.precision == "bf16" and provider == "cpu":
            raise BackendError(
                f"{bundle.path} is bf16, and {CPU_HAS_NO_BF16}. Use provider 'cuda', or export with --precision fp32 or fp16."
            )
        architecture = bundle.manifest.architecture
        self._channels, self._text_dim = architecture.in_channels, architecture.text_dim
        attentions = 2 * architecture.num_layers  # to itself and to the text
        graph = graph_with_fused_attention(bundle, "transition", architecture.num_attention_heads, attentions)
        self._session = self._opened_session(graph, threads)

    def _opened_session(self, graph: bytes, threads: int | None) -> Any:
        options = self._runtime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            if threads < 1:
                raise AnyFlowError(f"threads is {threads}; allowed are whole numbers from 1.")
            options.intra_op_num_threads = threads
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.bundle.path.resolve()))
        provider = (PROVIDERS[self.provider], _PROVIDER_OPTIONS[self.provider])
        try:  # without enable_fallback=0, Python's wrapper answers an error by trying the CPU
            session = self._runtime.InferenceSession(graph, options, providers=[provider], enable_fallback=0)
        except Exception as error:  # ONNX Runtime's own exceptions have no common base
            raise BackendError(f"ONNX Runtime could not open {self.bundle.path} on {provider[0]}: {error}") from error
        if session.get_providers()[0] != PROVIDERS[self.provider]:
            raise BackendError(
                f"ONNX Runtime could not start {PROVIDERS[self.provider]} and fell back to {session.get_providers()[0]}. "
                "Install the CUDA and cuDNN it was built for (pip install 'onnxruntime-gpu[cuda,cudnn]'), or use provider 'cpu'."
            )
        return session

    @property
    def description(self) -> str:
        """See `Engine`."""
        return f"ONNX Runtime {self._runtime.__version__}, {self.provider}, {self.bundle.manifest.precision}"

    @property
    def ranges(self) -> Ranges:
        """See `Engine`."""
        return self.bundle.manifest.shape_ranges

    def start(self, latents: ArrayLike, text: ArrayLike) -> OnnxRuntimeRun:
        """See `Engine`."""
        if self._session is None:
            raise AnyFlowError("this engine is closed; load another with load_engine(bundle).")
        z, words = checked_inputs(self.ranges, self._channels, self._text_dim, latents, text)
        return OnnxRuntimeRun(self._runtime, self._session, self.provider, z, words)

    def close(self) -> None:
        """See `Engine`."""
        self._session = None


class OnnxRuntimeRun:
    """One sample, in two buffers on the provider's device."""

    def __init__(self, runtime: Any, session: Any, device: str, latents: Array, text: Array) -> None:
        self._value = runtime.OrtValue
        self._session = session
        self._device = device
        self._shape = latents.shape
        self._state = self._on_device(latents)
        self._next = self._on_device(np.empty_like(latents))
        self._text = self._on_device(text)

    def step(self, t: ArrayLike, r: ArrayLike) -> None:
        """See `Run`."""
        self._run(t, r, "z_r", self._next)
        self._state, self._next = self._next, self._state

    def velocity(self, t: ArrayLike, r: ArrayLike) -> Array:
        """See `Run`."""
        self._run(t, r, "velocity", self._next)
        return _copied(self._next)

    def read(self) -> Array:
        """See `Run`."""
        self._check_open()
        return _copied(self._state)

    def close(self) -> None:
        """See `Run`."""
        self._state = self._next = self._text = None

    def __enter__(self) -> OnnxRuntimeRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run(self, t: ArrayLike, r: ArrayLike, output: str, buffer: Any) -> None:
        self._check_open()
        source, target = frame_times(t, r, self._shape)
        inputs = {"latents": self._state, "t": self._on_device(source), "r": self._on_device(target), "text": self._text}
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(output, buffer)
        self._session.run_with_iobinding(binding)

    def _check_open(self) -> None:
        if self._state is None:
            raise AnyFlowError("this run is closed; start another with engine.start(latents, text).")

    def _on_device(self, array: Array) -> Any:
        return self._value.ortvalue_from_numpy(array, self._device, 0)


def _copied(value: Any) -> Array:
    """An array that owns its memory: on the CPU, `numpy()` is a view of the run's buffer."""
    return np.array(value.numpy(), dtype=np.float32)


def _imported(provider: str) -> Any:
    """The onnxruntime module, having checked that it is there once and has the provider."""
    if provider not in PROVIDERS:
        raise AnyFlowError(f"unknown provider {provider!r}: allowed are {', '.join(PROVIDERS)}.")
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(installed) == 2:
        raise BackendError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files. "
            "Uninstall both, then install anyflow-deploy[cpu] or anyflow-deploy[gpu]."
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"ONNX Runtime cannot be imported ({error}). Run: pip install '{_PACKAGES[provider]}'") from None
    available = onnxruntime.get_available_providers()
    if PROVIDERS[provider] not in available:
        raise BackendError(
            f"provider {provider!r} is not in this ONNX Runtime {onnxruntime.__version__}, which has {', '.join(available)}. "
            f"Run: pip uninstall onnxruntime onnxruntime-gpu && pip install '{_PACKAGES[provider]}'"
        )
    if provider == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # finds CUDA where pip put it; prints what it does not find
            onnxruntime.preload_dlls()
    return onnxruntime


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
