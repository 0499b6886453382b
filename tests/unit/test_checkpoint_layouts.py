"""Checkpoints as people have them: one file, shards without an index, variants, prefixes, Hub ids.

Every layout gives the weights of the plain one, or is refused with what there is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from anyflow_deploy.bundle.manifest import WeightsSource
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint, pipeline_folder
from anyflow_deploy.checkpoints.names import strip_prefixes
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.cli.weights import WeightOptions
from anyflow_deploy.errors import AnyFlowError, CheckpointError
from anyflow_deploy.hub import parse_hub_id
from anyflow_deploy.memory.parameter_shapes import parameter_shapes
from anyflow_deploy.models import MODELS

STEM = "diffusion_pytorch_model"
TENSORS = {
    "blocks.0.attn1.to_q.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "patch_embedding.bias": torch.tensor([1.5, -2.0]),
    "scale_shift_table": torch.linspace(0, 1, 5),
}


def folder(path: Path, files: dict[str, dict[str, torch.Tensor]]) -> Path:
    """A pipeline whose transformer has these files."""
    path = path / "pipeline"
    (path / "transformer").mkdir(parents=True)
    (path / "model_index.json").write_text("{}")
    config = json.dumps(MODELS["tiny"].architecture.as_config())
    (path / "transformer" / "config.json").write_text(config)
    for name, tensors in files.items():
        save_file(tensors, path / "transformer" / name)
    return path


def shards(pattern: str) -> dict[str, dict[str, torch.Tensor]]:
    """One shard a tensor; the pattern takes a number."""
    return {
        pattern.format(number): {name: tensor}
        for number, (name, tensor) in enumerate(TENSORS.items(), 1)
    }


def same(path: Path, variant: str | None = None) -> bool:
    weights = open_checkpoint(path, variant=variant)
    assert weights.shapes().keys() == TENSORS.keys()
    return all(torch.equal(weights.read(name), value) for name, value in TENSORS.items())


@pytest.mark.parametrize(
    ("files", "variant"),
    [
        ({"model.safetensors": TENSORS}, None),
        (shards(STEM + "-{:05d}-of-00003.safetensors"), None),
        (shards("model-{:05d}-of-00003.safetensors"), None),
        ({f"{STEM}.fp16.safetensors": TENSORS}, "fp16"),
        (shards(STEM + ".fp16-{:05d}-of-00003.safetensors"), "fp16"),
        (shards(STEM + "-{:05d}-of-00003.fp16.safetensors"), "fp16"),
        ({f"{STEM}.safetensors": {}, f"{STEM}.ema.safetensors": TENSORS}, "ema"),
    ],
)
def test_layouts_that_are_read(
    files: dict[str, dict[str, torch.Tensor]], variant: str | None, tmp_path: Path
) -> None:
    assert same(folder(tmp_path, files), variant)


@pytest.mark.parametrize(
    "name", ["{}.safetensors.index.fp16.json", "{}.fp16.safetensors.index.json"]
)
def test_the_index_of_a_variant(name: str, tmp_path: Path) -> None:
    files = shards("part-{}.safetensors")
    path = folder(tmp_path, files)
    weight_map = {next(iter(tensors)): file for file, tensors in files.items()}
    index = path / "transformer" / name.format(STEM)
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert same(path, "fp16")


@pytest.mark.parametrize(
    ("files", "variant", "message"),
    [
        (
            [f"{STEM}.fp16.safetensors"],
            None,
            rf"has no {STEM}\.safetensors; it holds {STEM}\.fp16\.safetensors\. Give --var",
        ),
        (
            [f"{STEM}.bf16.safetensors"],
            "fp16",
            rf"has no {STEM}\.fp16\.safetensors; it holds .*bf16.*\. Its variants: bf16",
        ),
        (["anyflow.safetensors"], None, r"it holds anyflow\.safetensors\. Give the file itself"),
        (
            [f"{STEM}-00002-of-00003.safetensors"],
            None,
            rf"lacks 2 of 3 shards: {STEM}-00001-of-00003\.safetensors, {STEM}-00003",
        ),
        (
            [f"{STEM}-00001-of-00001.safetensors", f"{STEM}-00001-of-00002.safetensors"],
            None,
            r"has shards of 1 and 2 and no index",
        ),
        ([], None, r"has no .* \(nor shards of it\)\. Download the weights"),
    ],
)
def test_other_layouts_are_refused_with_what_there_is(
    files: list[str], variant: str | None, message: str, tmp_path: Path
) -> None:
    path = folder(tmp_path, dict.fromkeys(files, TENSORS))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path, variant=variant)


def test_a_file_of_weights_is_a_checkpoint(tmp_path: Path) -> None:
    path = folder(tmp_path, {"anyflow.safetensors": TENSORS})
    file = path / "transformer" / "anyflow.safetensors"
    assert same(file)
    assert open_checkpoint(file).source == WeightsSource(kind="folder", location=str(file))
    assert pipeline_folder(file) == path
    with pytest.raises(CheckpointError, match=r"is a file; --variant chooses one in a folder"):
        open_checkpoint(file, variant="fp16")


def test_a_file_without_config_is_known_by_its_shapes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shapes = parameter_shapes(MODELS["far-tiny"].architecture)
    save_file({n: torch.zeros(s) for n, s in shapes.items()}, tmp_path / "a.safetensors")
    weights = open_checkpoint(tmp_path / "a.safetensors")
    assert weights.architecture == MODELS["far-tiny"].architecture
    assert "a.safetensors has the shapes of far-tiny" in caplog.text
    save_file(TENSORS, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"no config\.json beside it, and its tensors \(bloc"):
        open_checkpoint(tmp_path / "b.safetensors")


def test_files_that_are_no_checkpoint_say_what_they_are(tmp_path: Path) -> None:
    save_file({"lora_unet_blocks_0.alpha": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"lora\.safetensors holds LoRA weights"):
        open_checkpoint(tmp_path / "lora.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint\. Give .* \.safetensors file"):
        open_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"For a file of weights give .*/lora\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"model.{name}",
        lambda name: f"module.{name}",
        lambda name: f"transformer.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"model.diffusion_model.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module._orig_mod."),
        lambda name: f"_fsdp_wrapped_module.{name}",
    ],
)
def test_what_wrappers_put_before_names_is_stripped_with_a_notice(
    rename: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {rename(name): tensor for name, tensor in TENSORS.items()}
    path = folder(tmp_path, {f"{STEM}.safetensors": tensors})
    with caplog.at_level(logging.WARNING):
        assert same(path)
    assert "was stripped from the names of its tensors" in caplog.text


def test_what_only_some_names_have_stays() -> None:
    for names in (
        ["blocks.0.weight", "model.blocks.1.weight"],
        ["blocks.0.weight", "blocks.1.weight"],
        ["_orig_mod.blocks.0.weight", "blocks.0.weight"],
        ["model", "model.weight"],
        [],
    ):
        assert strip_prefixes(names) == ({name: name for name in names}, "")


def test_what_may_not_be_read_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(tmp_path, {f"{STEM}.safetensors": TENSORS})
    original = Path.open

    def refuse(name: str) -> None:
        def open_unless(self: Path, *args: object, **options: object) -> object:
            if self.name == name:
                raise PermissionError(13, "Permission denied")
            return original(self, *args, **options)  # type: ignore[call-overload]

        monkeypatch.setattr(Path, "open", open_unless)

    for name in ("config.json", f"{STEM}.safetensors"):
        refuse(name)
        with pytest.raises(CheckpointError, match=rf"/{name} is there and may not be read \(perm"):
            open_checkpoint(path)


# The Hub


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nvidia/AnyFlow-1.3B", ("nvidia/AnyFlow-1.3B", None)),
        ("me/x@v1.0", ("me/x", "v1.0")),
        ("folder", None),
        ("./me/x", None),
        ("/me/x", None),
        ("me/x/transformer", None),
        ("me/..", None),
    ],
)
def test_hub_ids_are_told_from_paths(text: str, expected: object) -> None:
    assert parse_hub_id(text) == expected


def test_what_is_on_this_machine_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "x").mkdir(parents=True)
    assert parse_hub_id("me/x") is None


@pytest.mark.parametrize("is_pipeline", [True, False])
def test_a_hub_id_is_a_checkpoint(
    is_pipeline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(tmp_path, {f"{STEM}.fp16.safetensors": TENSORS})
    path = path if is_pipeline else path / "transformer"
    patterns: list[list[str]] = []

    def snapshot(hub_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert (hub_id, revision) == ("me/x", ["abc", path.name][len(patterns)])
        patterns.append(allow_patterns)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    words = ["--checkpoint", "me/x@abc", "--variant", "fp16"]
    weights = parse_options(WeightOptions, words).weights()
    expected = WeightsSource(kind="hub", location="me/x", revision=path.name, variant="fp16")
    assert weights.source == expected and weights.shapes().keys() == TENSORS.keys()
    assert all(pattern.endswith(".json") for pattern in patterns[0])
    assert ("transformer/*.safetensors" in patterns[1]) == is_pipeline


def test_a_variant_is_in_the_manifest_where_there_is_one() -> None:
    plain = WeightsSource(kind="folder", location="x")
    assert "variant" not in plain.model_dump_json()
    variant = plain.model_copy(update={"variant": "fp16"})
    assert WeightsSource.model_validate_json(variant.model_dump_json()) == variant


@pytest.mark.parametrize("words", ["--model tiny --variant fp16", "--checkpoint x --variant a.b"])
def test_a_variant_belongs_to_a_checkpoint(words: str) -> None:
    with pytest.raises(AnyFlowError, match=r"--variant is a word such as fp16, and chooses files"):
        parse_options(WeightOptions, words.split())
