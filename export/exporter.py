"""Exports weights into a bundle.

    bundle = export_bundle(open_checkpoint("checkpoint/"), Path("bundle"), precision="fp16")

Everything that can be checked is checked first (names, shapes, precision, target, ranges, disk
space, destination). Then the graph is traced, the weights are streamed, ONNX's own checker reads
the result, and the folder gets its name.
"""

from __future__ import annotations

import importlib.metadata
import math
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir

from anyflow_deploy.bundle.bundle import Bundle, BundleWriter
from anyflow_deploy.bundle.manifest import (
    GRAPHS,
    AchievedPrecision,
    GraphRecord,
    Manifest,
    Quantization,
    ScheduleDefaults,
    VideoDefaults,
    records_from_ranges,
)
from anyflow_deploy.checkpoints.checkpoint import schedule_shift
from anyflow_deploy.checkpoints.safetensors_stream import TensorEntry
from anyflow_deploy.checkpoints.weights import (
    ParameterSpec,
    Weights,
    check_parameters,
    write_weights,
)
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.export.onnx_graph import (
    attach_weights,
    describe_graph,
    onnx_from_traced,
    serialize_model,
)
from anyflow_deploy.export.operator_choice import (
    FUSED_OPSET,
    AttentionOp,
    OperatorChoice,
    choose_operators,
)
from anyflow_deploy.export.quantization.calibrate import check_architecture, check_calibration
from anyflow_deploy.export.quantization.plan import QuantizationPlan, plan_quantization
from anyflow_deploy.export.quantization.precision_report import count_precisions
from anyflow_deploy.export.quantization.qdq_pass import insert_qdq
from anyflow_deploy.export.trace import trace_graph
from anyflow_deploy.memory.parameter_shapes import parameter_shapes
from anyflow_deploy.model.transformer import constants
from anyflow_deploy.models import (
    FPS,
    MODELS,
    SPATIAL_FACTOR,
    TEMPORAL_FACTOR,
    TEXT_TOKENS,
    Architecture,
    model_name,
)
from anyflow_deploy.precision import PrecisionSpec, get_precision, resolve_precision
from anyflow_deploy.progress import NullProgress, Progress
from anyflow_deploy.quantization.calibration import CALIBRATION, Calibration
from anyflow_deploy.quantization.layers import quantizable_layers
from anyflow_deploy.shape_ranges import Range, ShapeRanges, narrow_ranges, widest_ranges
from anyflow_deploy.targets import check_precision, get_target

_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "diffusers")


@dataclass(frozen=True)
class ExportSettings:
    """The settings of an export.

    Attributes:
        precision: "fp32", "fp16", "bf16", "int8" or "fp8".
        target: name of the target that the bundle is meant for, a row of `TARGETS`.
        opset: 20 (primitive operators) or 23 (`Attention`, `RMSNormalization`); None: what
            `attention_op` needs.
        attention_op: "attention" (ONNX's operator, opset 23), "primitive", or "auto": by target,
            opset and precision, see `choose_operators`.
        ranges: axes narrower than the model allows, in latent units.
        overwrite: replace a bundle at the destination.

    The rest is for int8 and fp8 only:

        base: precision of everything that is not quantized; None chooses by the target.
        calibration: ranges of the layers' inputs, of these weights.
        smooth: SmoothQuant, in int8.
        full_precision_layers: names of layers that stay in the base.
        attention: "high" for the base, or "fp8", which also quantizes the products in attention, at
            precision fp8, written as primitive operators.
    """

    precision: str = "fp32"
    target: str = "cpu"
    opset: int | None = None
    ranges: dict[str, Range] = field(default_factory=dict)
    overwrite: bool = False
    base: str | None = None
    calibration: Calibration | None = None
    smooth: bool = True
    full_precision_layers: tuple[str, ...] = ()
    attention: str = "high"
    attention_op: str = "auto"

    @cached_property
    def spec(self) -> PrecisionSpec:
        """The precision, complete.

        Raises:
            AnyFlowError: unknown names, or settings that do not go together.
        """
        return resolve_precision(
            self.precision, self.base, self.target, self.attention, self.smooth
        )

    @cached_property
    def operators(self) -> OperatorChoice:
        """Opset and form of attention, decided.

        Raises:
            AnyFlowError: unknown names, or settings that do not go together.
        """
        return choose_operators(self.attention_op, self.opset, self.target, self.spec)


def export_bundle(
    weights: Weights,
    output: Path,
    settings: ExportSettings | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a model into a bundle.

    Args:
        weights: a `Checkpoint` or `RandomWeights`.
        output: folder to create.
        settings: see `ExportSettings`.
        progress: shows the progress of the work.

    Raises:
        AnyFlowError: a setting or a weight that cannot be exported, before work starts. Nothing is
            left at `output`.
    """
    settings = settings or ExportSettings()
    progress = progress or NullProgress()
    architecture = weights.architecture
    ranges = validate_export(weights, settings)
    opset = settings.operators.opset
    schedule = ScheduleDefaults(shift=schedule_shift(weights), steps=4)
    writer = BundleWriter(output, settings.overwrite)
    _check_space(output.parent, architecture, settings)
    plan = _plan_quantization(weights, settings, progress)
    with writer:
        models: dict[str, ir.Model] = {}
        parameters: dict[str, ParameterSpec] = {}
        for name in GRAPHS[_model_kind(architecture)]:
            # The parameters are the same in every graph
            models[name], parameters = translate_graph(
                name,
                architecture,
                ranges,
                settings.spec.base,
                opset,
                settings.operators.attention_op,
                progress,
            )
            if plan is not None:
                insert_qdq(models[name], plan)
        entries = _write_weights(writer, weights, parameters, plan, progress)
        if plan is not None and settings.calibration is not None:
            writer.write(CALIBRATION, settings.calibration.model_dump_json(by_alias=True).encode())
        graphs = {
            name: _write_graph(writer, name, model, entries, opset)
            for name, model in models.items()
        }
        video = _default_video(architecture, ranges)
        precision_report = count_precisions(
            models, entries, architecture, video, plan.full_precision_layers if plan else {}
        )
        return writer.finish(
            _build_manifest(weights, settings, ranges, schedule, graphs, precision_report, video)
        )


def translate_graph(
    name: str,
    architecture: Architecture,
    ranges: ShapeRanges,
    precision: str,
    opset: int,
    attention_op: AttentionOp,
    progress: Progress,
) -> tuple[ir.Model, dict[str, ParameterSpec]]:
    """Trace one graph, and return it in ONNX with the parameters that its weights must provide.

    The result does not depend on the values of the weights.

    Args:
        name: a name in `MODULES`.
        architecture, ranges: see `trace_graph`.
        precision: of everything that is not quantized.
        opset: in `OPSETS`; RMS norm is one operator in the newer.
        attention_op: how attention is written.
        progress: shows the progress of the work.
    """
    with progress.stage(f"tracing {name}, {architecture.num_layers} layers"):
        graph = trace_graph(
            name,
            architecture,
            ranges,
            precision,
            fused=opset == FUSED_OPSET,
            fused_attention=attention_op == "attention",
        )
    with progress.stage(f"translating to ONNX opset {opset}"):
        return onnx_from_traced(graph, opset), graph.parameters


def _plan_quantization(
    weights: Weights, settings: ExportSettings, progress: Progress
) -> QuantizationPlan | None:
    """Check that the calibration belongs to these weights, and plan what is quantized."""
    calibration = settings.calibration
    if not settings.spec.quantized:
        return None
    if calibration is None:
        raise AnyFlowError(
            f"precision {settings.precision} needs a calibration. Make one with anyflow-calibrate."
        )
    with progress.stage("comparing the weights with the calibration's"):
        check_calibration(calibration, weights)
    return plan_quantization(
        weights, calibration, settings.spec, settings.full_precision_layers, progress
    )


def _write_weights(
    writer: BundleWriter,
    weights: Weights,
    parameters: dict[str, ParameterSpec],
    plan: QuantizationPlan | None,
    progress: Progress,
) -> dict[str, TensorEntry]:
    fixed_tensors = constants(weights.architecture)
    if plan is None:
        return write_weights(writer, weights, parameters, fixed_tensors, progress)
    return write_weights(
        writer,
        weights,
        plan.convert_specs(parameters),
        {**fixed_tensors, **plan.constants},
        progress,
        plan.convert_parameter,
    )


def _write_graph(
    writer: BundleWriter, name: str, model: ir.Model, entries: dict[str, TensorEntry], opset: int
) -> GraphRecord:
    """Write one graph, and read it back with ONNX's own checker."""
    file = f"{name}.onnx"
    attach_weights(model, entries)
    writer.write(file, serialize_model(model))
    onnx.checker.check_model(str(writer.folder / file))
    return describe_graph(model, file, opset)


def validate_export(weights: Weights, settings: ExportSettings) -> ShapeRanges:
    """Refuse an invalid export without touching the disk, and return the ranges it will declare."""
    architecture = weights.architecture
    for name in (settings.spec.precision, settings.spec.base):
        check_precision(get_target(settings.target), name)
    choose_operators(settings.attention_op, settings.opset, settings.target, settings.spec)
    _check_quantization(architecture, settings)
    check_parameters(weights, parameter_shapes(architecture))
    return narrow_ranges(widest_ranges(architecture), settings.ranges)


def _check_quantization(architecture: Architecture, s: ExportSettings) -> None:
    """Refuse settings of quantization that do not go together."""
    if not s.spec.quantized:
        useless = [
            name
            for name, value in (
                ("calibration", s.calibration),
                ("full_precision_layers", s.full_precision_layers),
            )
            if value
        ]
        if useless:
            what = " and ".join(useless)
            raise AnyFlowError(
                f"precision {s.precision} quantizes nothing, so {what} would have no effect. Leave"
                " it out."
            )
        return
    if s.calibration is not None:
        check_architecture(s.calibration, architecture)


def _check_space(folder: Path, architecture: Architecture, settings: ExportSettings) -> None:
    """Refuse a bundle that does not fit on the disk beside the one it replaces."""
    shapes = parameter_shapes(architecture)
    quantized_weights = (
        {f"{layer}.weight" for layer in quantizable_layers(architecture)}
        if settings.spec.quantized
        else set()
    )
    base_bytes = get_precision(settings.spec.base).bytes
    quantized_bytes = get_precision(settings.precision).bytes
    needed_bytes = (
        sum(
            math.prod(shape) * (quantized_bytes if name in quantized_weights else base_bytes)
            for name, shape in shapes.items()
        )
        * 1.05
    )
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise AnyFlowError(
            f"the bundle takes about {needed_bytes / 1e9:.1f} GB, and {folder} has"
            f" {free_bytes / 1e9:.1f} GB free. Free disk space, or choose another --output."
        )


def _build_manifest(
    weights: Weights,
    settings: ExportSettings,
    ranges: ShapeRanges,
    schedule: ScheduleDefaults,
    graphs: dict[str, GraphRecord],
    precision_report: AchievedPrecision,
    video: VideoDefaults,
) -> Manifest:
    architecture = weights.architecture
    name = model_name(architecture)
    return Manifest(
        kind=_model_kind(architecture),
        model=name,
        config=architecture.as_config(),
        source=weights.source,
        precision=settings.precision,
        quantization=_quantization_record(settings),
        achieved=precision_report,
        target=settings.target,
        attention_op=settings.operators.attention_op,
        graphs=graphs,
        ranges=records_from_ranges(ranges),
        schedule=schedule,
        video=video,
        tools={tool: importlib.metadata.version(tool) for tool in ("anyflow-deploy", *_TOOLS)},
        files={},
    )


def _quantization_record(s: ExportSettings) -> Quantization | None:
    if s.calibration is None:
        return None
    spec = s.spec
    return Quantization(
        base=spec.base, smooth=spec.smooth, attention=spec.attention, weights=s.calibration.weights
    )


def _model_kind(a: Architecture) -> Literal["bidirectional", "causal"]:
    return "causal" if a.causal else "bidirectional"


def _default_video(a: Architecture, ranges: ShapeRanges) -> VideoDefaults:
    """Return the model's default video, moved into the ranges, with Wan's factors.

    A causal model's length is that of its chunk plan.
    """
    frames, height, width = MODELS.get(model_name(a), MODELS["1.3b"]).video
    latent = (
        sum(a.chunk_partition)
        if a.chunk_partition
        else ranges.frames.nearest((frames - 1) // TEMPORAL_FACTOR + 1)
    )
    return VideoDefaults(
        spatial_factor=SPATIAL_FACTOR,
        temporal_factor=TEMPORAL_FACTOR,
        fps=FPS,
        text_tokens=ranges.text.nearest(TEXT_TOKENS),
        frames=(latent - 1) * TEMPORAL_FACTOR + 1,
        height=ranges.height.nearest(height // SPATIAL_FACTOR) * SPATIAL_FACTOR,
        width=ranges.width.nearest(width // SPATIAL_FACTOR) * SPATIAL_FACTOR,
    )
