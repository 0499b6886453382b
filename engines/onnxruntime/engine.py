"""The ONNX Runtime engine.

One session serves every run. A run keeps its buffers on the provider's device (`IOBinding`): a step
writes z_r into a second buffer and the two are exchanged, so nothing is copied to the device but
two small arrays of times. The CPU and CUDA providers share this code; CUDA has not been run by us
yet (see the README's table).

The provider is the caller's choice and is never replaced by another: ONNX Runtime itself falls back
to the CPU with a warning, and a server would be a hundred times slower without an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import io
from typing import Any

from numpy.typing import ArrayLike

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.engines.engine import BundleEngineBase
from anyflow_deploy.engines.kv_cache import CachePlan
from anyflow_deploy.engines.onnxruntime.device import OrtDevice
from anyflow_deploy.engines.onnxruntime.graph_rewrites import build_session_graph
from anyflow_deploy.engines.onnxruntime.int8 import saturates
from anyflow_deploy.engines.onnxruntime.kv_cache import OnnxRuntimeCache
from anyflow_deploy.engines.onnxruntime.run import OnnxRuntimeRun
from anyflow_deploy.engines.registry import BACKENDS, EngineOptions
from anyflow_deploy.engines.streaming import CacheStream
from anyflow_deploy.errors import BackendError, UnavailableError, reraise_interrupt
from anyflow_deploy.targets import CPU_HAS_NO_BF16

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ROW = BACKENDS["onnxruntime"]


class OnnxRuntimeEngine(BundleEngineBase):
    """An engine that runs a bundle's graphs in ONNX Runtime sessions.

    Args:
        bundle: an opened bundle.
        options: provider, device and threads.

    Raises:
        UnavailableError: ONNX Runtime or the provider is missing, or has no kernels for the
            bundle's precision.
        BackendError: ONNX Runtime refuses the bundle.
    """

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        super().__init__(bundle)
        self.provider = provider = options.provider
        self._index = options.device if provider == "cuda" else 0
        self._runtime = _import_runtime(provider)
        if bundle.manifest.base == "bf16" and provider == "cpu":
            raise UnavailableError(
                f"{bundle.path} is {bundle.manifest.base}, and {CPU_HAS_NO_BF16}. "
                "Use provider 'cuda', or export with --precision fp32 or fp16.",
                "--provider cuda",
            )
        int8_on_cpu = bundle.manifest.precision == "int8" and provider == "cpu"
        self._unsigned_weights = int8_on_cpu and saturates(self._runtime)
        self._sessions = {
            name: self._open_session(name, options.threads) for name in bundle.manifest.graphs
        }
        if self._unsigned_weights:
            _return_freed_memory()

    def _session_options(self, name: str, threads: int | None) -> Any:
        options = self._runtime.SessionOptions()
        options.log_severity_level = 3
        options.enable_mem_pattern = (
            False  # a second plan of the same memory: twice the activations, no faster
        )
        if threads is not None:
            options.intra_op_num_threads = threads
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.bundle.path.resolve())
        )
        # ONNX Runtime up to 1.31 fuses fp8 into integer operators, then fails with INVALID_GRAPH
        # (its issue 22269).
        if self.bundle.manifest.precision == "fp8":
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        return options

    def _open_session(self, name: str, threads: int | None) -> Any:
        return self._session_from_graph(self._session_graph(name), name, threads)

    def _session_graph(self, name: str) -> bytes:
        """A graph as this engine runs it, without weights."""
        attentions = _count_fusable_attentions(self.bundle.manifest, name)
        return build_session_graph(
            self.bundle, name, attentions, self.provider, self._unsigned_weights
        )

    def _session_from_graph(self, graph: bytes, name: str, threads: int | None) -> Any:
        options = self._session_options(name, threads)
        provider = (PROVIDERS[self.provider], _provider_options(self.provider, self._index))
        try:  # without enable_fallback=0, Python's wrapper answers an error by trying the CPU
            session = self._runtime.InferenceSession(
                graph, options, providers=[provider], enable_fallback=0
            )
        except Exception as error:  # ONNX Runtime's own exceptions have no common base
            message = f"ONNX Runtime could not open {self.bundle.path} on {provider[0]}: {error}"
            # The graph is valid, but an operator has no kernel for its types.
            if type(error).__name__ == "NotImplemented":
                raise UnavailableError(
                    message, "--provider cuda" if self.provider == "cpu" else ""
                ) from error
            raise BackendError(message) from error
        if session.get_providers()[0] != PROVIDERS[self.provider]:
            raise UnavailableError(
                f"ONNX Runtime could not start {PROVIDERS[self.provider]} and fell back to"
                f" {session.get_providers()[0]}. Install the CUDA and cuDNN it was built for (pip"
                " install 'onnxruntime-gpu[cuda,cudnn]'), or use provider 'cpu'."
            )
        return session

    @property
    def runtime(self) -> str:
        """ONNX Runtime's version and the provider, for people and reports."""
        return f"ONNX Runtime {self._runtime.__version__}, {self.provider}"

    def start(self, latents: ArrayLike, text: ArrayLike) -> OnnxRuntimeRun:
        """Open a run at latents (B, F, C, H, W) for text (B, L, D)."""
        z, prompt_embeds = self._prepare_run(latents, text)
        device = OrtDevice(self._runtime, self.provider, self._index)
        return OnnxRuntimeRun(
            device, self._sessions["transition"], z, {"text": device.upload(prompt_embeds)}
        )

    def open_stream(self, text: ArrayLike, plan: CachePlan) -> CacheStream:
        """Open a stream for text (1, L, D), with room for `plan.capacity` tokens."""
        prompt_embeds = self._prepare_stream(text)
        device = OrtDevice(self._runtime, self.provider, self._index)
        return CacheStream(
            OnnxRuntimeCache(device, self._sessions, self.bundle.manifest, prompt_embeds, plan),
            plan,
        )

    def close(self) -> None:
        """Release the sessions and refuse every later start."""
        super().close()
        self._sessions.clear()


def _return_freed_memory() -> None:
    """Return freed memory from glibc's allocator to the system; elsewhere do nothing.

    ONNX Runtime frees each shifted weight once it has packed it for its product. The allocator
    would keep up to a third of the weights' size of that (measured: 217 MB beside 713, 12 layers at
    1.3B width).
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _count_fusable_attentions(manifest: Manifest, graph: str) -> int:
    """Count the attentions of a graph that become one operator.

    There are two in each layer, self-attention and cross-attention to the text.

    Not those in FP8, which round between the products: only TensorRT fuses that, here it is
    emulated.
    """
    layers = manifest.architecture.num_layers
    count = {"text": 0, "compress": layers - 1}.get(graph, layers)
    if manifest.quantization is None or manifest.quantization.attention == "high":
        return 2 * count
    return sum(
        f"blocks.{n}.{kind}" in manifest.achieved.full_precision_layers
        for n in range(count)
        for kind in ("attn1", "attn2")
    )


def _provider_options(provider: str, index: int) -> dict[str, str]:
    """Return the provider's options, which turn TF32 off.

    TF32 is on by default in the CUDA provider: float32 products would silently keep 11 bits of
    mantissa.
    """
    return {"device_id": str(index), "use_tf32": "0"} if provider == "cuda" else {}


def _import_runtime(provider: str) -> Any:
    """Import onnxruntime, after checking that it is installed once and has the provider."""
    distributions = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(distributions) == 2:
        raise UnavailableError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files. "
            "Uninstall both, then install anyflow-deploy[cpu] or anyflow-deploy[gpu]."
        )
    try:
        import onnxruntime
    except ImportError as error:
        reraise_interrupt(error)
        raise UnavailableError(
            f"ONNX Runtime cannot be imported ({error}). Run: {_ROW.install_command(provider)}"
        ) from None
    providers = onnxruntime.get_available_providers()
    if PROVIDERS[provider] not in providers:
        raise UnavailableError(
            f"provider {provider!r} is not in this ONNX Runtime {onnxruntime.__version__}, which"
            f" has {', '.join(providers)}. Run: pip uninstall onnxruntime onnxruntime-gpu &&"
            f" {_ROW.install_command(provider)}"
        )
    if provider == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        # It finds CUDA where pip put it, and prints what it does not find.
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()
    return onnxruntime


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
