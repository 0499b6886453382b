"""Exporting: what is refused before work starts, what is left behind when it fails (nothing), and
what the manifest says."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anyflow_deploy import (
    MODELS,
    AnyFlowError,
    BackendError,
    Bundle,
    CheckpointError,
    OutputError,
    ShapeError,
    load_engine,
    noise,
)
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.export import exporter
from anyflow_deploy.export.exporter import ExportSettings, export_bundle, validate_export
from anyflow_deploy.shape_ranges import Range
from tests.artifact_cache import translate_uncached
from tests.conftest import SMALL, Export

WEIGHTS = "diffusion_pytorch_model.safetensors"
ONE_LAYER = RandomWeights(
    dataclasses.replace(MODELS["tiny"].architecture, num_layers=1), "one layer"
)


def checkpoint_with(
    folder: Path, name: str, value: float, dtype: torch.dtype = torch.float32
) -> Path:
    """A copy of the small checkpoint with one element changed."""
    shutil.copytree(SMALL, folder)
    (folder / WEIGHTS).chmod(0o644)
    tensors = {n: t.to(dtype) for n, t in load_file(folder / WEIGHTS).items()}
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / WEIGHTS)
    return folder


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    ("precision", "value", "message"),
    [
        (
            "fp16",
            7e4,
            (
                r"blocks.0.ffn.net.2.weight reaches 7e\+04, more than F16 can hold"
                r" \(65504\).*--precision bf16"
            ),
        ),
        ("fp32", float("nan"), "blocks.0.ffn.net.2.weight holds NaN or infinity"),
        ("fp32", float("-inf"), "blocks.0.ffn.net.2.weight holds NaN or infinity"),
    ],
)
def test_bad_values_stop_the_export_and_leave_nothing(
    tmp_path: Path, precision: str, value: float, message: str
) -> None:
    source = checkpoint_with(tmp_path / "checkpoint", "blocks.0.ffn.net.2.weight", value)
    with pytest.raises(CheckpointError, match=message):
        export_bundle(open_checkpoint(source), tmp_path / "bundle", ExportSettings(precision))
    assert left_in(tmp_path) == ["checkpoint"]


def test_a_large_value_of_a_float32_layer_is_kept_in_fp16(tmp_path: Path) -> None:
    source = checkpoint_with(tmp_path / "checkpoint", "proj_out.bias", 7e4)
    bundle = export_bundle(open_checkpoint(source), tmp_path / "bundle", ExportSettings("fp16"))
    assert load_file(bundle.path / "weights.safetensors")["proj_out.bias"][3] == 7e4


def test_a_bf16_checkpoint_is_widened_exactly(tmp_path: Path) -> None:
    source = checkpoint_with(tmp_path / "checkpoint", "proj_out.bias", 0.5, torch.bfloat16)
    bundle = export_bundle(open_checkpoint(source), tmp_path / "bundle")
    stored = load_file(bundle.path / "weights.safetensors")
    given = load_file(source / WEIGHTS)
    assert all(
        stored[name].dtype == torch.float32 and torch.equal(stored[name], given[name].float())
        for name in given
    )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            ExportSettings("bf16"),
            BackendError,
            (
                r"no bf16 matrix product\). Choose --precision fp32 or fp16 or int8 or fp8, or a"
                r" target .*: orin"
            ),
        ),
        (ExportSettings("fp9"), AnyFlowError, "unknown precision 'fp9'.*Did you mean 'fp8'"),
        (
            ExportSettings(target="h1000"),
            AnyFlowError,
            "unknown target 'h1000'.*Did you mean 'h100'",
        ),
        (ExportSettings(opset=21), AnyFlowError, "opset is 21; allowed are 20 and 23"),
        (
            ExportSettings(ranges={"frames": Range(1, 300)}),
            AnyFlowError,
            "frames 1 to 300 reaches outside .* 1 to 256",
        ),
    ],
)
def test_impossible_settings_are_refused_before_work(
    settings: ExportSettings, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        validate_export(ONE_LAYER, settings)


def test_a_full_disk_is_noticed_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(exporter.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(AnyFlowError, match=r"takes about 0.0 GB, and .* has 0.0 GB free"):
        export_bundle(ONE_LAYER, tmp_path / "bundle")
    assert left_in(tmp_path) == []


def test_a_taken_destination_is_noticed_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "notes.txt").write_text("mine")
    monkeypatch.setattr(exporter, "trace_graph", lambda *_, **__: pytest.fail("work had started"))
    with pytest.raises(OutputError, match="exists"):
        export_bundle(ONE_LAYER, tmp_path / "bundle")


def test_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> torch.Tensor:
        raise KeyboardInterrupt

    weights = RandomWeights(ONE_LAYER.architecture, "one layer")
    monkeypatch.setattr(weights, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(weights, tmp_path / "bundle")
    assert left_in(tmp_path) == []


def test_declared_ranges_are_enforced_by_the_engine(tmp_path: Path) -> None:
    ranges = {
        "batch": Range(1, 1),
        "frames": Range(1, 3),
        "height": Range(4, 8, 2),
        "width": Range(6, 6, 2),
        "text": Range(5, 5),
    }
    bundle = export_bundle(ONE_LAYER, tmp_path / "bundle", ExportSettings(ranges=ranges))
    shape = bundle.manifest.graphs["transition"].inputs[0].shape
    assert shape == [1, "frames", 16, "height", 6]
    assert (
        bundle.manifest.video.frames,
        bundle.manifest.video.width,
        bundle.manifest.video.text_tokens,
    ) == (9, 48, 5)
    engine = load_engine(bundle)
    for frames, height in ((1, 4), (3, 8)):
        with engine.start(noise((1, frames, 16, height, 6), 0), noise((1, 5, 64), 0)) as run:
            run.step(1000, 0)
    for shape, message in (
        ((2, 1, 16, 4, 6), "batch is 2"),
        ((1, 4, 16, 4, 6), "frames is 4"),
        ((1, 1, 16, 10, 6), "height is 10"),
    ):
        with pytest.raises(ShapeError, match=message):
            engine.start(noise(shape, 0), noise((shape[0], 5, 64), 0))


def test_the_manifest_says_where_everything_came_from(
    tiny_bundle: Bundle, tiny_pipeline: Path, small_bundle: Export
) -> None:
    manifest = tiny_bundle.manifest
    assert manifest.model == "tiny" and manifest.architecture == MODELS["tiny"].architecture
    assert manifest.source.kind == "folder" and manifest.source.location == str(tiny_pipeline)
    assert {"anyflow-deploy", "torch", "onnx", "onnxscript", "onnx-ir", "diffusers"} == set(
        manifest.tools
    )
    assert set(manifest.files) == {"transition.onnx", "weights.safetensors"}
    assert manifest.video.frames == 17 and manifest.schedule.shift == 5.0
    assert small_bundle().manifest.model == "custom"


def test_the_shift_comes_from_the_pipelines_scheduler(tiny_pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    settings = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "shift": 3.0}))
    bundle = export_bundle(
        open_checkpoint(tmp_path / "pipeline" / "transformer"), tmp_path / "bundle"
    )
    assert bundle.manifest.schedule.shift == 3.0


def test_two_exports_are_the_same_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded once by whichever process was the first to need it (see tests/artifact_cache.py),
    once here."""
    first = export_bundle(ONE_LAYER, tmp_path / "a")
    monkeypatch.setattr(exporter, "translate_graph", translate_uncached)
    second = export_bundle(ONE_LAYER, tmp_path / "b")
    assert first.manifest.files == second.manifest.files and first.digest == second.digest


def test_random_weights_are_validated_against_the_same_random_weights(tmp_path: Path) -> None:
    from anyflow_deploy.cli.validate import ValidateOptions, validate

    bundle = export_bundle(
        RandomWeights(ONE_LAYER.architecture, "one layer", seed=3), tmp_path / "bundle"
    )
    assert bundle.manifest.source.seed == 3
    assert validate(ValidateOptions(bundle=bundle.path, steps=(1,))) == 0
