"""A compiled graph that can be called: torch's loader of `.pt2` packages, and CUDA graphs.

The loader unpacks the shared library into a private folder and opens it; no pickle is involved, and
Python's own archive reader, which could meet one, is not used. A call takes and returns tensors on
the device in the order of the bundle's graph.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyflow_deploy.engines.torch_common.compat import open_package
from anyflow_deploy.engines.torch_common.weights import TorchWeights
from anyflow_deploy.errors import AnyFlowError, BackendError

if TYPE_CHECKING:
    from torch import Tensor

_MAX_GRAPHS = 4
"""Shapes whose recordings are kept. They share one pool of memory of the largest one's size."""


class CompiledGraph:
    """One package.

    Calls from several threads wait for each other: a package has one set of buffers.

    Args:
        torch: the module.
        path: the package.
        index: of the GPU; -1 for the CPU.

    Attributes:
        weights: names of the weights it reads.

    Raises:
        BackendError: the package cannot be opened.
    """

    def __init__(self, torch: Any, path: Path, index: int) -> None:
        self._torch = torch
        self._lock = threading.Lock()
        try:
            self._loader: Any = open_package(path, index)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise BackendError(
                f"{path} cannot be opened by torch {torch.__version__}: {reason} Build it again."
            ) from None
        self.weights: list[str] = self._loader.get_constant_fqns()

    def load_weights(self, weights: TorchWeights) -> None:
        """Give the package its weights, without a copy."""
        self._shared_weights = weights  # a reference, so that the weights are not released earlier
        self._loader.load_constants(weights.share(self.weights), False, True, True)

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Run the graph and return its outputs, in the graph's order.

        Raises:
            AnyFlowError: it is closed, or the device has no memory left.
        """
        with self._lock:
            if self._loader is None:
                raise AnyFlowError("this engine is closed; load another with load_engine(bundle).")
            try:
                return list(self._loader.boxed_run(list(inputs)))
            except self._torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
                raise BackendError(
                    f"a transition does not fit on the device: {reason} Make a smaller video."
                ) from None

    def close(self) -> None:
        """Release the package."""
        with self._lock:
            self._loader = None


class CudaGraphRunner:
    """A compiled graph that is recorded as a CUDA graph for each shape, and replayed.

    A replay is one launch for all kernels.

    The first call of a shape runs without recording, which loads kernels and initializes libraries;
    the second records. Inputs are copied to where the recording reads them and outputs to memory of
    their own, on the device, so runs do not mix.

    Args:
        torch: the module.
        call: what to record.
    """

    def __init__(self, torch: Any, call: Callable[..., Sequence[Tensor]]) -> None:
        self._torch = torch
        self._call = call
        self._lock = threading.Lock()
        self._seen_shapes: set[Any] = set()
        self._graphs: OrderedDict[Any, tuple[Any, list[Tensor], Sequence[Tensor]]] = OrderedDict()
        self._pool: Any = None

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Run the graph and return its outputs, in the graph's order."""
        key = tuple(tuple(tensor.shape) for tensor in inputs)
        with self._lock:
            if key not in self._graphs:
                if key not in self._seen_shapes:
                    self._seen_shapes.add(key)
                    return self._call(*inputs)
                self._capture(key, inputs)
            self._graphs.move_to_end(key)
            graph, static_inputs, outputs = self._graphs[key]
            for static_input, tensor in zip(static_inputs, inputs, strict=True):
                static_input.copy_(tensor)
            graph.replay()
            return [output.clone() for output in outputs]

    def _capture(self, key: Any, inputs: Sequence[Tensor]) -> None:
        cuda = self._torch.cuda
        if self._pool is None:
            self._pool = cuda.graph_pool_handle()
        if len(self._graphs) == _MAX_GRAPHS:
            self._graphs.popitem(last=False)
        static_inputs = [tensor.clone() for tensor in inputs]
        cuda.synchronize()
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, pool=self._pool):
            outputs = self._call(*static_inputs)
        self._graphs[key] = (graph, static_inputs, outputs)

    def close(self) -> None:
        """Release the recordings."""
        with self._lock:
            self._graphs.clear()
            self._seen_shapes.clear()
            self._pool = None
