"""A plan of TensorRT for RTX, opened. Its kernels are compiled when its first context is made."""

from __future__ import annotations

from anyflow_deploy.engines.tensorrt.api import trt
from anyflow_deploy.engines.tensorrt.plan import LoadedPlan, PlanFile
from anyflow_deploy.engines.tensorrt_rtx.runtime_cache import RuntimeCache


class RtxPlan(LoadedPlan):
    """See `LoadedPlan`.

    CUDA graphs are captured by the library, and never by us as well. Every axis of our graphs is
    dynamic, so a run may begin with general kernels while those for its shape are still being
    compiled; the library waits for them before it captures, where a capture of ours would repeat
    the general ones for ever. It captures again when a shape or an address changes. So only
    contexts whose runs repeat are captured.

    Args:
        file: which one.
        cache: the engine's kernels.
        specialization: one of `registry.KERNEL_SPECIALIZATIONS`.
    """

    captures_runs = True

    def __init__(self, file: PlanFile, cache: RuntimeCache, specialization: str) -> None:
        super().__init__(file)
        self._cache = cache
        self._specialization = specialization
        self._prepared: list[trt.IExecutionContext] = []

    def prepare(self) -> None:
        """Make the first context now, and with it what kernels the cache lacks.

        Raises:
            BackendError: TensorRT for RTX refuses.
        """
        context = self._make_context(repeats=False)
        if context is None:
            raise self.refusal("make an execution context")
        self._prepared.append(context)

    def create_context(self, repeats: bool) -> trt.IExecutionContext | None:
        """See `LoadedPlan`."""
        if not repeats:
            try:
                return self._prepared.pop()
            except IndexError:  # another slot has it
                pass
        return self._make_context(repeats)

    def _make_context(self, repeats: bool) -> trt.IExecutionContext | None:
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        graphs = trt.CudaGraphStrategy
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if repeats else graphs.DISABLED
        strategies = trt.DynamicShapesKernelSpecializationStrategy.__members__
        config.dynamic_shapes_kernel_specialization_strategy = strategies[
            self._specialization.upper()
        ]
        self._cache.attach(config)
        return self.engine.create_execution_context(config)
