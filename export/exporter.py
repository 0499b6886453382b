"""Export: weights in, bundle out.

    bundle = export_bundle(open_checkpoint("checkpoint/"), Path("bundle"), precision="fp16")

Everything that can be refused is refused first (names, shapes, precision, target, ranges, disk space, destination);
then the graph is traced, the weights are streamed, ONNX's own checker reads the result, and the folder gets its name.
"""

from __future__ import annotations

import importlib.metadata
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir

from anyflow_deploy.bundle import Bundle, BundleWriter
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.export.checkpoint import shift_of
from anyflow_deploy.export.onnx_graph import (
    FUSED_OPSET,
    OPSETS,
    PRIMITIVE_OPSET,
    attach_weights,
    described,
    onnx_from_traced,
    serialized,
)
from anyflow_deploy.export.random_weights import parameter_shapes
from anyflow_deploy.export.safetensors_stream import Entry
from anyflow_deploy.export.trace import Parameter, traced_graph
from anyflow_deploy.export.transformer import constants
from anyflow_deploy.export.weights import Weights, check_names, write_weights
from anyflow_deploy.manifest import GRAPHS, Achieved, Graph, Manifest, ScheduleDefaults, Video, stored_ranges
from anyflow_deploy.models import FPS, MODELS, SPATIAL_FACTOR, TEMPORAL_FACTOR, TEXT_TOKENS, Architecture, model_name
from anyflow_deploy.precision import get_precision
from anyflow_deploy.progress import Report, Silent
from anyflow_deploy.ranges import Range, Ranges, narrowed, widest
from anyflow_deploy.targets import check_precision, get_target

_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "diffusers")


@dataclass(frozen=True)
class ExportSettings:
    """How to export.

    Attributes:
        precision: "fp32", "fp16" or "bf16".
        target: row of the target table the bundle is meant for.
        opset: 20 (primitive operators) or 23 (`Attention`, `RMSNormalization`).
        ranges: axes narrower than the model allows, in latent units.
        overwrite: replace a bundle at the destination.
    """

    precision: str = "fp32"
    target: str = "cpu"
    opset: int = PRIMITIVE_OPSET
    ranges: dict[str, Range] = field(default_factory=dict)
    overwrite: bool = False


def export_bundle(weights: Weights, output: Path, settings: ExportSettings | None = None, report: Report | None = None) -> Bundle:
    """Export a model.

    Args:
        weights: a `Checkpoint` or `RandomWeights`.
        output: folder to create.
        settings: see `ExportSettings`.
        report: where progress goes.

    Raises:
        AnyFlowError: whatever does not fit, before work starts; nothing is left at `output`.
    """
    settings, report = settings or ExportSettings(), report or Silent()
    architecture = weights.architecture
    ranges = checked(weights, settings)
    schedule = ScheduleDefaults(shift=shift_of(weights), steps=4)
    writer = BundleWriter(output, settings.overwrite)
    _check_space(output.parent, architecture, settings.precision)
    with writer:
        models: dict[str, ir.Model] = {}
        parameters: dict[str, Parameter] = {}
        for name in GRAPHS[_kind(architecture)]:
            with report.stage(f"tracing {name}, {architecture.num_layers} layers"):
                traced = traced_graph(name, architecture, ranges, settings.precision, fused=settings.opset == FUSED_OPSET)
            with report.stage(f"translating to ONNX opset {settings.opset}"):
                models[name] = onnx_from_traced(traced, settings.opset)
            parameters = traced.parameters  # the same in every graph
        entries = write_weights(writer, weights, parameters, constants(architecture), report)
        graphs = {name: _written(writer, name, model, entries, settings.opset) for name, model in models.items()}
        return writer.finish(_manifest(weights, settings, ranges, schedule, graphs, _weight_bytes(models.values(), entries)))


def _written(writer: BundleWriter, name: str, model: ir.Model, entries: dict[str, Entry], opset: int) -> Graph:
    """Write one graph and let ONNX's own checker read it back."""
    file = f"{name}.onnx"
    attach_weights(model, entries)
    writer.write(file, serialized(model))
    onnx.checker.check_model(str(writer.folder / file))
    return described(model, file, opset)


def checked(weights: Weights, settings: ExportSettings) -> Ranges:
    """Refuse what cannot be exported, without touching the disk; returns the ranges that will be declared."""
    architecture = weights.architecture
    if settings.opset not in OPSETS:
        raise AnyFlowError(f"opset is {settings.opset}; allowed are {' and '.join(map(str, OPSETS))}.")
    get_precision(settings.precision)
    check_precision(get_target(settings.target), settings.precision)
    check_names(weights, parameter_shapes(architecture))
    return narrowed(widest(architecture), settings.ranges)


def _check_space(folder: Path, architecture: Architecture, precision: str) -> None:
    """The bundle has to fit on the disk beside whatever it replaces."""
    shapes = parameter_shapes(architecture).values()
    needed = sum(math.prod(shape) for shape in shapes) * get_precision(precision).bytes * 1.05
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise AnyFlowError(f"the bundle takes about {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free. Make room.")


def _weight_bytes(models: Iterable[ir.Model], entries: dict[str, Entry]) -> dict[str, int]:
    """Bytes of weights by type, counted from the graphs; what two graphs share counts once."""
    found: dict[str, int] = {}
    for name in {name for model in models for name in model.graph.initializers}:
        kind = entries[name].type
        found[kind] = found.get(kind, 0) + entries[name].bytes
    return found


def _manifest(
    weights: Weights,
    settings: ExportSettings,
    ranges: Ranges,
    schedule: ScheduleDefaults,
    graphs: dict[str, Graph],
    weight_bytes: dict[str, int],
) -> Manifest:
    architecture = weights.architecture
    name = model_name(architecture)
    return Manifest(
        kind=_kind(architecture),
        model=name,
        config=architecture.as_config(),
        source=weights.source,
        precision=settings.precision,
        achieved=Achieved(weight_bytes=weight_bytes),
        target=settings.target,
        graphs=graphs,
        ranges=stored_ranges(ranges),
        schedule=schedule,
        video=_video(architecture, ranges),
        tools={tool: importlib.metadata.version(tool) for tool in ("anyflow-deploy", *_TOOLS)},
        files={},
    )


def _kind(a: Architecture) -> Literal["bidirectional", "causal"]:
    return "causal" if a.causal else "bidirectional"


def _video(a: Architecture, ranges: Ranges) -> Video:
    """Wan's factors, and the model's default size moved into the ranges; a causal model's length is its chunk plan's."""
    frames, height, width = MODELS.get(model_name(a), MODELS["1.3b"]).video
    latent = sum(a.chunk_partition) if a.chunk_partition else ranges.frames.nearest((frames - 1) // TEMPORAL_FACTOR + 1)
    return Video(
        spatial_factor=SPATIAL_FACTOR,
        temporal_factor=TEMPORAL_FACTOR,
        fps=FPS,
        text_tokens=ranges.text.nearest(TEXT_TOKENS),
        frames=(latent - 1) * TEMPORAL_FACTOR + 1,
        height=ranges.height.nearest(height // SPATIAL_FACTOR) * SPATIAL_FACTOR,
        width=ranges.width.nearest(width // SPATIAL_FACTOR) * SPATIAL_FACTOR,
    )
