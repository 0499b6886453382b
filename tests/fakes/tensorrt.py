"""A machine with TensorRT and a GPU, acted: the real names, and ONNX Runtime where the kernels
would be.

`FakeTensorRT` gives the stand-ins of TensorRT and CUDA the behaviour our flows need. A "plan"
is a small JSON file that names the ONNX graph; a context runs that graph in ONNX Runtime on exactly
the addresses and shapes it was given, so that what comes out is right only if every buffer, address
and copy is. It holds our code to TensorRT's rules: an address for every tensor, aligned; shapes
inside the chosen profile; activation memory of the right size; a captured context never touched.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from anyflow_deploy.engines.tensorrt import library
from anyflow_deploy.engines.tensorrt.library import LIBRARIES
from tests.fakes.cuda import FakeCuda
from tests.fakes.tensorrt_surface import FakeTensorRTModule
from tools import cuda_surface, tensorrt_stubs

RELEASES = {"10.3": "12.6", "10.16": "12.9", "11.4": "13"}
"""TensorRT, and the CUDA beside it; 10.3 and 12.6 are JetPack 6."""

RTX = "rtx-1.7"
"""TensorRT for RTX, see `tests.fakes.tensorrt_rtx`."""

ALL_RELEASES = {**RELEASES, RTX: "12.9"}
"""Of both libraries."""

TENSORRT_MODULES = (
    "api",
    "cuda",
    "engine",
    "execution",
    "kv_cache",
    "plan",
    "profiler",
    "run",
    "build.achieved",
    "build.builder",
    "build.builder_config",
    "build.plan_writer",
    "build.progress_monitor",
    "build.refit_check",
    "build.timing_cache",
)
"""Our modules of `anyflow_deploy.engines.tensorrt` that import TensorRT or CUDA."""

RTX_MODULES = ("achieved", "builder_config", "engine", "plan", "profiler", "runtime_cache")
"""The same of `anyflow_deploy.engines.tensorrt_rtx`."""

_OUR_MODULES = tuple(
    f"anyflow_deploy.engines.{package}.{name}"
    for package, names in (("tensorrt", TENSORRT_MODULES), ("tensorrt_rtx", RTX_MODULES))
    for name in names
)
_VERSIONS = {"10.16": "10.16.1.11", "10.3": "10.3.0", "11.4": "11.4.0.106", RTX: "1.7.1.116"}

_TYPES = {1: ("FLOAT", np.float32), 10: ("HALF", np.float16), 7: ("INT64", np.int64)}
_SESSIONS: dict[str, Any] = {}


def stubs_or_skip(release: str) -> Path:
    """The stubs of a release; a machine that can never make them skips the test and says why."""
    try:
        return tensorrt_stubs.stubs(release)
    except tensorrt_stubs.NotOnThisMachineError as error:
        pytest.skip(str(error))


def host_memory(surface: FakeTensorRTModule, content: bytes) -> Any:
    """An IHostMemory, which is a buffer."""
    kind = type("IHostMemory", (surface.IHostMemory, bytes), {})
    return bytes.__new__(kind, content)


class FakeTensorRT:
    """One machine.

    Args:
        release: in `ALL_RELEASES`.

    Attributes:
        library: the row of our table.
        trt, cuda: the modules.
        failure: what TensorRT logs when it fails the next build; None for a build that succeeds.
        during_build: called in the middle of a build.
        layers: makes the inspector's list from a graph; by default every product runs as the graph
            asks.
    """

    library = LIBRARIES["tensorrt"]

    def __init__(self, release: str) -> None:
        self.release = release
        self.cuda = FakeCuda(cuda_surface.load_surface(ALL_RELEASES[release]))
        self.failure: str | None = None
        self.during_build: Callable[[], None] = lambda: None
        self.layers: Callable[[onnx.ModelProto], list[dict[str, Any]]] = requested_layers
        self.released: list[str] = []
        self.lost_weights: set[str] = set()
        behaviour = {
            name.removeprefix("do_").replace("__", ".", 1): getattr(self, name)
            for name in dir(self)
            if name.startswith("do_")
        }
        behaviour |= {
            "Dims.__len__": lambda dims: len(dims.values),
            "Dims.__getitem__": lambda dims, i: dims.values[i],
        }
        behaviour |= {
            "Dims.__init__": lambda dims, shape=(): dims.__dict__.update(values=tuple(shape))
        }
        stub = (stubs_or_skip(release) / "tensorrt" / "__init__.pyi").read_text()
        self.trt = FakeTensorRTModule(self.library.module, stub, _VERSIONS[release], behaviour)

    @property
    def replays(self) -> int:
        """How many runs came from a captured CUDA graph."""
        return self.cuda.launches

    def dims(self, values: Any) -> Any:
        return self.trt.make_object("Dims", values=tuple(values))

    # builder

    def do_Builder____init__(self, builder: Any, logger: Any) -> None:  # noqa: N802 - TensorRT's names
        builder.__dict__["log"] = logger

    def do_Builder__create_network(self, builder: Any, flags: int = 0) -> Any:  # noqa: N802
        assert flags & (1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)), (
            "the network is weakly typed"
        )
        return self.trt.make_object("INetworkDefinition", model=None)

    def do_OnnxParser____init__(self, parser: Any, network: Any, logger: Any) -> None:  # noqa: N802
        parser.__dict__.update(network=network)

    def do_OnnxParser__parse_from_file(self, parser: Any, path: str) -> bool:  # noqa: N802
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                assert entry.key != "location" or (Path(path).parent / entry.value).is_file(), (
                    "the weights are not beside it"
                )
        parser.network.__dict__["model"] = str(Path(path))
        return True

    def do_Builder__create_builder_config(self, builder: Any) -> Any:  # noqa: N802
        flags = {"TF32"}
        return self.trt.make_object(
            "IBuilderConfig", on=flags, shapes=[], cache=None, limits={}, target=None
        )

    def do_IBuilderConfig__set_flag(self, config: Any, flag: Any) -> None:  # noqa: N802
        config.on.add(flag.name)

    def do_IBuilderConfig__clear_flag(self, config: Any, flag: Any) -> None:  # noqa: N802
        config.on.discard(flag.name)

    def do_IBuilderConfig__set_memory_pool_limit(self, config: Any, pool: Any, size: int) -> None:  # noqa: N802
        config.limits[pool.name] = size

    def do_Builder__create_optimization_profile(self, builder: Any) -> Any:  # noqa: N802
        return self.trt.make_object("IOptimizationProfile", shapes={})

    def do_IOptimizationProfile__set_shape(  # noqa: N802
        self, profile: Any, name: str, least: Any, best: Any, most: Any
    ) -> None:
        rows = [list(dims.values) for dims in (least, best, most)]
        for a, b, c in zip(*rows, strict=True):
            assert 0 <= a <= b <= c, f"profile of {name}: {rows}"
        profile.shapes[name] = rows

    def do_IBuilderConfig__add_optimization_profile(self, config: Any, profile: Any) -> int:  # noqa: N802
        config.shapes.append(profile.shapes)
        return len(config.shapes) - 1

    def do_IBuilderConfig__create_timing_cache(self, config: Any, content: Any) -> Any:  # noqa: N802
        return self.trt.make_object("ITimingCache", content=json.loads(bytes(content) or b"{}"))

    def do_IBuilderConfig__set_timing_cache(  # noqa: N802
        self, config: Any, cache: Any, ignore_mismatch: bool
    ) -> bool:
        if cache.content.get("version", self.trt.__version__) != self.trt.__version__:
            return False
        config.__dict__["cache"] = cache
        return True

    def do_IBuilderConfig__get_timing_cache(self, config: Any) -> Any:  # noqa: N802
        return config.cache

    def do_ITimingCache__combine(self, cache: Any, other: Any, ignore_mismatch: bool) -> bool:  # noqa: N802
        cache.__dict__["content"] = {**other.content, **cache.content}
        return True

    def do_ITimingCache__serialize(self, cache: Any) -> Any:  # noqa: N802
        return host_memory(self.trt, json.dumps(cache.content).encode())

    def do_Builder__build_serialized_network_to_stream(  # noqa: N802
        self, builder: Any, network: Any, config: Any, writer: Any
    ) -> bool:
        plan = self.do_Builder__build_serialized_network(builder, network, config)
        if plan is None:
            return False
        content = bytes(plan)
        half = len(content) // 2
        pieces = (content[:half], content[half:])
        return all(writer.write(piece) == len(piece) for piece in pieces)

    def do_Builder__build_serialized_network(self, builder: Any, network: Any, config: Any) -> Any:  # noqa: N802
        model = onnx.load(network.model, load_external_data=False)
        names = {tensor.name for tensor in model.graph.input}
        assert config.shapes and all(set(shapes) == names for shapes in config.shapes), (
            "every input needs a shape in a profile"
        )
        monitor = config.progress_monitor
        monitor.phase_start("Building Engine", "", 2)
        monitor.phase_start("Timing", "Building Engine", 3)
        monitor.phase_start("deeper", "Timing", 1)
        monitor.phase_finish("deeper")
        if config.cache is not None:
            config.cache.content.update(
                {"version": self.trt.__version__, Path(network.model).stem: 1.0}
            )
        going = all(
            [
                monitor.step_complete("Timing", 0),
                self.during_build() is None,
                monitor.step_complete("Timing", 1),
            ]
        )
        monitor.phase_finish("Timing")
        if self.failure is not None:
            builder.log.log(self.trt.ILogger.Severity.ERROR, self.failure)
        if self.failure is not None or not going or not monitor.step_complete("Building Engine", 1):
            return None
        monitor.phase_finish("Building Engine")
        plan = {
            "model": network.model,
            "profiles": config.shapes,
            "flags": sorted(config.on),
            "version": self.trt.__version__,
            "target": config.target,
        }
        return host_memory(self.trt, json.dumps(plan).encode())

    # engine

    def do_Runtime__deserialize_cuda_engine(self, runtime: Any, content: Any) -> Any:  # noqa: N802
        try:
            plan = json.loads(bytes(content))
        except ValueError:
            return None
        if "VERSION_COMPATIBLE" in plan["flags"] and not runtime.engine_host_code_allowed:
            return None
        model = onnx.load(plan["model"], load_external_data=False)
        tensors = {t.name: t.type.tensor_type for t in [*model.graph.input, *model.graph.output]}
        state = {"plan": plan, "model": model, "tensors": tensors, "inputs": len(model.graph.input)}
        return self.trt.make_object(
            "ICudaEngine", **state, weights="STRIP_PLAN" not in plan["flags"]
        )

    def do_ICudaEngine__num_io_tensors(self, engine: Any) -> int:  # noqa: N802
        return len(engine.tensors)

    def do_ICudaEngine__num_optimization_profiles(self, engine: Any) -> int:  # noqa: N802
        return len(engine.plan["profiles"])

    def do_ICudaEngine__get_tensor_name(self, engine: Any, index: int) -> str:  # noqa: N802
        return list(engine.tensors)[index]

    def do_ICudaEngine__get_tensor_dtype(self, engine: Any, name: str) -> Any:  # noqa: N802
        return self.trt.DataType[_TYPES[engine.tensors[name].elem_type][0]]

    def do_ICudaEngine__get_tensor_location(self, engine: Any, name: str) -> Any:  # noqa: N802
        return self.trt.TensorLocation.DEVICE

    def do_ICudaEngine__get_tensor_mode(self, engine: Any, name: str) -> Any:  # noqa: N802
        return self.trt.TensorIOMode[
            "INPUT" if list(engine.tensors).index(name) < engine.inputs else "OUTPUT"
        ]

    def do_ICudaEngine__get_tensor_shape(self, engine: Any, name: str) -> Any:  # noqa: N802
        return self.dims(
            d.dim_value if d.HasField("dim_value") else -1 for d in engine.tensors[name].shape.dim
        )

    def do_ICudaEngine__get_tensor_profile_shape(  # noqa: N802
        self, engine: Any, name: str, profile: int
    ) -> list[Any]:
        return [self.dims(shape) for shape in engine.plan["profiles"][profile][name]]

    def do_ICudaEngine__get_weight_streaming_automatic_budget(self, engine: Any) -> int:  # noqa: N802
        assert "WEIGHT_STREAMING" in engine.plan["flags"]
        return 1 << 20

    def do_ICudaEngine__create_engine_inspector(self, engine: Any) -> Any:  # noqa: N802
        return self.trt.make_object("EngineInspector", engine=engine)

    def do_EngineInspector__get_engine_information(self, inspector: Any, form: Any) -> str:  # noqa: N802
        assert form == self.trt.LayerInformationFormat.JSON
        return json.dumps(
            {
                "Layers": self.layers(inspector.engine.model),
                "Bindings": list(inspector.engine.tensors),
            }
        )

    def do_Refitter____init__(self, refitter: Any, engine: Any, logger: Any) -> None:  # noqa: N802
        refitter.__dict__.update(engine=engine, model=None)

    def do_Refitter__get_all_weights(self, refitter: Any) -> list[str]:  # noqa: N802
        model = onnx.load(refitter.engine.plan["model"], load_external_data=False)
        names = [tensor.name for tensor in model.graph.initializer]
        return [name for name in names if name not in self.lost_weights]

    def do_OnnxParserRefitter____init__(self, parser: Any, refitter: Any, logger: Any) -> None:  # noqa: N802
        parser.__dict__.update(refitter=refitter)

    def do_OnnxParserRefitter__refit_from_file(self, parser: Any, path: str) -> bool:  # noqa: N802
        parser.refitter.__dict__["model"] = path
        return path == parser.refitter.engine.plan["model"]

    def do_Refitter__refit_cuda_engine(self, refitter: Any) -> bool:  # noqa: N802
        assert {"REFIT", "REFIT_IDENTICAL"} & set(refitter.engine.plan["flags"])
        refitter.engine.__dict__["weights"] = refitter.model is not None
        return True

    # context

    def do_ICudaEngine__create_execution_context(self, engine: Any, strategy: Any = None) -> Any:  # noqa: N802
        assert strategy == self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        assert engine.weights, "the plan is stripped, and its weights were not given back"
        return self.trt.make_object(
            "IExecutionContext",
            of=engine,
            number=-1,
            shapes={},
            addresses={},
            memory=None,
            captured=False,
        )

    def _assert_not_captured(self, context: Any) -> None:
        assert not context.captured, (
            "a context was changed after its run was captured: undefined in TensorRT"
        )

    def do_IExecutionContext__set_optimization_profile_async(  # noqa: N802
        self, context: Any, number: int, stream: int
    ) -> bool:
        self._assert_not_captured(context)
        context.__dict__.update(number=number, shapes={})
        return 0 <= number < len(context.of.plan["profiles"])

    def do_IExecutionContext__set_input_shape(self, context: Any, name: str, shape: Any) -> bool:  # noqa: N802
        self._assert_not_captured(context)
        least, _, most = context.of.plan["profiles"][context.number][name]
        context.shapes[name] = tuple(shape)
        return all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))

    def do_IExecutionContext__set_tensor_address(  # noqa: N802
        self, context: Any, name: str, address: int
    ) -> bool:
        self._assert_not_captured(context)
        assert address and address % 256 == 0, f"{name} is at {address:#x}, which is not aligned"
        assert name in context.of.tensors
        context.addresses[name] = address
        return True

    def _memory_of(self, context: Any) -> int:
        return 64 * sum(int(np.prod(shape)) for shape in context.shapes.values()) + 1000

    def do_IExecutionContext__update_device_memory_size_for_shapes(self, context: Any) -> int:  # noqa: N802
        assert set(context.shapes) == set(list(context.of.tensors)[: context.of.inputs])
        return self._memory_of(context)

    def do_IExecutionContext__set_device_memory(self, context: Any, memory: int, size: int) -> None:  # noqa: N802
        self._assert_not_captured(context)
        context.__dict__["memory"] = (memory, size)

    def do_IExecutionContext__execute_async_v3(self, context: Any, stream: int) -> bool:  # noqa: N802
        capturing = self.cuda.capturing(stream)
        assert not (capturing and "WEIGHT_STREAMING" in context.of.plan["flags"]), (
            "weight streaming cannot be captured"
        )
        assert not context.captured, "a captured context was run besides its graph"
        names = list(context.of.tensors)
        assert set(context.addresses) == set(names), (
            f"no address for {set(names) - set(context.addresses)}"
        )
        memory, size = context.memory
        assert size >= self._memory_of(context), "too little activation memory"
        shapes = dict(context.shapes)
        addresses = dict(context.addresses)
        path = context.of.plan["model"]
        inputs = names[: context.of.inputs]
        assert set(shapes) == set(inputs), "a shape is missing"
        tensors = context.of.tensors

        def run() -> None:
            self.cuda.view(memory, size)[:] = 0xAA
            given = {}
            for name in inputs:
                kind = _TYPES[tensors[name].elem_type][1]
                count = int(np.prod(shapes[name])) * np.dtype(kind).itemsize
                given[name] = (
                    np.array(self.cuda.view(addresses[name], count))
                    .view(kind)
                    .reshape(shapes[name])
                )
            outputs = names[len(inputs) :]
            for name, value in zip(outputs, _session(path).run(outputs, given), strict=True):
                flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
                self.cuda.view(addresses[name], len(flat))[:] = flat

        self.cuda.enqueue(stream, run)
        if (profiler := context.__dict__.get("profiler")) is not None:
            assert not capturing, "a profiled run was captured"
            for row in self.layers(context.of.model):
                profiler.report_layer_time(row["Name"], 0.25)
        context.__dict__["captured"] = capturing
        return True


def _session(path: str) -> Any:
    if path not in _SESSIONS:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        _SESSIONS[path] = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
    return _SESSIONS[path]


def requested_layers(model: onnx.ModelProto) -> list[dict[str, Any]]:
    """Layers as TensorRT's inspector lists them: one a product, and one an attention with the
    products around it."""
    from anyflow_deploy.engines.tensorrt.build.inspector import expected_precision

    asked = expected_precision(model)
    inside = {name for nodes in asked.attentions for name in nodes}
    rows = [(f"{nodes[0]}_mha", nodes, "_gemm_mha_v2_0x1", "Half") for nodes in asked.attentions]
    for node in model.graph.node:
        if node.op_type in ("Gemm", "MatMul") and node.name not in inside:
            kind = "FP8" if node.name in asked.eight_bit else "Half"
            rows.append(
                (f"{node.name}_myl0", (node.name,), f"sm90_{node.op_type}_0x{len(rows):x}", kind)
            )
    return [layer(*row) for row in rows]


def layer(name: str, nodes: tuple[str, ...], kernel: str, kind: str) -> dict[str, Any]:
    """One layer of the inspector's list."""
    metadata = "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes)
    inputs = [{"Name": "x", "Dimensions": [1, 2], "Format/Datatype": kind}]
    return {
        "Name": name,
        "LayerType": "gemm",
        "Inputs": inputs,
        "TacticName": kernel,
        "Metadata": metadata,
    }


def install(machine: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Python find the stand-ins, and import our modules that use them anew."""
    modules: dict[str, types.ModuleType] = {
        machine.library.module: machine.trt,
        "cuda": types.ModuleType("cuda"),
        "cuda.bindings": types.ModuleType("cuda.bindings"),
        "cuda.bindings.runtime": machine.cuda,
    }
    modules["cuda.bindings"].runtime = machine.cuda  # type: ignore[attr-defined]
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)  # torch asks for it
        monkeypatch.setitem(sys.modules, name, module)
    for name in _OUR_MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(library, "_choice", machine.library.backend)


def unload_modules() -> None:
    """Drop our modules that have imported a stand-in."""
    for name in _OUR_MODULES:
        sys.modules.pop(name, None)
