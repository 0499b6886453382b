"""Stream weights from a checkpoint into a bundle, one tensor at a time.

Each parameter is read, converted once to the type the graph asks for, checked to be finite, hashed
and written. Three are in memory at a time: one being read, one being converted, one being written.
Peak memory is therefore a few times the largest tensor, whatever the size of the model.
"""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from anyflow_deploy.bundle.bundle import BundleWriter
from anyflow_deploy.bundle.manifest import WEIGHTS, WeightsSource
from anyflow_deploy.checkpoints.dtypes import CHECKPOINT_DTYPES, SAFETENSORS_NAMES
from anyflow_deploy.checkpoints.safetensors_stream import TYPE_BYTES, TensorEntry, build_header
from anyflow_deploy.errors import CheckpointError
from anyflow_deploy.models import Architecture
from anyflow_deploy.progress import Progress


@dataclass(frozen=True)
class ParameterSpec:
    """A tensor the graph needs: its safetensors type and shape."""

    type: str
    shape: tuple[int, ...]


class Weights(Protocol):
    """A set of weights as an exporter reads it; `Checkpoint` and `RandomWeights` are two."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 that identifies the weights, computed by `compute_fingerprint`."""
        ...

    @property
    def architecture(self) -> Architecture:
        """The network the weights belong to."""
        ...

    @property
    def source(self) -> WeightsSource:
        """Where they came from."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return parameter name -> shape, without reading values."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Read one parameter, on the CPU."""
        ...


class WeightsBase(ABC):
    """Base of sets of weights, which do not change once they are open.

    The fingerprint takes a pass over every tensor (28 GB of them in the largest model), and
    calibration, the choice of layers and export all ask for it. So it is computed once and kept.
    """

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return parameter name -> shape, without reading values."""

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """Read one parameter, on the CPU."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 that identifies the weights; the first use reads all of them."""
        return compute_fingerprint(self)


def check_parameters(weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that every parameter of the network is there with its shape, and no other.

    Raises:
        CheckpointError: naming the first few that are missing, unexpected or of another shape.
    """
    shapes = weights.shapes()
    problems = []
    for title, names in (
        ("missing", expected.keys() - shapes.keys()),
        ("unexpected", shapes.keys() - expected.keys()),
    ):
        if names:
            problems.append(f"{len(names)} {title}: {', '.join(sorted(names)[:3])}")
    for name in sorted(expected.keys() & shapes.keys()):
        if shapes[name] != expected[name]:
            problems.append(f"{name} is {shapes[name]}, config.json makes it {expected[name]}")
            break
    if problems:
        raise CheckpointError(
            f"the weights in {weights.source.location} do not fit their config.json"
            f" ({'; '.join(problems)}). Give the checkpoint they were saved with."
        )


def convert_parameter(name: str, tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """Convert a parameter to a floating-point type.

    Args:
        name: of the parameter, for the messages.
        tensor: its values.
        kind: safetensors name of the type, such as "F16".

    Raises:
        CheckpointError: a value that is not finite, or too large for the type.
    """
    result = tensor.to(CHECKPOINT_DTYPES[kind])
    # aminmax passes NaN on, and it is the cheapest pass over the data by far.
    extremes = torch.aminmax(result)
    if bool(extremes.min.isfinite() & extremes.max.isfinite()):
        return result
    if bool(tensor.isfinite().all()):
        largest = float(tensor.abs().max())
        raise CheckpointError(
            f"{name} reaches {largest:.3g}, more than {kind} can hold"
            f" ({torch.finfo(CHECKPOINT_DTYPES[kind]).max:.6g}). Export with --precision bf16 (GPU"
            " targets) or fp32."
        )
    raise CheckpointError(
        f"{name} holds NaN or infinity: the checkpoint is damaged, or its training had failed."
    )


def write_weights(
    writer: BundleWriter,
    weights: Weights,
    parameters: Mapping[str, ParameterSpec],
    constants: Mapping[str, torch.Tensor],
    progress: Progress,
    convert: Callable[[str, torch.Tensor, str], torch.Tensor] = convert_parameter,
) -> dict[str, TensorEntry]:
    """Write `weights.safetensors`.

    Args:
        writer: of the bundle.
        weights: the checkpoint.
        parameters: the types and shapes that the graph expects.
        constants: further tensors of the graph, written as they are.
        progress: shows the bytes written.
        convert: (name, parameter, safetensors type) to what is written; a quantization plan has its
            own.

    Returns:
        Where each tensor lies in the file.

    Raises:
        CheckpointError: a value that is not finite, or too large for its new type.
    """
    specs = {
        **{
            n: ParameterSpec(SAFETENSORS_NAMES[c.dtype], tuple(c.shape))
            for n, c in constants.items()
        },
        **parameters,
    }
    # A stable sort: wide types first, so that all tensors are aligned.
    order = sorted(specs, key=lambda name: -TYPE_BYTES[specs[name].type])
    head, entries = build_header(
        {n: (specs[n].type, specs[n].shape) for n in order}, {"format": "pt"}
    )
    file = writer.create(WEIGHTS)
    total = sum(e.bytes for e in entries.values())
    with (
        progress.stage(f"writing weights ({total / 1e9:.2f} GB)", total) as advance,
        ThreadPoolExecutor(1) as executor,
    ):
        pending_write = executor.submit(file.write, head)
        for name, tensor in _read_ahead(
            weights, (n for n in order if n not in constants), constants, order
        ):
            values = tensor if name in constants else convert(name, tensor, specs[name].type)
            data = values.contiguous().reshape(-1).view(torch.uint8)
            pending_write.result()
            pending_write = executor.submit(file.write, data.numpy().data)
            advance(entries[name].bytes)
        pending_write.result()
    writer.add(WEIGHTS, file.close())
    return entries


def _read_ahead(
    weights: Weights,
    parameter_names: Iterable[str],
    constants: Mapping[str, torch.Tensor],
    order: Iterable[str],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors in order, while the next parameter is read in another thread."""
    with ThreadPoolExecutor(1) as reader:
        remaining = iter(parameter_names)
        first = next(remaining, None)
        pending = None if first is None else reader.submit(weights.read, first)
        for name in order:
            if name in constants:
                yield name, constants[name]
                continue
            assert pending is not None
            tensor = pending.result()
            next_name = next(remaining, None)
            pending = None if next_name is None else reader.submit(weights.read, next_name)
            yield name, tensor


_SAMPLES = 4096
"""Values of each tensor that enter the fingerprint. Training moves all values of a layer, a LoRA
included."""


def compute_fingerprint(weights: Weights | WeightsBase) -> str:
    """Compute a SHA-256 that tells sets of weights apart, whatever type they are stored in.

    It covers every tensor's name and shape and up to 4096 of its values, evenly spread and rounded
    to bfloat16: a checkpoint in float32 and the same in bf16 agree.
    """
    digest = hashlib.sha256()
    for name, shape in sorted(weights.shapes().items()):
        flat = weights.read(name).reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].to(torch.bfloat16)
        digest.update(f"{name} {shape}".encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
