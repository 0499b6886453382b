"""Makes the axes of reductions constants of the graph.

torch's exporter writes `mean(dim=-1)` as ReduceMean whose axes are a Reshape of a constant. ONNX
allows that, but TensorRT's parser requires a constant ("Axis input must be an initializer",
NVIDIA/TensorRT issue 4393, reported for 10.9; the parser's source has that check in 10.1 and
10.16). `optimize=True` would fold it, but would also rename weights, so this one pattern is folded
here. The results stay the same.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


def make_axes_constant(model: ir.Model) -> int:
    """Make the axes of every Reduce operator a constant, and return how many were changed.

    It replaces reshaped constants by one constant.
    """
    count = 0
    for node in list(model.graph):
        if not node.op_type.startswith("Reduce") or len(node.inputs) < 2 or node.inputs[1] is None:
            continue
        reshape = node.inputs[1].producer()
        source = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
        constant = source.producer() if source is not None else None
        values = _constant_values(constant) if constant is not None else None
        if reshape is None or values is None:
            continue
        axes = ir.Node(
            "",
            "Constant",
            [],
            attributes=[ir.AttrTensor("value", ir.Tensor(values.reshape(-1)))],
            name=f"{node.name}/axes",
            num_outputs=1,
        )
        axes.outputs[0].name = f"{node.outputs[0].name}_axes"
        axes.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        axes.outputs[0].shape = ir.Shape([values.size])
        model.graph.insert_before(node, axes)
        node.replace_input_with(1, axes.outputs[0])
        _remove_unused(model, reshape)
        count += 1
    return count


def _constant_values(node: ir.Node) -> NDArray[np.int64] | None:
    """Return the values of a Constant, as int64; None for any other node."""
    if node.op_type != "Constant":
        return None
    for attribute in node.attributes.values():
        if attribute.name == "value":
            return attribute.as_tensor().numpy().astype(np.int64)
        if attribute.name in ("value_int", "value_ints"):
            return np.atleast_1d(np.array(attribute.value, dtype=np.int64))
    return None


def _remove_unused(model: ir.Model, node: ir.Node) -> None:
    """Remove a node that nothing reads, and then the nodes that only it read."""
    if any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    sources = [value.producer() for value in node.inputs if value is not None]
    model.graph.remove(node, safe=True)
    for source in sources:
        if source is not None and source.graph is model.graph:
            _remove_unused(model, source)
