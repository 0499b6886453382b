"""The engine that runs `.pt2` packages, for the two backends whose packages torch opens.

AOTInductor's packages and torch-tensorrt's are opened, called and closed alike. They differ in what
has to be imported, in the versions that have to be the same, and in where the weights are.

State, text and cache are tensors on the device from the first step to `read`; only times are copied
to it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from numpy.typing import ArrayLike

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.aotinductor.compiled_graph import CompiledGraph
from anyflow_deploy.engines.aotinductor.kv_cache import AotInductorCache
from anyflow_deploy.engines.aotinductor.run import AotInductorRun
from anyflow_deploy.engines.engine import BundleEngineBase
from anyflow_deploy.engines.engine_folder import check_compatible, find_engine
from anyflow_deploy.engines.kv_cache import CachePlan
from anyflow_deploy.engines.registry import EngineOptions
from anyflow_deploy.engines.streaming import CacheStream
from anyflow_deploy.engines.torch_common.device import describe_device, torch_device
from anyflow_deploy.shape_ranges import ShapeRanges

if TYPE_CHECKING:
    from torch import Tensor


class PackageEngine(BundleEngineBase):
    """An engine that runs a bundle's graphs in packages, one each.

    `threads` sets torch's number of threads, which is one for the whole process: the engine loaded
    last decides.

    Args:
        bundle: an opened bundle.
        options: provider, device, threads, which engine.

    Raises:
        BackendError: torch or the device is missing, nothing was built, or it was built elsewhere.
    """

    backend: ClassVar[str]
    """Name in the registry."""

    title: ClassVar[str]
    """Name in messages and reports."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        super().__init__(bundle)
        self.provider = options.provider
        self._torch = torch = self._import_torch(options)
        self._index = options.device if options.provider == "cuda" else -1
        self._device = torch_device(options.provider, options.device)
        self.folder = find_engine(bundle, self.backend, options.engine)
        this_device = describe_device(torch, options.provider, options.device)
        check_compatible(self.folder, this_device, self._required_versions())
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self._graphs = {}
        for name in bundle.manifest.graphs:
            package = self.folder.file(f"{name}.pt2")
            self._graphs[name] = CompiledGraph(torch, package, self._index)

    @abstractmethod
    def _import_torch(self, options: EngineOptions) -> Any:
        """Return torch, after importing everything that runs a package."""

    @abstractmethod
    def _required_versions(self) -> dict[str, str]:
        """Return the versions that have to be the same as when the engine was built."""

    def _transition(self) -> Callable[..., Sequence[Tensor]]:
        """Return the function that a step calls."""
        return self._graphs["transition"]

    @property
    def runtime(self) -> str:
        """Backend, torch's version and the provider, for people and reports."""
        version = str(self._torch.__version__).split("+")[0]
        return f"{self.title}, torch {version}, {self.provider}"

    @property
    def ranges(self) -> ShapeRanges:
        """The shapes it was built for."""
        return self.folder.record.shape_ranges

    def start(self, latents: ArrayLike, text: ArrayLike) -> AotInductorRun:
        """Open a run at latents (B, F, C, H, W) for text (B, L, D)."""
        z, prompt_embeds = self._prepare_run(latents, text)
        call = self._transition()
        prompt = self._torch.from_numpy(prompt_embeds).to(self._device)
        return AotInductorRun(self._torch, lambda z, t, r: call(z, t, r, prompt), z, self._device)

    def open_stream(self, text: ArrayLike, plan: CachePlan) -> CacheStream:
        """Open a stream for text (1, L, D), with room for `plan.capacity` tokens."""
        prompt_embeds = self._prepare_stream(text)
        cache = AotInductorCache(self._torch, self._graphs, self._device, prompt_embeds, plan)
        return CacheStream(cache, plan)

    def close(self) -> None:
        """Release the packages; open runs and streams can no longer step."""
        super().close()
        for graph in self._graphs.values():
            graph.close()
        self._graphs = {}
