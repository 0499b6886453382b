"""A machine with TensorRT for RTX and a GPU, acted: what it does otherwise than TensorRT.

Kernels are compiled when a context is made, and when a shape first comes, unless the runtime cache
has them; the cache knows the GPU, the driver and the release it was made on. CUDA graphs are the
library's own: a run is a replay where shapes and addresses are those of the run before in its
context, else it captures. A capture by us as well is refused, since our builds do not ask for
`REQUIRE_USER_ALLOCATION`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anyflow_deploy.engines.tensorrt.library import LIBRARIES
from tests.fakes.tensorrt import RTX, FakeTensorRT, host_memory

_RUNS_ON = ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1))


class FakeTensorRTRtx(FakeTensorRT):
    """See the module.

    Attributes:
        compiled: what kernels were compiled for, in order.
        captures: how often the library captured a run.
    """

    library = LIBRARIES["tensorrt-rtx"]

    def __init__(self) -> None:
        super().__init__(RTX)
        self.cuda.properties |= {"major": 8, "minor": 9}
        self.compiled: list[str] = []
        self.captures = 0
        self._replays = 0

    @property
    def replays(self) -> int:
        """See `FakeTensorRT`."""
        return self._replays

    @property
    def _capability(self) -> tuple[int, int]:
        return int(self.cuda.properties["major"]), int(self.cuda.properties["minor"])

    # builder

    def do_IBuilderConfig__create_timing_cache(self, config: Any, content: Any) -> Any:  # noqa: N802
        raise AssertionError("there is nothing to time, and it asks for a GPU")

    def do_IBuilderConfig__set_compute_capability(  # noqa: N802
        self, config: Any, capability: Any, index: int
    ) -> bool:
        assert index < config.num_compute_capabilities
        current = "SM{}{}".format(*self._capability)
        config.__dict__["target"] = current if capability.name == "CURRENT" else capability.name
        return True

    # engine

    def do_Runtime____init__(self, runtime: Any, logger: Any) -> None:  # noqa: N802
        runtime.__dict__["log"] = logger

    def do_Runtime__deserialize_cuda_engine(self, runtime: Any, content: Any) -> Any:  # noqa: N802
        engine = super().do_Runtime__deserialize_cuda_engine(runtime, content)
        if engine is None:
            return None
        target = engine.plan["target"]
        if self._capability not in _RUNS_ON or (
            target not in (None, "SM{}{}".format(*self._capability))
        ):
            severity = self.trt.ILogger.Severity.ERROR
            runtime.log.log(severity, "The engine cannot run on this GPU")
            return None
        return engine

    def do_ICudaEngine__create_runtime_config(self, engine: Any) -> Any:  # noqa: N802
        trt = self.trt
        return trt.make_object(
            "IRuntimeConfig",
            cuda_graph_strategy=trt.CudaGraphStrategy.DISABLED,
            dynamic_shapes_kernel_specialization_strategy=(
                trt.DynamicShapesKernelSpecializationStrategy.LAZY
            ),
            allocation=trt.ExecutionContextAllocationStrategy.STATIC,
            cache=None,
        )

    def do_IRuntimeConfig__set_execution_context_allocation_strategy(  # noqa: N802
        self, config: Any, strategy: Any
    ) -> None:
        config.__dict__["allocation"] = strategy

    # runtime cache

    def do_IRuntimeConfig__create_runtime_cache(self, config: Any) -> Any:  # noqa: N802
        return self.trt.make_object("IRuntimeCache", kernels=[])

    def do_IRuntimeConfig__set_runtime_cache(self, config: Any, cache: Any) -> bool:  # noqa: N802
        config.__dict__["cache"] = cache
        return True

    def _environment(self) -> list[Any]:
        properties = self.cuda.properties
        return [
            properties["name"].decode(),
            *self._capability,
            self.cuda.driver,
            self.trt.__version__,
        ]

    def do_IRuntimeCache__serialize(self, cache: Any) -> Any:  # noqa: N802
        content = {"environment": self._environment(), "kernels": cache.kernels}
        return host_memory(self.trt, json.dumps(content).encode())

    def do_IRuntimeCache__deserialize(self, cache: Any, blob: Any) -> bool:  # noqa: N802
        content = json.loads(bytes(blob))
        if content["environment"] != self._environment():
            return False
        cache.__dict__["kernels"] = content["kernels"]
        return True

    def _compile(self, cache: Any, kernel: str) -> None:
        if kernel not in cache.kernels:
            cache.kernels.append(kernel)
            self.compiled.append(kernel)

    # context

    def do_ICudaEngine__create_execution_context(self, engine: Any, config: Any = None) -> Any:  # noqa: N802
        assert isinstance(config, self.trt.IRuntimeConfig), "made without a runtime config"
        assert config.cache is not None, "made without a runtime cache"
        self._compile(config.cache, Path(engine.plan["model"]).stem)
        context = super().do_ICudaEngine__create_execution_context(engine, config.allocation)
        context.__dict__.update(
            cache=config.cache,
            graphs=config.cuda_graph_strategy == self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE,
            specialize=config.dynamic_shapes_kernel_specialization_strategy.name != "NONE",
            last=None,
        )
        return context

    def do_IExecutionContext__execute_async_v3(self, context: Any, stream: int) -> bool:  # noqa: N802
        assert not self.cuda.capturing(stream), "captured by us, and built without allowing it"
        assert not (context.graphs and "WEIGHT_STREAMING" in context.of.plan["flags"]), (
            "weight streaming cannot be captured"
        )
        if context.specialize:
            stem = Path(context.of.plan["model"]).stem
            shapes = sorted((name, list(shape)) for name, shape in context.shapes.items())
            self._compile(context.cache, f"{stem} {json.dumps(shapes)}")
        if context.graphs:
            call = (dict(context.shapes), dict(context.addresses), context.memory)
            if call == context.last:
                self._replays += 1
            else:
                self.captures += 1
            context.__dict__["last"] = call
        return super().do_IExecutionContext__execute_async_v3(context, stream)
