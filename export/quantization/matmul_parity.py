"""Compares every 8-bit product of a bundle on its own: ONNX Runtime against PyTorch.

Two programs that round on the same grid drift apart over a whole network though neither is wrong:
sums in another order differ by 1e-7, a value on a rounding border falls to the other side, and the
next grid spreads that step over a row. So a comparison of whole networks would not show a single
wrong scale. Here each product is compared alone: hooks record the inputs and outputs of each layer
in a run with PyTorch's fake quantization (`fake_quant`), the same nodes (Q/DQ, product, bias) are
extracted from the bundle's graph, and run on the recorded inputs.

The graph's layers take smoothed inputs and return smoothed values (`plan`); the factors s convert
the recorded inputs and outputs.

Legend: N rows, K channels in, M channels out; B batch, A heads, E channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto
from torch import Tensor

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.metrics import difference
from anyflow_deploy.engines.onnxruntime.int8 import saturates, shift_activations, shift_weights
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.export.torch_engine import TorchEngine
from anyflow_deploy.quantization.layers import OPERANDS

ModuleRecords = dict[str, tuple[Array, Array]]
"""Input and output of each module's last call, by the module's name."""


def compare_products(
    bundle: Bundle,
    reference: TorchEngine,
    smooth: Mapping[str, Tensor],
    run: Callable[[TorchEngine], object],
) -> dict[str, float]:
    """Compare every quantized product of a bundle with PyTorch.

    Args:
        bundle: int8 or fp8, base fp32.
        reference: with `FakeQuant` in it, with the same settings as the bundle.
        smooth: SmoothQuant's factors s (K), by layer; see `QuantizationPlan.smooth`.
        run: runs the reference once, so that its layers are called.

    Returns:
        The relative L2 distance of each product, the worst of its graphs. Layers have their own
        names; the products of an attention in FP8 are `blocks.0.attn1.scores` and
        `blocks.0.attn1.mixed`.

    Raises:
        AnyFlowError: the bundle has no product in eight bits, or one whose layer the run did not
            call.
    """
    graphs = {name: _load_graph(bundle, name) for name in bundle.manifest.graphs}
    products = [
        (name, graph, node)
        for graph, model in graphs.items()
        for name, node in _iter_products(model.graph)
    ]
    if not products:
        raise AnyFlowError(
            f"{bundle.path} has no product in eight bits; give an int8 or fp8 bundle."
        )
    records = _record_modules(reference, run)
    distances: dict[str, float] = {}
    for name, graph, node in products:
        inputs, expected = _product_inputs(name, records, smooth)
        result = _run_product(bundle, graphs[graph], node, inputs)
        distances[name] = max(distances.get(name, 0.0), difference(result, expected).relative_l2)
    return distances


def _load_graph(bundle: Bundle, graph: str) -> ModelProto:
    return onnx.load(str(bundle.file(bundle.manifest.graphs[graph].file)), load_external_data=False)


def _iter_products(graph: GraphProto) -> Iterator[tuple[str, NodeProto]]:
    """Yield every Gemm and MatMul with two dequantized operands, with the name of its layer."""
    producers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        operand_producers = [producers.get(name) for name in node.input[:2]]
        if node.op_type not in ("Gemm", "MatMul") or any(
            m is None or m.op_type != "DequantizeLinear" for m in operand_producers
        ):
            continue
        if node.op_type == "Gemm":
            yield node.name.removesuffix("/Gemm"), node
        else:
            attention, _, operation = node.name.rpartition("/")
            yield f"{attention}.{'scores' if operation == 'MatMul' else 'mixed'}", node


def _record_modules(reference: TorchEngine, run: Callable[[TorchEngine], object]) -> ModuleRecords:
    """Record input and output of every module with quantizers and of attention's quantizers."""
    records: ModuleRecords = {}

    def make_hook(name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Tensor, ...], producers: Tensor) -> None:
            records[name] = (_array(inputs[0]), _array(producers))

        return hook

    modules = dict(reference.network.named_modules())
    operands = [f"{name}_quantizer" for name in OPERANDS]
    names = [
        n
        for n, m in modules.items()
        if hasattr(m, "input_quantizer") or n.rpartition(".")[2] in operands
    ]
    hooks = [modules[name].register_forward_hook(make_hook(name)) for name in names]
    try:
        run(reference)
    finally:
        for hook in hooks:
            hook.remove()
    return records


def _array(tensor: Tensor) -> Array:
    return np.array(tensor.detach().cpu().numpy(), dtype=np.float32, order="C")


def _product_inputs(
    name: str, records: ModuleRecords, smooth: Mapping[str, Tensor]
) -> tuple[list[Array], Array]:
    """Return the inputs of the graph's product, and the output it should have."""
    layer, _, kind = name.rpartition(".")
    try:
        if kind == "scores":
            (query, q), (key, k) = (
                _heads_first(records[f"{layer}.{operand}_quantizer"])
                for operand in ("query", "key")
            )
            return [query, key.swapaxes(-1, -2)], q @ k.swapaxes(-1, -2)
        if kind == "mixed":
            weights, p = records[f"{layer}.probabilities_quantizer"]
            value, v = _heads_first(records[f"{layer}.value_quantizer"])
            return [weights, value], p @ v
        x, y = records[name]
    except KeyError:
        raise AnyFlowError(
            f"{name} did not run in PyTorch; give a `run` that calls every layer."
        ) from None
    return [_divide(x, smooth.get(name))], _divide(
        y, smooth.get(f"{layer}.to_out.0") if kind == "to_v" else None
    )


def _heads_first(pair: tuple[Array, Array]) -> tuple[Array, Array]:
    """Transpose both arrays from (B, N, A, E) to (B, A, N, E)."""
    return pair[0].swapaxes(1, 2), pair[1].swapaxes(1, 2)


def _divide(x: Array, s: Tensor | None) -> Array:
    return x if s is None else x * (1 / s).numpy()


def _run_product(bundle: Bundle, model: ModelProto, node: NodeProto, inputs: list[Array]) -> Array:
    """Extract a product with its Q/DQ and its bias from the graph, and run it like the engine."""
    import onnxruntime

    producers = {name: other for other in model.graph.node for name in other.output}
    sources = [producers[name] for name in node.input[: len(inputs)]]
    names = [producers[source.input[0]].input[0] for source in sources]
    bias_add = next(
        (n for n in model.graph.node if n.op_type == "Add" and node.output[0] in n.input), None
    )
    end = bias_add if node.op_type == "Gemm" and bias_add is not None else node
    submodel = onnx.utils.Extractor(model).extract_model(names, [end.output[0]])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(bundle.path.resolve())
    )
    if bundle.manifest.precision == "int8":
        shift_activations(submodel)
        if saturates(onnxruntime):
            shift_weights(submodel)
    if bundle.manifest.precision == "fp8":
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(
        submodel.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(
        None, {name: np.ascontiguousarray(x) for name, x in zip(names, inputs, strict=True)}
    )
    return np.asarray(result, dtype=np.float32)
