"""AOTInductor: the network compiled by torch's own compiler, ahead of time, for the device it runs on.

`anyflow-build BUNDLE --backend aotinductor` makes one package for each graph (`build`); this opens them. torch is
the runtime here, so unlike the other backends this one needs it on the device, though nothing of the exporter.

State, text and cache are tensors on the device from the first step to `read`; only times cross. On a GPU a bidirectional
step is recorded as a CUDA graph for each shape. (Chunks of a stream are not: their cache has another length each time.)

`threads` sets torch's number of threads, which is one for the whole process: the engine loaded last decides.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.aotinductor.compiled_graph import CompiledGraph, RecordedGraph
from anyflow_deploy.engines.aotinductor.kv_cache import AotInductorCache
from anyflow_deploy.engines.aotinductor.run import AotInductorRun
from anyflow_deploy.engines.engine import checked_inputs, checked_text
from anyflow_deploy.engines.engine_folder import EngineFolder, check_here, find_engine
from anyflow_deploy.engines.kv_cache import CachePlan
from anyflow_deploy.engines.registry import EngineOptions
from anyflow_deploy.engines.streaming import CacheStream
from anyflow_deploy.engines.torch_common.device import device_here, imported_torch, torch_device, versions_here
from anyflow_deploy.engines.torch_common.weights import TorchWeights
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.models import Architecture
from anyflow_deploy.shape_ranges import Ranges


class AotInductorEngine:
    """A bundle's graphs in AOTInductor packages.

    Args:
        bundle: an opened bundle.
        options: provider, device, threads, which engine, CUDA graphs.

    Raises:
        BackendError: torch or the device is missing, nothing was built, or it was built elsewhere.
    """

    BACKEND, TITLE = "aotinductor", "AOTInductor"

    BORROWS = True
    """Packages hold no weights, and are recorded as CUDA graphs."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        self.bundle = bundle
        self.provider = options.provider
        self._torch = torch = self._runtime(options)
        self._index = options.device if options.provider == "cuda" else -1
        self._device = torch_device(options.provider, options.device)
        self.folder = find_engine(bundle, self.BACKEND, options.engine)
        check_here(self.folder, device_here(torch, options.provider, options.device), self._versions())
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self._graphs = {
            name: CompiledGraph(torch, self._package(self.folder, name), self._index) for name in bundle.manifest.graphs
        }
        wanted = {name for graph in self._graphs.values() for name in graph.weights} if self.BORROWS else set()
        self._weights = TorchWeights(torch, bundle, self._device, wanted)
        for graph in self._graphs.values() if self.BORROWS else ():
            graph.take(self._weights)
        recording = self.BORROWS and options.cuda_graphs and options.provider == "cuda" and "transition" in self._graphs
        self._recorded = RecordedGraph(torch, self._graphs["transition"]) if recording else None

    def _runtime(self, options: EngineOptions) -> Any:
        return imported_torch(options.provider, options.device)

    def _versions(self) -> dict[str, str]:
        return versions_here(self._torch, self.provider)

    @staticmethod
    def _package(folder: EngineFolder, graph: str) -> Any:
        return folder.file(f"{graph}.pt2")

    @property
    def description(self) -> str:
        """See `Engine`."""
        version = str(self._torch.__version__).split("+")[0]
        return f"{self.TITLE}, torch {version}, {self.provider}, {self.bundle.manifest.precision}"

    @property
    def architecture(self) -> Architecture:
        """See `Engine`."""
        return self.bundle.manifest.architecture

    @property
    def ranges(self) -> Ranges:
        """See `Engine`."""
        return self.folder.record.shape_ranges

    def start(self, latents: ArrayLike, text: ArrayLike) -> AotInductorRun:
        """See `Engine`."""
        self._check_open()
        if "transition" not in self._graphs:
            raise AnyFlowError(f"{self.bundle.path} is a causal model, which is made chunk by chunk: use stream(), not sample().")
        a = self.architecture
        z, words = checked_inputs(self.ranges, a.in_channels, a.text_dim, latents, text)
        call, given = self._recorded or self._graphs["transition"], self._torch.from_numpy(words).to(self._device)
        return AotInductorRun(self._torch, lambda z, t, r: call(z, t, r, given), z, self._device)

    def open_stream(self, text: ArrayLike, plan: CachePlan) -> CacheStream:
        """See `BundleEngine`."""
        self._check_open()
        if "chunk" not in self._graphs:
            raise AnyFlowError(f"{self.bundle.path} is a bidirectional model: use sample(), not stream().")
        words = checked_text(self.ranges, self.architecture.text_dim, text)
        return CacheStream(AotInductorCache(self._torch, self._graphs, self._device, words, plan), plan)

    def close(self) -> None:
        """See `Engine`. Runs and streams that are still open can no longer step."""
        if self._recorded is not None:
            self._recorded.close()
        for graph in self._graphs.values():
            graph.close()
        self._graphs = {}
        self._weights.release()

    def _check_open(self) -> None:
        if not self._graphs:
            raise AnyFlowError("this engine is closed; load another with load_engine(bundle).")
