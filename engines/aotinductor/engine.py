"""AOTInductor: the network compiled ahead of time by torch, for the device it runs on.

`anyflow-build BUNDLE --backend aotinductor` makes one package for each graph (`build`); this opens
them. torch is the runtime here, so unlike the other backends this one needs it on the device,
though nothing of the exporter.

Packages hold no weights: the bundle's are read once and shared by all of them. On a GPU a
bidirectional step is recorded as a CUDA graph for each shape. (Chunks of a stream are not: their
cache has another length each time.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.aotinductor.compiled_graph import CudaGraphRunner
from anyflow_deploy.engines.aotinductor.package_engine import PackageEngine
from anyflow_deploy.engines.registry import EngineOptions
from anyflow_deploy.engines.torch_common.device import import_torch, runtime_versions
from anyflow_deploy.engines.torch_common.weights import TorchWeights

if TYPE_CHECKING:
    from torch import Tensor


class AotInductorEngine(PackageEngine):
    """An engine that runs a bundle's graphs in AOTInductor packages.

    Args:
        bundle: an opened bundle.
        options: provider, device, threads, which engine, CUDA graphs.

    Raises:
        BackendError: torch or the device is missing, nothing was built, or it was built elsewhere.
    """

    backend = "aotinductor"
    title = "AOTInductor"

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        super().__init__(bundle, options)
        names = {name for graph in self._graphs.values() for name in graph.weights}
        self._weights = TorchWeights(self._torch, bundle, self._device, names)
        for graph in self._graphs.values():
            graph.load_weights(self._weights)
        use_cuda_graphs = (
            options.cuda_graphs and options.provider == "cuda" and "transition" in self._graphs
        )
        self._graph_runner: CudaGraphRunner | None = None
        if use_cuda_graphs:
            self._graph_runner = CudaGraphRunner(self._torch, self._graphs["transition"])

    def _import_torch(self, options: EngineOptions) -> Any:
        return import_torch(options.provider, options.device)

    def _required_versions(self) -> dict[str, str]:
        return runtime_versions(self._torch, self.provider)

    def _transition(self) -> Callable[..., Sequence[Tensor]]:
        return self._graph_runner or super()._transition()

    def close(self) -> None:
        """Release packages and weights; open runs and streams can no longer step."""
        if self._graph_runner is not None:
            self._graph_runner.close()
        super().close()
        self._weights.release()
