"""Stream weights from a checkpoint into a bundle, one tensor at a time.

Each parameter is read, converted once to the type the graph asks for, checked to be finite, hashed and written. Three
are in hand at a time: one being read, one being converted, one being written. Peak memory is therefore a few times the
largest tensor, whatever the size of the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from anyflow_deploy.bundle.bundle import BundleWriter
from anyflow_deploy.bundle.manifest import WEIGHTS, Source
from anyflow_deploy.checkpoints.dtypes import SAFETENSORS, TORCH
from anyflow_deploy.checkpoints.safetensors_stream import TYPE_BYTES, Entry, layout
from anyflow_deploy.errors import CheckpointError
from anyflow_deploy.models import Architecture
from anyflow_deploy.progress import Report


@dataclass(frozen=True)
class Parameter:
    """A tensor the graph needs: its safetensors type and shape."""

    type: str
    shape: tuple[int, ...]


class Weights(Protocol):
    """What an exporter needs of a checkpoint; `Checkpoint` and `RandomWeights` are such."""

    @property
    def architecture(self) -> Architecture:
        """The network the weights belong to."""
        ...

    @property
    def source(self) -> Source:
        """Where they came from."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape, without reading values."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One parameter, on the CPU."""
        ...


def check_names(weights: Weights, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Every parameter of the network is there, with its shape, and nothing else is.

    Raises:
        CheckpointError: naming the first few that are missing, unexpected or of another shape.
    """
    given = weights.shapes()
    problems = []
    for title, names in (("missing", wanted.keys() - given.keys()), ("unexpected", given.keys() - wanted.keys())):
        if names:
            problems.append(f"{len(names)} {title}: {', '.join(sorted(names)[:3])}")
    for name in sorted(wanted.keys() & given.keys()):
        if given[name] != wanted[name]:
            problems.append(f"{name} is {given[name]}, config.json makes it {wanted[name]}")
            break
    if problems:
        raise CheckpointError(
            f"the weights in {weights.source.location} do not fit their config.json ({'; '.join(problems)}). "
            "Give the checkpoint they were saved with."
        )


def converted(name: str, tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """A parameter in a floating-point type.

    Raises:
        CheckpointError: a value that is not finite, or too large for the type.
    """
    result = tensor.to(TORCH[kind])
    extremes = torch.aminmax(result)  # NaN comes through, and it is the cheapest pass over the data by far
    if bool(extremes.min.isfinite() & extremes.max.isfinite()):
        return result
    if bool(tensor.isfinite().all()):
        largest = float(tensor.abs().max())
        raise CheckpointError(
            f"{name} reaches {largest:.3g}, more than {kind} can hold ({torch.finfo(TORCH[kind]).max:.6g}). "
            "Export with --precision bf16 (GPU targets) or fp32."
        )
    raise CheckpointError(f"{name} holds NaN or infinity: the checkpoint is damaged, or its training had failed.")


def write_weights(
    writer: BundleWriter,
    weights: Weights,
    parameters: Mapping[str, Parameter],
    constants: Mapping[str, torch.Tensor],
    report: Report,
    convert: Callable[[str, torch.Tensor, str], torch.Tensor] = converted,
) -> dict[str, Entry]:
    """Write `weights.safetensors`.

    Args:
        parameters: the types and shapes that the graph expects.
        constants: further tensors of the graph, written as they are.
        convert: (name, parameter, safetensors type) to what is written; a plan of quantization brings its own.

    Returns:
        Where each tensor lies in the file.

    Raises:
        CheckpointError: a value that is not finite, or too large for its new type.
    """
    kinds = {**{n: Parameter(SAFETENSORS[c.dtype], tuple(c.shape)) for n, c in constants.items()}, **parameters}
    order = sorted(kinds, key=lambda name: -TYPE_BYTES[kinds[name].type])  # stable: wide types first, so all are aligned
    head, entries = layout({n: (kinds[n].type, kinds[n].shape) for n in order}, {"format": "pt"})
    file = writer.create(WEIGHTS)
    total = sum(e.bytes for e in entries.values())
    with report.stage(f"writing weights ({total / 1e9:.2f} GB)", total) as advance, ThreadPoolExecutor(1) as pen:
        written = pen.submit(file.write, head)
        for name, tensor in _read_ahead(weights, (n for n in order if n not in constants), constants, order):
            stored = tensor if name in constants else convert(name, tensor, kinds[name].type)
            data = stored.contiguous().reshape(-1).view(torch.uint8)
            written.result()
            written = pen.submit(file.write, data.numpy().data)
            advance(entries[name].bytes)
        written.result()
    writer.add(WEIGHTS, file.close())
    return entries


def _read_ahead(
    weights: Weights, learned: Iterable[str], constants: Mapping[str, torch.Tensor], order: Iterable[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in order, the next learned one being read while the last is written."""
    with ThreadPoolExecutor(1) as reader:
        coming = iter(learned)
        first = next(coming, None)
        pending = None if first is None else reader.submit(weights.read, first)
        for name in order:
            if name in constants:
                yield name, constants[name]
                continue
            assert pending is not None
            tensor = pending.result()
            following = next(coming, None)
            pending = None if following is None else reader.submit(weights.read, following)
            yield name, tensor


_SAMPLES = 4096
"""Values of each tensor that enter the fingerprint. Training moves all values of a layer, a LoRA included."""


def fingerprint(weights: Weights) -> str:
    """A SHA-256 that tells sets of weights apart, whatever files and whatever type they are stored in.

    It covers every tensor's name and shape and up to 4096 of its values, evenly spread and rounded to bfloat16: a
    checkpoint in float32 and the same in bf16 agree.
    """
    digest = hashlib.sha256()
    for name, shape in sorted(weights.shapes().items()):
        flat = weights.read(name).reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].to(torch.bfloat16)
        digest.update(f"{name} {shape}".encode() + some.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
