"""`anyflow-inspect`: what is in a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anyflow_deploy.bundle.bundle import Bundle, load_bundle
from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.cli.json_output import print_json
from anyflow_deploy.cli.lint import check_versions, print_findings, run_lint
from anyflow_deploy.cli.options import DONE, WORK_ERROR, JsonFlag, Options, run
from anyflow_deploy.progress import console


class InspectOptions(Options):
    """Show what a bundle holds: model, precision, shapes, sizes and hashes.

    With --lint it also shows what TensorRT would refuse of it.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("bundle",)
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "anyflow-inspect tiny-fp32 --verify",
        "anyflow-inspect tiny-fp32 --json",
        "anyflow-inspect tiny-fp32 --lint --tensorrt 10.3,11.4",
    )
    VERDICT: ClassVar[str] = "--lint found something"

    bundle: Path = Field(description="the bundle's folder")
    verify: bool = Field(False, description="read every file and compare its SHA-256")
    json_output: JsonFlag = False
    lint: bool = Field(
        False, description="check every graph against what TensorRT's ONNX parser takes"
    )
    tensorrt: (
        Annotated[
            tuple[str, ...], BeforeValidator(lambda v: v.split(",") if isinstance(v, str) else v)
        ]
        | None
    ) = Field(
        None, description="versions to lint for (default 10.3,11.4: JetPack 6, and the current one)"
    )

    @model_validator(mode="after")
    def _check_versions(self) -> InspectOptions:
        if self.tensorrt is not None:
            if not self.lint:
                raise ValueError(
                    "--tensorrt names the versions that --lint is for: give both, or neither."
                )
            check_versions(self.tensorrt)
        return self


def inspect(options: InspectOptions) -> int:
    """Print what a bundle holds, and lint it if asked; return the exit status."""
    bundle = load_bundle(options.bundle, verify=options.verify)
    out = Console(highlight=False)
    result = run_lint(bundle, options.tensorrt) if options.lint else None
    if options.json_output:
        content: dict[str, Any] = {
            "digest": bundle.digest,
            **bundle.manifest.model_dump(by_alias=True),
        }
        if result is not None:
            content["findings"] = [finding.as_json() for finding in result.findings]
            content["parsers"] = result.parsers
        print_json(content)
    else:
        out.print(*_tables(bundle), sep="\n")
        if result is not None:
            print_findings(out, result)
    hashes = (
        "every SHA-256 agrees" if options.verify else "sizes agree; --verify compares every SHA-256"
    )
    console.print(f"[green]{escape(str(bundle.path))} is complete[/] ({hashes}).")
    return WORK_ERROR if result is not None and result.findings else DONE


def _tables(bundle: Bundle) -> list[Table]:
    manifest = bundle.manifest
    facts = Table(title=f"bundle {escape(bundle.path.name)}", show_header=False)
    for name, value in _facts(manifest):
        facts.add_row(name, escape(value))
    facts.add_row("digest", bundle.digest)
    graphs = Table("graph", "tensor", "type", "shape", title="graphs")
    for graph in manifest.graphs.values():
        for role, tensors in (("in ", graph.inputs), ("out", graph.outputs)):
            for tensor in tensors:
                layer = tensor.name.rpartition(".")[2]
                if layer.isdigit() and layer != "0":  # the cache is alike in every layer
                    continue
                name = tensor.name if not layer.isdigit() else f"{tensor.name[:-1]}N"
                graphs.add_row(
                    graph.file, f"{role} {name}", tensor.dtype, " x ".join(map(str, tensor.shape))
                )
    ranges = Table("axis", "allowed (latent units)", title="declared ranges")
    for axis, span in vars(manifest.shape_ranges).items():
        ranges.add_row(axis, str(span))
    files = Table("file", "bytes", "SHA-256", title="files")
    for name, record in manifest.files.items():
        files.add_row(name, f"{record.bytes:,}", record.sha256)
    return [facts, graphs, ranges, *_list_full_precision_layers(manifest), files]


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    a, video = manifest.architecture, manifest.video
    weights = ", ".join(
        f"{size / 1e6:,.1f} MB {kind}" for kind, size in manifest.achieved.weight_bytes.items()
    )
    revision = f" at {manifest.source.revision}" if manifest.source.revision else ""
    seed = f", seed {manifest.source.seed}" if manifest.source.seed is not None else ""
    return [
        ("model", f"{manifest.model} ({manifest.kind})"),
        ("weights from", f"{manifest.source.kind}: {manifest.source.location}{revision}{seed}"),
        (
            "architecture",
            (
                f"{a.num_layers} layers, {a.num_attention_heads} heads x {a.attention_head_dim},"
                f" ffn {a.ffn_dim}"
            ),
        ),
        ("precision", f"{manifest.precision}; stored: {weights}"),
        *_quantization_rows(manifest),
        ("target", manifest.target),
        ("opset", ", ".join(str(graph.opset) for graph in manifest.graphs.values())),
        *([("attention", _attention_form(manifest))] if manifest.attention_op else []),
        ("default schedule", f"{manifest.schedule.steps} steps, shift {manifest.schedule.shift:g}"),
        (
            "default video",
            f"{video.frames} frames, {video.height} x {video.width} pixels, {video.fps} per second",
        ),
        ("made with", ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items())),
    ]


def _attention_form(manifest: Manifest) -> str:
    """How the graphs write attention."""
    one = manifest.attention_op == "attention"
    return "operator Attention" if one else "MatMul, Softmax, MatMul"


def _quantization_rows(manifest: Manifest) -> list[tuple[str, str]]:
    """List what an 8-bit bundle really has in eight bits."""
    settings, achieved = manifest.quantization, manifest.achieved
    if settings is None:
        return []
    smooth = ", SmoothQuant" if settings.smooth else ""
    return [
        (
            "8-bit share",
            (
                f"{achieved.quantized_flops:.1%} of the products' operations,"
                f" {achieved.quantized_weights:.1%} of the weights"
            ),
        ),
        (
            "the rest",
            (
                f"{settings.base}; attention"
                f" {settings.base if settings.attention == 'high' else settings.attention}{smooth}"
            ),
        ),
        ("calibrated on", f"weights {settings.weights[:12]}…"),
    ]


def _list_full_precision_layers(manifest: Manifest) -> list[Table]:
    """List the layers that an 8-bit precision left in the base's type."""
    table = Table("layer", "reason", title=f"kept in {manifest.base}")
    for layer, reason in manifest.achieved.full_precision_layers.items():
        table.add_row(layer, escape(reason))
    return [table] if manifest.achieved.full_precision_layers else []


def main() -> None:
    """Run `anyflow-inspect` with the flags of the command line."""
    run("anyflow-inspect", InspectOptions, inspect)
