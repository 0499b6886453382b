"""Summarize a transition's time by layer, from the runtime's own profiler.

The profiler slows a run down and is never on while times are measured: it watches a few transitions
of its own, and the record says by how much they were slower. Rows carry the operations and bytes of
a layer where its shapes are known, so that each can be compared with the ceilings.
`blocks.7.ffn.net.2/Gemm` is, by part, `ffn.net.2`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from anyflow_deploy.engines.layer_timing import LayerTiming
from anyflow_deploy.profiling.record import Layer

_BLOCK = re.compile(r"^blocks\.\d+\.?")


def layer_rows(timings: Iterable[LayerTiming], transitions: int) -> list[Layer]:
    """Make the record's rows, per transition, slowest first."""
    return _add_shares(
        Layer(
            name=row.name,
            operator=row.operator,
            seconds=row.seconds / transitions,
            share=0.0,
            calls=round(row.calls / transitions),
            operations=row.operations * row.calls / transitions,
            bytes=row.bytes * row.calls / transitions,
            module=row.module,
        )
        for row in timings
    )


def sum_by_operator(layers: Iterable[Layer]) -> list[Layer]:
    """Sum layers by operator."""
    return _group_layers(layers, lambda layer: layer.operator)


def sum_by_part(layers: Iterable[Layer]) -> list[Layer]:
    """Sum layers over the blocks, by the part of the network."""
    return _group_layers(layers, lambda layer: network_part(layer.module or layer.name))


def network_part(name: str) -> str:
    """Return a layer's part of the network: `attn1.to_q` for `blocks.3.attn1.to_q/Gemm`.

    A layer without a module's name is "other".
    """
    stem = name.split(" + ")[0]
    inside = _BLOCK.match(stem)
    words = stem[inside.end() :] if inside else stem
    if "/" not in words:
        return "other" if not inside else re.sub(r"\W.*|_?\d+$", "", words) or "blocks"
    module = words.split("/")[0]
    if not module:
        return "blocks: modulation, norms"
    return "other" if module.startswith("_") or module[0].isupper() else module


def _group_layers(layers: Iterable[Layer], key: Callable[[Layer], str]) -> list[Layer]:
    groups: dict[str, Layer] = {}
    for layer in layers:
        name = key(layer)
        old = groups.get(name)
        if old is None:
            groups[name] = layer.model_copy(update={"name": name})
            continue
        operator = old.operator if old.operator == layer.operator else "several"
        groups[name] = Layer(
            name=name,
            operator=operator,
            seconds=old.seconds + layer.seconds,
            share=0.0,
            calls=old.calls + layer.calls,
            operations=old.operations + layer.operations,
            bytes=old.bytes + layer.bytes,
        )
    return _add_shares(groups.values())


def _add_shares(layers: Iterable[Layer]) -> list[Layer]:
    """Compute each layer's share, and sort them slowest first."""
    rows = sorted(layers, key=lambda layer: -layer.seconds)
    total = sum(layer.seconds for layer in rows) or 1.0
    return [layer.model_copy(update={"share": layer.seconds / total}) for layer in rows]
