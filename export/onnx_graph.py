"""Translates a recorded graph to ONNX, with weights that are bytes of another file.

torch's exporter translates node by node; `optimize=False` keeps every parameter under its own name
(its optimizer would fold transposes into the weights and rename them, and then neither refitting
nor quantizing by name would work). Weights never pass through here: each initializer becomes a
reference into `weights.safetensors`, by offset and length.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import get_args

import onnx_ir as ir
import torch

from anyflow_deploy.bundle.manifest import WEIGHTS, GraphRecord, GraphTensor, TensorType
from anyflow_deploy.checkpoints.dtypes import ONNX_DTYPES
from anyflow_deploy.checkpoints.safetensors_stream import TensorEntry
from anyflow_deploy.dtypes import DTYPES
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.export.passes import make_axes_constant
from anyflow_deploy.export.trace import Axes, TracedGraph

_NAMES: dict[ir.DataType, TensorType] = {
    ir.DataType[str(DTYPES[name].onnx)]: name for name in get_args(TensorType)
}
_SCOPES = "pkg.torch.onnx.name_scopes"


def onnx_from_traced(graph: TracedGraph, opset: int) -> ir.Model:
    """Translate a recorded graph to ONNX.

    Initializers have names, types and shapes, but no data yet.
    """
    with _silence_exporter():
        program = torch.onnx.export(
            graph.program,
            (),
            dynamo=True,
            opset_version=opset,
            optimize=False,
            verbose=False,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
        )
    if program is None:
        raise AnyFlowError(
            "torch.onnx.export returned nothing; this version works with torch 2.13."
        )
    model = program.model
    _name_nodes(model)
    make_axes_constant(model)
    _name_axes(model, graph.symbols, {**graph.inputs, **graph.outputs})
    _drop_unused_weights(model)
    _strip_machine_details(model)
    return model


@contextlib.contextmanager
def _silence_exporter() -> Iterator[None]:
    """Silence torch's exporter.

    It warns about torchvision, which nothing here uses, and about its own internals.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name_nodes(model: ir.Model) -> None:
    """Name nodes after the module they come from, such as `blocks.0.attn1.to_q/Gemm`.

    Profilers and inspectors show these names.
    """
    used: dict[str, int] = {}
    for node in model.graph:
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get(_SCOPES, ""))
        module = scopes[-2] if len(scopes) > 1 else ""
        name = f"{module}/{node.op_type}" if module else node.op_type
        count = used[name] = used.get(name, 0) + 1
        node.name = name if count == 1 else f"{name}_{count}"


def _name_axes(model: ir.Model, symbols: Mapping[str, str], io_axes: Mapping[str, Axes]) -> None:
    """Replace torch's symbols by the names of the axes, in every shape."""
    pattern = re.compile("|".join(rf"\b{re.escape(s)}\b" for s in symbols) or r"(?!)")
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    for value in values:
        if value.shape is None:
            continue
        for index, length in enumerate(value.shape):
            if isinstance(length, ir.SymbolicDim) and length.value is not None:
                value.shape[index] = pattern.sub(lambda m: symbols[m.group()], length.value)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        for index, axis in enumerate(io_axes.get(value.name or "", ())):
            if (
                isinstance(axis, str)
                and value.shape is not None
                and isinstance(value.shape[index], ir.SymbolicDim)
            ):
                value.shape[index] = axis


def _drop_unused_weights(model: ir.Model) -> None:
    """Remove the parameters that this graph does not use."""
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]


def _strip_machine_details(model: ir.Model) -> None:
    """Remove stack traces and file names, which are large and differ on every machine."""
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


def attach_weights(model: ir.Model, entries: Mapping[str, TensorEntry]) -> None:
    """Set each initializer to its place in `weights.safetensors`.

    Raises:
        AnyFlowError: an initializer without an entry, or an entry of another type or shape.
    """
    for name, value in model.graph.initializers.items():
        entry = entries.get(name)
        if entry is None:
            raise AnyFlowError(
                f"the graph needs {name!r}, which is neither a parameter nor a known constant."
            )
        if (
            value.dtype != ONNX_DTYPES[entry.type]
            or value.shape is None
            or tuple(value.shape) != entry.shape
        ):
            raise AnyFlowError(
                f"{name!r} is {value.dtype} {value.shape} in the graph and {entry.type}"
                f" {entry.shape} on disk."
            )
        value.const_value = ir.ExternalTensor(
            WEIGHTS,
            entry.offset,
            entry.bytes,
            ONNX_DTYPES[entry.type],
            shape=ir.Shape(entry.shape),
            name=name,
        )


def serialize_model(model: ir.Model) -> bytes:
    """Return the bytes of the .onnx file."""
    return bytes(ir.serde.serialize_model(model).SerializeToString(deterministic=True))


def describe_graph(model: ir.Model, file: str, opset: int) -> GraphRecord:
    """Describe the graph's inputs and outputs, for the manifest."""
    return GraphRecord(
        file=file,
        opset=opset,
        inputs=[_tensor_record(v) for v in model.graph.inputs],
        outputs=[_tensor_record(v) for v in model.graph.outputs],
    )


def _tensor_record(value: ir.Value) -> GraphTensor:
    assert value.name is not None and value.shape is not None and value.dtype is not None
    shape = [d if isinstance(d, int) else str(d.value) for d in value.shape]
    return GraphTensor(name=value.name, dtype=_NAMES[value.dtype], shape=shape)
