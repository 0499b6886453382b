"""What TensorRT made of a graph: which matrix products run in eight bits, and whether attention is
one kernel.

A strongly typed network says which products *may* run in eight bits; whether the builder found such
kernels is another matter (on Thor, builds have run whole FP8 networks in float32, TensorRT issue
4590). The engine inspector lists the layers of a built engine as JSON, each with the ONNX nodes it
came from (`[ONNX Layer: NAME]` in its metadata), the types it reads and the name of its kernel. So
the products that the graph quantizes are looked up there by name.

Read from documentation and from listings that people have published; none of our own engines has
been inspected yet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from onnx import ModelProto, NodeProto

_NODES = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_EIGHT_BIT_KERNEL = re.compile(r"e4m3|fp8|i8i8|i8f32|s8s8|int8|imma|qmma", re.IGNORECASE)
_WIDE_KERNEL = re.compile(r"gemm_(?:f16|bf16|f32|tf32)", re.IGNORECASE)
_EIGHT_BIT_TYPE = re.compile(r"int8|fp8|e4m3", re.IGNORECASE)
_ATTENTION_KERNEL = re.compile(r"mha|flash", re.IGNORECASE)
_PRODUCTS = ("Gemm", "MatMul")
_PASSED_THROUGH = ("Transpose", "Reshape", "Identity", "Cast", "Unsqueeze", "Squeeze", "Flatten")


@dataclass(frozen=True)
class ExpectedPrecision:
    """What a graph asks for.

    Attributes:
        eight_bit: names of the matrix products that take both operands from a DequantizeLinear.
        attentions: for each attention, the names of its nodes: one `Attention`, or a softmax with
            the products around it.
    """

    eight_bit: tuple[str, ...]
    attentions: tuple[tuple[str, ...], ...]


@dataclass
class PrecisionReport:
    """What the built engines hold; graphs are added up.

    Attributes:
        eight_bit, wide, unknown: products that were to run in eight bits: those that do, those that
            do not, and those that no layer of the inspector names.
        fused, attentions: attentions that are one kernel, and all.
    """

    eight_bit: list[str] = field(default_factory=list)
    wide: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    fused: int = 0
    attentions: int = 0

    def record(self) -> dict[str, Any]:
        """For `EngineRecord.achieved`."""
        expected = len(self.eight_bit) + len(self.wide) + len(self.unknown)
        values: dict[str, Any] = {}
        if expected:
            values["eight_bit_products"] = len(self.eight_bit) / expected
            values["asked_in_eight_bits"] = expected
            values["run_wider"] = self.wide
            values["not_found_by_inspector"] = self.unknown
        if self.attentions:
            values["fused_attention"] = self.fused / self.attentions
        return values

    @property
    def shortfall(self) -> str | None:
        """What was asked for and not achieved, in words."""
        expected = len(self.eight_bit) + len(self.wide) + len(self.unknown)
        if self.wide:
            some = ", ".join(self.wide[:4]) + (", …" if len(self.wide) > 4 else "")
            return (
                f"{len(self.wide)} of {expected} eight-bit matrix products run in a wider type"
                f" ({some})"
            )
        if expected and not self.eight_bit:
            return (
                f"none of {expected} eight-bit matrix products could be found in the inspector's"
                " list"
            )
        return None


def expected_precision(model: ModelProto) -> ExpectedPrecision:
    """Read a graph, with or without its weights."""
    producers = {name: node for node in model.graph.node for name in node.output}
    consumers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    products = [node for node in model.graph.node if node.op_type in _PRODUCTS]
    eight_bit = [
        node.name
        for node in products
        if all(_producer(producers, name).startswith("DequantizeLinear") for name in node.input[:2])
    ]
    attentions = [(node.name,) for node in model.graph.node if node.op_type == "Attention"]
    for node in model.graph.node:
        if node.op_type == "Softmax":
            attentions.append((node.name, *_adjacent_products(node, producers, consumers)))
    return ExpectedPrecision(tuple(eight_bit), tuple(attentions))


def _producer(producers: dict[str, NodeProto], name: str) -> str:
    """The operator that made a tensor, looking through those that only move numbers."""
    node = producers.get(name)
    while node is not None and node.op_type in _PASSED_THROUGH:
        node = producers.get(node.input[0])
    return node.op_type if node is not None else ""


def _adjacent_products(
    softmax: NodeProto, producers: dict[str, NodeProto], consumers: dict[str, list[NodeProto]]
) -> Iterable[str]:
    """The product that a softmax's scores come from, and the one its weights go into: the nearest
    on each side."""
    waiting, seen = [softmax.input[0]], set[str]()
    while waiting:
        node = producers.get(waiting.pop(0))
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.op_type in _PRODUCTS:
            yield node.name
            break
        waiting.extend(node.input[:1])
    following = list(softmax.output)
    while following:
        for node in consumers.get(following.pop(0), []):
            if node.op_type in _PRODUCTS:
                yield node.name
                return
            following.extend(node.output)


def update_report(progress: PrecisionReport, information: str, expected: ExpectedPrecision) -> None:
    """Add one graph's layers.

    Args:
        progress: what is added to.
        information: from `EngineInspector.get_engine_information`, as JSON; made with detailed
            profiling verbosity.
        expected: from `expected_precision`.
    """
    layers = [
        layer for layer in json.loads(information).get("Layers", []) if isinstance(layer, dict)
    ]
    of_node: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        for name in _NODES.findall(str(layer.get("Metadata", ""))):
            of_node.setdefault(name, []).append(layer)
    for name in expected.eight_bit:
        node_layers = of_node.get(name, [])
        place = (
            progress.unknown
            if not node_layers
            else progress.eight_bit
            if any(map(_runs_in_eight_bits, node_layers))
            else progress.wide
        )
        place.append(name)
    progress.attentions += len(expected.attentions)
    progress.fused += sum(_is_fused(nodes, of_node) for nodes in expected.attentions)


def _runs_in_eight_bits(layer: dict[str, Any]) -> bool:
    """By the kernel's name where it tells, else by the types it reads."""
    kernel = str(layer.get("TacticName", ""))
    if _EIGHT_BIT_KERNEL.search(kernel):
        return True
    if _WIDE_KERNEL.search(kernel):
        return False
    return any(
        _EIGHT_BIT_TYPE.search(str(tensor.get("Format/Datatype", "")))
        for tensor in layer.get("Inputs", [])
    )


def _is_fused(nodes: tuple[str, ...], of_node: dict[str, list[dict[str, Any]]]) -> bool:
    """One layer does the softmax and both products, or calls itself an attention kernel."""
    softmax, products = of_node.get(nodes[0], []), nodes[1:]
    if any(
        _ATTENTION_KERNEL.search(f"{layer.get('Name', '')} {layer.get('TacticName', '')}")
        for layer in softmax
    ):
        return True
    return bool(products) and any(
        all(layer in of_node.get(name, []) for name in products) for layer in softmax
    )
