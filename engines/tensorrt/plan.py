"""A built plan, opened: one TensorRT engine with the names, types and profiles of its tensors.

What a plan says of itself is held against the manifest: a plan that was built from another graph would otherwise read
past the end of a buffer.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from anyflow_deploy.bundle.manifest import Graph
from anyflow_deploy.engines.tensorrt.api import VERSION, Messages, trt
from anyflow_deploy.engines.tensorrt.build.optimization_profiles import Profile, Shape
from anyflow_deploy.errors import BackendError

T = TypeVar("T")

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}
"""Size of an element, by the manifest's names."""

_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}


@dataclass(frozen=True)
class Opening:
    """How plans are opened.

    Attributes:
        host_code: the plan is version-compatible, and carries a small runtime of its own that has to be trusted. It was
            built on this machine and its hash was compared.
        refit_from: the ONNX file that a plan without weights gets them from.
        weight_streaming: weights stay in host memory as far as TensorRT finds it useful.
    """

    host_code: bool = False
    refit_from: Path | None = None
    weight_streaming: bool = False


class Plan:
    """One opened plan.

    Args:
        path: the file.
        name: of the graph, for messages.
        graph: its tensors, from the manifest.
        names: of the profiles, in order.
        opening: see `Opening`.

    Attributes:
        engine: TensorRT's object; safe to share between threads.
        messages: what TensorRT logged about it.
        profiles: as the plan has them.
        types: element type of every tensor, by the manifest's names.

    Raises:
        BackendError: TensorRT cannot open it, or it is not of this graph.
    """

    def __init__(self, path: Path, name: str, graph: Graph, names: list[str], opening: Opening) -> None:
        self.name, self._path = name, path
        self.messages = Messages()
        self._runtime = self._made(lambda: trt.Runtime(self.messages))
        self._runtime.engine_host_code_allowed = opening.host_code
        self.engine: trt.ICudaEngine = self._opened()
        if opening.refit_from is not None:
            self._refit(opening.refit_from)
        if opening.weight_streaming:  # before the first context: its scratch memory is part of a context's
            self.engine.weight_streaming_budget_v2 = self.engine.get_weight_streaming_automatic_budget()
        self.inputs = [tensor.name for tensor in graph.inputs]
        self.outputs = [tensor.name for tensor in graph.outputs]
        self.types = {tensor.name: tensor.dtype for tensor in [*graph.inputs, *graph.outputs]}
        self._check_tensors(graph)
        if self.engine.num_optimization_profiles != len(names):
            raise self._foreign(f"{self.engine.num_optimization_profiles} profiles where engine.json lists {len(names)}")
        self.profiles = [self._profile(number, label) for number, label in enumerate(names)]

    def _opened(self) -> trt.ICudaEngine:
        with self._path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise BackendError(
                f"TensorRT {VERSION} cannot open {self._path}: {self.messages.summary()}. "
                "Build it on this machine: anyflow-build … --backend tensorrt --overwrite"
            )
        return engine

    def _made(self, make: Callable[[], T]) -> T:
        with suppress(TypeError):  # pybind11's word for a factory that returned nothing
            return make()
        raise BackendError(f"TensorRT {VERSION} could not start its runtime: {self.messages.summary()}.")

    def _refit(self, model: Path) -> None:
        refitter = trt.Refitter(self.engine, self.messages)
        parser = trt.OnnxParserRefitter(refitter, self.messages)
        if not parser.refit_from_file(str(model.resolve())) or not refitter.refit_cuda_engine():
            raise BackendError(f"the weights of {model} do not fit {self._path}: {self.messages.summary()}. Build it again.")

    def _check_tensors(self, graph: Graph) -> None:
        engine = self.engine
        found = {engine.get_tensor_name(number) for number in range(engine.num_io_tensors)}
        if found != set(self.types):
            raise self._foreign(f"tensors {', '.join(sorted(found ^ set(self.types)))}")
        for tensor in [*graph.inputs, *graph.outputs]:
            kind = engine.get_tensor_dtype(tensor.name).name
            mode = engine.get_tensor_mode(tensor.name) == trt.TensorIOMode.INPUT
            shape = _lengths(engine.get_tensor_shape(tensor.name))
            same = len(shape) == len(tensor.shape) and all(
                isinstance(axis, str) or axis == length for axis, length in zip(tensor.shape, shape, strict=True)
            )
            if kind != _TYPES[tensor.dtype] or mode != (tensor.name in self.inputs) or not same:
                raise self._foreign(f"tensor {tensor.name} of type {kind} and shape {shape}")
            if engine.get_tensor_location(tensor.name) != trt.TensorLocation.DEVICE:
                raise self._foreign(f"tensor {tensor.name} in host memory")

    def _profile(self, number: int, label: str) -> Profile:
        shapes = {}
        for name in self.inputs:
            least, best, most = (_lengths(dims) for dims in self.engine.get_tensor_profile_shape(name, number))
            shapes[name] = (least, best, most)
        return Profile(label, shapes)

    def _foreign(self, what: str) -> BackendError:
        return BackendError(f"{self._path} is not a plan of this bundle's {self.name!r}: it has {what}. Build it again.")


def _lengths(dims: trt.Dims) -> Shape:
    return tuple(dims[axis] for axis in range(len(dims)))
