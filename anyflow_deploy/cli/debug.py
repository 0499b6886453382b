"""`anyflow-debug`: the layer where an engine leaves the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field, model_validator
from rich.markup import escape

from anyflow_deploy.bundle.atomic_io import write_text_atomically
from anyflow_deploy.bundle.bundle import Bundle, load_bundle
from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.bundle.outputs import OutputFile
from anyflow_deploy.cli.json_output import print_json
from anyflow_deploy.cli.options import DONE, WORK_ERROR, JsonFlag, Options, run
from anyflow_deploy.cli.validate import calibrated_prompt_embeds, video_shapes
from anyflow_deploy.debugging import DETAILS
from anyflow_deploy.debugging.polygraphy_setup import (
    DEBUG_BACKENDS,
    RTX,
    check_debug_backend,
    use_polygraphy,
)
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.registry import DEFAULT_BACKEND, EngineOptions
from anyflow_deploy.engines.sampler import noise
from anyflow_deploy.engines.validation import THRESHOLDS
from anyflow_deploy.engines.validation_report import can_plot
from anyflow_deploy.errors import AnyFlowError, CheckpointError, suggestion
from anyflow_deploy.pipelines.text_encoder import load_embeddings
from anyflow_deploy.progress import RichProgress, console
from anyflow_deploy.quantization.calibration import CALIBRATION

if TYPE_CHECKING:  # onnx, which --help does not need
    from anyflow_deploy.debugging.backends import GraphSide
    from anyflow_deploy.debugging.divergence import Divergence
    from anyflow_deploy.debugging.inputs import DebugState

REPORT, PICTURE = "debug.json", "debug.png"


class DebugOptions(Options):
    """Find the layer where an engine leaves the reference, with Polygraphy: tensors inside the
    graph become outputs, and both sides are compared by depth.

    The reference is ONNX Runtime in float32 on the processor. By default it has the bundle's own
    weights, so what is found is how the engine computes; --reference compares with another bundle
    of the same checkpoint, which also finds wrong weights. Blocks are compared first, and the
    layers of the first bad one after that. Writes debug.json and debug.png.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("bundle",)
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "anyflow-debug my-int8 --reference my-bundle",
        "anyflow-debug my-fp16 --mark layers --threshold 1e-3",
        "anyflow-debug my-causal --graph compress --reference my-causal-fp32",
        f"anyflow-debug my-fp16 --backend {RTX} --mark layers --bisect",
    )
    VERDICT: ClassVar[str] = "a tensor is over the threshold"

    bundle: Path = Field(description="the bundle's folder")
    backend: str = Field(DEFAULT_BACKEND, description=f"one of {', '.join(DEBUG_BACKENDS)}")
    provider: str | None = Field(
        None, description="what onnxruntime runs on: cpu or cuda (default cpu)"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of ONNX Runtime")
    reference: Path | None = Field(
        None,
        description="another bundle of the same checkpoint (default: the bundle's own weights)",
    )
    graph: str | None = Field(None, description="causal: text, chunk or compress (default chunk)")
    mark: str = Field(
        "blocks", description="what is compared: blocks and then layers, or all layers, or nodes"
    )
    bisect: bool = Field(
        False, description="mark a few tensors at a time, where all of them need too much memory"
    )
    threshold: float | None = Field(
        None, gt=0, description="relative L2 that is allowed (default: the precision's)"
    )
    prompt_embeds: Path | None = Field(
        None, description="saved embeddings (default: random; of an 8-bit bundle its calibration's)"
    )
    checkpoint: str | None = Field(
        None, description="8 bits: what the bundle was exported from, if that has moved"
    )
    t: float = Field(1000.0, ge=0, le=1000, description="time that the step starts from")
    r: float = Field(0.0, ge=0, le=1000, description="time that the step leads to")
    frames: int = Field(9, description="size of the test video: frames (causal: one chunk)")
    height: int = Field(96, description="pixels")
    width: int = Field(160, description="pixels")
    seed: int = Field(0, ge=0, description="of the test inputs")
    output: Path | None = Field(None, description="folder for the report (default: the bundle)")
    json_output: JsonFlag = False

    @model_validator(mode="after")
    def _consistent(self) -> DebugOptions:
        if self.mark not in DETAILS:
            raise ValueError(
                f"--mark is {self.mark!r}; allowed are {', '.join(DETAILS)}."
                f"{suggestion(self.mark, DETAILS)}"
            )
        if self.r > self.t:
            raise ValueError(
                f"--t is {self.t:g} and --r is {self.r:g}; a step leads down: allowed is t >= r."
            )
        return self


def debug(options: DebugOptions) -> int:
    """Compare, write the report and print it; returns the exit status."""
    check_debug_backend(options.backend, options.provider)
    use_polygraphy(options.backend)
    bundle = load_bundle(options.bundle)
    graph = _graph_name(bundle, options.graph)
    reference = _reference(bundle, options, graph)
    folder = options.output or bundle.path
    with (
        OutputFile(folder / REPORT, overwrite=True, flag="--output") as report,
        OutputFile(folder / PICTURE, overwrite=True, flag="--output") as picture,
    ):
        result, content = _compare(bundle, reference, options, graph, report, picture)
    if options.json_output:
        print_json({"report": str(folder / REPORT), **content})
    return _verdict(result, folder, options)


def _compare(
    bundle: Bundle,
    reference: Bundle,
    options: DebugOptions,
    graph: str,
    report: OutputFile,
    picture: OutputFile,
) -> tuple[Divergence, dict[str, Any]]:
    """Compare, print the tables and write the report; return the result and what was written."""
    from anyflow_deploy.debugging.backends import ReferenceSide
    from anyflow_deploy.debugging.divergence import Comparison, find_divergence
    from anyflow_deploy.debugging.inputs import make_feed

    smoothed = _is_smoothed_differently(bundle, reference)
    state = _state(bundle, options)
    candidate = _candidate(bundle, options, graph)
    threshold = options.threshold or THRESHOLDS[bundle.manifest.precision].transition
    with RichProgress(console) as bars:
        with bars.stage("inputs"):
            side = ReferenceSide(reference, graph, options.threads)
            feed = make_feed(bundle.manifest, graph, state, side.run)
        result = find_divergence(
            Comparison(candidate, side, feed),
            options.mark,
            threshold,
            options.bisect,
            smoothed,
            bars,
        )
    settings = _settings(bundle, reference, options, graph, state)
    return result, _write(report, picture, result, settings)


def _graph_name(bundle: Bundle, asked: str | None) -> str:
    graphs = tuple(bundle.manifest.graphs)
    if asked is None:
        return "chunk" if "chunk" in graphs else graphs[0]
    if asked not in graphs:
        raise AnyFlowError(
            f"--graph is {asked!r}; {bundle.path} has"
            f" {', '.join(graphs)}.{suggestion(asked, graphs)}"
        )
    return asked


def _reference(bundle: Bundle, options: DebugOptions, graph: str) -> Bundle:
    """The bundle whose weights are right.

    Raises:
        AnyFlowError: it is of another model, or nothing can differ.
    """
    from anyflow_deploy.debugging.backends import read_graph
    from anyflow_deploy.debugging.reference_graph import is_float32

    if options.reference is None:
        on_cpu = options.backend == DEFAULT_BACKEND and options.provider in (None, "cpu")
        if on_cpu and is_float32(read_graph(bundle, graph)):
            raise AnyFlowError(
                f"{bundle.path} is {bundle.manifest.precision}: it would be compared with itself on"
                " the same processor. Give --reference BUNDLE, or another --backend or --provider."
            )
        return bundle
    reference = load_bundle(options.reference)
    mine, theirs = bundle.manifest, reference.manifest
    if mine.kind != theirs.kind or mine.architecture != theirs.architecture:
        raise AnyFlowError(
            f"{reference.path} is another model ({theirs.model}, {theirs.kind}) than {bundle.path}"
            f" ({mine.model}, {mine.kind}). Give --reference an export of the same checkpoint."
        )
    if options.mark == "nodes" and (
        mine.quantization != theirs.quantization
        or mine.graphs[graph].opset != theirs.graphs[graph].opset
    ):
        raise AnyFlowError(
            "--mark nodes compares graphs that have the same operators, and these were quantized"
            " differently or have another opset. Leave --reference out, or use --mark layers."
        )
    return reference


def _is_smoothed_differently(bundle: Bundle, reference: Bundle) -> bool:
    """Whether SmoothQuant's factors in the two bundles differ; a notice says what that means."""
    mine, theirs = bundle.manifest, reference.manifest
    is_smooth = any(q is not None and q.smooth for q in (mine.quantization, theirs.quantization))
    if not is_smooth or _smoothing_inputs(mine) == _smoothing_inputs(theirs):
        return False
    console.print(
        "[yellow]not compared[/]: layers whose results carry SmoothQuant's factors in only one of"
        " the two bundles, such as norm2 and attn1.to_v. Without --reference they are."
    )
    return True


def _smoothing_inputs(manifest: Manifest) -> tuple[object, ...]:
    """Everything that the factors depend on."""
    layers = manifest.achieved.full_precision_layers
    return manifest.quantization, layers, manifest.files.get(CALIBRATION)


def _state(bundle: Bundle, options: DebugOptions) -> DebugState:
    """Where the step is taken from."""
    from anyflow_deploy.debugging.inputs import DebugState

    manifest = bundle.manifest
    chunks = manifest.architecture.chunk_partition
    if chunks and "frames" in options.model_fields_set:
        raise AnyFlowError(
            f"{bundle.path} is causal: its second chunk is compared, whatever its length. Leave"
            " --frames out."
        )
    past, frames = None, None
    if chunks:
        past, frames = (manifest.shape_ranges.frames.nearest(n) for n in (*chunks, chunks[0])[:2])
    shape, text_shape = video_shapes(bundle, options, frames)
    text = _prompt_embeds(bundle, options, text_shape)
    return DebugState(shape, text, options.t, options.r, options.seed, past or 1)


def _prompt_embeds(bundle: Bundle, options: DebugOptions, shape: tuple[int, ...]) -> Array:
    """Prompt embeddings (B, L, D)."""
    if options.prompt_embeds is not None:
        embeds, _ = load_embeddings(options.prompt_embeds)
        if embeds.ndim != 3 or embeds.shape[2] != shape[2]:
            raise AnyFlowError(
                f"{options.prompt_embeds} holds embeddings of shape {embeds.shape}; this model"
                f" takes (prompts, tokens, {shape[2]})."
            )
        tokens = bundle.manifest.shape_ranges.text.nearest(embeds.shape[1])
        padded = np.zeros((shape[0], tokens, shape[2]), np.float32)
        padded[:, : embeds.shape[1]] = embeds[:1, :tokens]
        return padded
    if bundle.manifest.quantization is None:
        return noise(shape, options.seed + 2)
    from anyflow_deploy.export.diffusers_engine import weights_from_manifest

    try:
        weights = weights_from_manifest(bundle.manifest, options.checkpoint)
    except CheckpointError as error:
        raise AnyFlowError(
            f"{bundle.path} is {bundle.manifest.precision}: it is right within the ranges of its"
            " calibration, which were measured on a text encoder's embeddings. Give"
            f" --prompt-embeds FILE or --checkpoint DIR. ({error})"
        ) from None
    calibrated = calibrated_prompt_embeds(bundle, weights, shape)
    assert calibrated is not None
    return calibrated


def _candidate(bundle: Bundle, options: DebugOptions, graph: str) -> GraphSide:
    from anyflow_deploy.debugging.backends import OnnxRuntimeSide, TensorRTSide

    if options.backend == DEFAULT_BACKEND:
        return OnnxRuntimeSide(
            bundle, graph, EngineOptions(options.provider or "cpu", threads=options.threads)
        )
    return TensorRTSide(bundle, graph, options.backend)


def _settings(
    bundle: Bundle, reference: Bundle, options: DebugOptions, graph: str, state: DebugState
) -> dict[str, Any]:
    """What was compared, for the report."""
    return {
        "bundle_sha256": bundle.digest,
        "reference_sha256": reference.digest,
        "graph": graph,
        "bisect": options.bisect,
        "shape": state.shape,
        "text": state.text.shape,
        "t": state.t,
        "r": state.r,
        "seed": state.seed,
    }


def _write(
    report: OutputFile, picture: OutputFile, result: Divergence, settings: dict[str, Any]
) -> dict[str, Any]:
    """debug.json, debug.png and the tables; returns the contents of debug.json."""
    from anyflow_deploy.debugging.report import (
        divergence_as_json,
        divergence_tables,
        plot_divergence,
    )

    content = {**settings, **divergence_as_json(result)}
    write_text_atomically(report, json.dumps(content, indent=1) + "\n")
    for table in divergence_tables(result):
        console.print(table)
    if can_plot():
        plot_divergence(result, picture)
    else:
        console.print(
            "no picture: matplotlib is not installed (it comes with anyflow-deploy[export])."
        )
    return content


def _verdict(result: Divergence, folder: Path, options: DebugOptions) -> int:
    """Print what was found; returns the exit status."""
    first = result.first
    place = escape(str(folder / REPORT))
    if first is None:
        console.print(
            f"[green]nothing is over {result.threshold:g}[/]: {result.candidate} against"
            f" {result.reference}. Report: {place}"
        )
        return DONE
    found = (
        f"{first.difference.not_finite} elements are NaN or infinite"
        if first.difference.not_finite
        else f"relative L2 {first.difference.relative_l2:.2e}"
    )
    console.print(
        f"[bold red]first over {result.threshold:g}: {first.point.name}[/] ({found}), in"
        f" {result.candidate} against {result.reference}. Report: {place}"
    )
    if first in result.outputs:
        console.print(
            "No tensor inside is over before that output of the graph: the error lies between the"
            " last of them and it, or in operators that the runtime fuses, and marking takes apart."
            + ("" if options.mark == "nodes" else " --mark nodes looks closer.")
        )
    return WORK_ERROR


def main() -> None:
    """Entry point."""
    run("anyflow-debug", DebugOptions, debug)
