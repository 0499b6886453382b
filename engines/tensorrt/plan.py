"""A built plan, opened: one TensorRT engine with the names, types and profiles of its tensors.

What a plan says of itself is held against the manifest: a plan that was built from another graph
would otherwise read past the end of a buffer.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.bundle.manifest import GraphRecord
from anyflow_deploy.dtypes import DTYPES
from anyflow_deploy.engines.engine_folder import EngineFolder
from anyflow_deploy.engines.tensorrt.api import LIBRARY, LOGGER, TITLE, MessageLog, trt
from anyflow_deploy.engines.tensorrt.build.optimization_profiles import Profile, Shape
from anyflow_deploy.errors import BackendError

T = TypeVar("T")

BYTES = {name: row.bytes for name, row in DTYPES.items() if row.tensorrt}
"""Size of an element, by the manifest's names."""

_TYPES = {name: row.tensorrt for name, row in DTYPES.items() if row.tensorrt}


@dataclass(frozen=True)
class LoadOptions:
    """How plans are opened.

    Attributes:
        host_code: the plan is version-compatible, and carries a small runtime of its own that has
            to be trusted. It was built on this machine and its hash was compared.
        refit_from: the ONNX file that a plan without weights gets them from.
        weight_streaming: weights stay in host memory as far as TensorRT finds it useful.
    """

    host_code: bool = False
    refit_from: Path | None = None
    weight_streaming: bool = False


@dataclass(frozen=True)
class PlanFile:
    """A plan on disk.

    Attributes:
        path: the file.
        name: of the graph, for messages.
        graph: its tensors, from the manifest.
        profiles: their names, in order.
        options: how it is opened.
    """

    path: Path
    name: str
    graph: GraphRecord
    profiles: tuple[str, ...]
    options: LoadOptions

    @classmethod
    def from_folder(cls, folder: EngineFolder, bundle: Bundle, graph: str) -> PlanFile:
        """Return the plan of one graph.

        Args:
            folder: the engine.
            bundle: that it was built from.
            graph: a name in the manifest.
        """
        settings = folder.record.settings
        model = bundle.manifest.graphs[graph]
        options = LoadOptions(
            host_code=bool(settings.get("version_compatible")),
            refit_from=bundle.file(model.file) if settings.get("strip") else None,
            weight_streaming=bool(settings.get("weight_streaming")),
        )
        profiles = tuple(folder.record.profiles[graph])
        return cls(folder.file(f"{graph}.plan"), graph, model, profiles, options)


class LoadedPlan:
    """One opened plan.

    Args:
        file: which one.

    Attributes:
        captures_runs: whether the library itself captures the runs of a context in a CUDA graph, if
            `create_context` was asked for one whose runs repeat.
        engine: TensorRT's object; safe to share between threads.
        messages: what TensorRT logged about it.
        profiles: as the plan has them.
        types: element type of every tensor, by the manifest's names.

    Raises:
        BackendError: TensorRT cannot open it, or it is not of this graph.
    """

    captures_runs = False

    def __init__(self, file: PlanFile) -> None:
        self.name = file.name
        self._path = file.path
        graph, names, options = file.graph, file.profiles, file.options
        self.messages = MessageLog()
        self._runtime = self._create(lambda: trt.Runtime(LOGGER))
        self._runtime.engine_host_code_allowed = options.host_code
        self.engine: trt.ICudaEngine = self._deserialize()
        if options.refit_from is not None:
            self._refit(options.refit_from)
        # Set this before the first context: its scratch memory is part of a context's.
        if options.weight_streaming:
            self.engine.weight_streaming_budget_v2 = (
                self.engine.get_weight_streaming_automatic_budget()
            )
        self.inputs = [tensor.name for tensor in graph.inputs]
        self.outputs = [tensor.name for tensor in graph.outputs]
        self.types = {tensor.name: tensor.dtype for tensor in [*graph.inputs, *graph.outputs]}
        self._check_tensors(graph)
        if self.engine.num_optimization_profiles != len(names):
            raise self._mismatch(
                f"{self.engine.num_optimization_profiles} profiles where engine.json lists"
                f" {len(names)}"
            )
        self.profiles = [self._profile(number, label) for number, label in enumerate(names)]

    def create_context(self, repeats: bool) -> trt.IExecutionContext | None:
        """Make an execution context, whose activation memory is ours to give; None: TensorRT could
        not.

        Args:
            repeats: every run of it will have the same shapes and addresses.
        """
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return self.engine.create_execution_context(strategy)

    def _deserialize(self) -> trt.ICudaEngine:
        with (
            self._path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise BackendError(
                f"{TITLE} cannot open {self._path}: {self.messages.summary()}. "
                f"Build it on this machine: anyflow-build … --backend {LIBRARY.backend} --overwrite"
            )
        return engine

    def _create(self, make: Callable[[], T]) -> T:
        with suppress(TypeError):  # pybind11's word for a factory that returned nothing
            return make()
        raise BackendError(f"{TITLE} could not start its runtime: {self.messages.summary()}.")

    def _refit(self, model: Path) -> None:
        refitter = trt.Refitter(self.engine, LOGGER)
        parser = trt.OnnxParserRefitter(refitter, LOGGER)
        if not parser.refit_from_file(str(model.resolve())) or not refitter.refit_cuda_engine():
            raise BackendError(
                f"the weights of {model} do not fit {self._path}: {self.messages.summary()}. Build"
                " it again."
            )

    def _check_tensors(self, graph: GraphRecord) -> None:
        engine = self.engine
        tensor_names = {engine.get_tensor_name(number) for number in range(engine.num_io_tensors)}
        if tensor_names != set(self.types):
            raise self._mismatch(f"tensors {', '.join(sorted(tensor_names ^ set(self.types)))}")
        for tensor in [*graph.inputs, *graph.outputs]:
            dtype = engine.get_tensor_dtype(tensor.name).name
            mode = engine.get_tensor_mode(tensor.name) == trt.TensorIOMode.INPUT
            shape = _lengths(engine.get_tensor_shape(tensor.name))
            same = len(shape) == len(tensor.shape) and all(
                isinstance(axis, str) or axis == length
                for axis, length in zip(tensor.shape, shape, strict=True)
            )
            if dtype != _TYPES[tensor.dtype] or mode != (tensor.name in self.inputs) or not same:
                raise self._mismatch(f"tensor {tensor.name} of type {dtype} and shape {shape}")
            if engine.get_tensor_location(tensor.name) != trt.TensorLocation.DEVICE:
                raise self._mismatch(f"tensor {tensor.name} in host memory")

    def _profile(self, number: int, label: str) -> Profile:
        shapes = {}
        for name in self.inputs:
            minimum, optimum, maximum = (
                _lengths(dims) for dims in self.engine.get_tensor_profile_shape(name, number)
            )
            shapes[name] = (minimum, optimum, maximum)
        return Profile(label, shapes)

    def refusal(self, action: str) -> BackendError:
        """Return the error of something that TensorRT did not do, with what it logged."""
        return BackendError(
            f"{TITLE}: {self.name!r} could not {action}: {self.messages.summary()}."
        )

    def _mismatch(self, difference: str) -> BackendError:
        return BackendError(
            f"{self._path} is not a plan of this bundle's {self.name!r}: it has {difference}. Build"
            " it again."
        )


def _lengths(dims: trt.Dims) -> Shape:
    return tuple(dims[axis] for axis in range(len(dims)))
