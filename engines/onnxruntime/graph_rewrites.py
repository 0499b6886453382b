"""Rewrites of a bundle's graph for ONNX Runtime: fused attention and unsigned integers.

The bundle is standard ONNX: attention is two matrix products and a softmax (opset 20), or
`Attention` (opset 23). Run literally, both write out the whole table of scores: 51 GB at 480x832
and 81 frames. ONNX Runtime has a kernel that does not, `com.microsoft.MultiHeadAttention`, but does
not recognise the pattern. So the graph is rewritten in memory, on the way into the session; the
bundle on disk stays as it is. A test compares both, and counts that none is missed. Activations
and, where the processor needs it, weights in INT8 are shifted for the CPU, see `int8`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from onnx import NodeProto, helper

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.onnxruntime.int8 import shift_activations, shift_weights
from anyflow_deploy.errors import BackendError

_DOMAIN = "com.microsoft"
_HEADS_FIRST = [0, 2, 1, 3]
_KEYS_LAST = [0, 1, 3, 2]


def build_session_graph(
    bundle: Bundle, graph: str, attentions: int, provider: str, unsigned_weights: bool = False
) -> bytes:
    """Build the serialized model of a session, without its weights.

    The weights stay in the bundle's file.

    Args:
        bundle: an opened bundle.
        graph: its name in the manifest.
        attentions: how many the graph must have.
        provider: "cpu" or "cuda".
        unsigned_weights: shift int8 weights to uint8 as well, for a CPU that overflows in u8 x s8.

    Raises:
        BundleError: the graph refers to a file that the manifest does not list.
        BackendError: an attention was not recognised: it would write out its table of scores.
    """
    model = onnx.load(
        str(bundle.file(bundle.manifest.graphs[graph].file)), load_external_data=False
    )
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                bundle.file(entry.value)
    if (
        count := fuse_attention(model, bundle.manifest.architecture.num_attention_heads)
    ) != attentions:
        raise BackendError(
            f"{bundle.path}: {count} of {attentions} attentions were recognised, and the others"
            " would need memory for every pair of tokens. Export again with the torch and"
            " onnxscript of constraints.txt."
        )
    if provider == "cpu" and bundle.manifest.precision == "int8":
        shift_activations(model)
        if unsigned_weights:
            shift_weights(model)
    return bytes(model.SerializeToString())


@dataclass(frozen=True)
class _Attention:
    """One attention in a graph.

    Inputs and output are (B, N, heads, channels). `last` is the node whose place it takes.
    """

    query: str
    key: str
    value: str
    output: str
    last: NodeProto


def fuse_attention(model: onnx.ModelProto, heads: int) -> int:
    """Replace every attention of a model in place, and return how many there were."""
    patterns = {id(pattern.last): pattern for pattern in _find_attentions(model.graph)}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        pattern = patterns.get(id(node))
        nodes.extend([node] if pattern is None else _make_attention_nodes(pattern, heads))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _drop_unused(model.graph)
    if patterns:
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    return len(patterns)


def _find_attentions(graph: onnx.GraphProto) -> Iterator[_Attention]:
    producer = {name: node for node in graph.node for name in node.output}
    consumers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)

    def before_transpose(name: str, order: list[int]) -> str | None:
        node = producer.get(name)
        is_match = (
            node is not None
            and node.op_type == "Transpose"
            and list(node.attribute[0].ints) == order
        )
        return node.input[0] if is_match and node is not None else None

    def only_consumer(name: str) -> NodeProto | None:
        return consumers[name][0] if len(consumers.get(name, ())) == 1 else None

    for node in graph.node:
        weighted_sum: NodeProto | None = None
        names: tuple[str, str, str] | None = None
        if (
            node.op_type == "Attention"
            and _attribute(node, "scale") == 1.0
            and len(node.input) == 3
        ):
            weighted_sum = node
            names = (node.input[0], node.input[1], node.input[2])
        elif node.op_type == "Softmax":
            scores = producer.get(node.input[0])
            weighted_sum = only_consumer(node.output[0])
            keys = (
                before_transpose(scores.input[1], _KEYS_LAST)
                if scores is not None and scores.op_type == "MatMul"
                else None
            )
            if (
                keys is not None
                and scores is not None
                and weighted_sum is not None
                and weighted_sum.op_type == "MatMul"
            ):
                names = (scores.input[0], keys, weighted_sum.input[1])
        if weighted_sum is None or names is None:
            continue
        sources = [before_transpose(name, _HEADS_FIRST) for name in names]
        last = only_consumer(weighted_sum.output[0])
        if (
            last is None
            or last.op_type != "Transpose"
            or list(last.attribute[0].ints) != _HEADS_FIRST
        ):
            continue
        query, key, value = sources
        if query is not None and key is not None and value is not None:
            yield _Attention(query, key, value, last.output[0], last)


def _attribute(node: NodeProto, name: str) -> object:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)


def _make_attention_nodes(pattern: _Attention, heads: int) -> Iterator[NodeProto]:
    """Make the nodes that replace an attention: Reshape, MultiHeadAttention, Reshape.

    Queries are scaled already, hence scale 1.
    """
    stem = pattern.output
    joined_shape = f"{stem}_joined"
    split_shape = f"{stem}_split"
    yield helper.make_node("Constant", [], [joined_shape], name=joined_shape, value_ints=[0, 0, -1])
    yield helper.make_node(
        "Constant", [], [split_shape], name=split_shape, value_ints=[0, 0, heads, -1]
    )
    flat = []
    for role, name in (("query", pattern.query), ("key", pattern.key), ("value", pattern.value)):
        flat.append(f"{stem}_{role}")
        yield helper.make_node("Reshape", [name, joined_shape], [flat[-1]], name=flat[-1])
    weighted_sum = f"{stem}_mixed"
    name = pattern.last.name.removesuffix("/Transpose") + "/MultiHeadAttention"
    yield helper.make_node(
        "MultiHeadAttention",
        flat,
        [weighted_sum],
        name=name,
        domain=_DOMAIN,
        num_heads=heads,
        scale=1.0,
    )
    yield helper.make_node(
        "Reshape", [weighted_sum, split_shape], [pattern.output], name=f"{stem}_heads"
    )


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove the nodes whose results no other node and no output reads."""
    used_names = {output.name for output in graph.output}
    used_nodes = []
    for node in reversed(graph.node):
        if used_names.intersection(node.output):
            used_nodes.append(node)
            used_names.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(used_nodes))
