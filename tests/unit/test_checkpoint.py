"""Checkpoints come from strangers: the safetensors reader is held against the library that defines
the format and fed headers that lie, folders of every layout are opened, and whatever is not a
complete AnyFlow checkpoint in safetensors is refused with the next step to take. Random weights
stand in for a checkpoint and must come out the same every time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file

from anyflow_deploy.bundle.manifest import WeightsSource
from anyflow_deploy.checkpoints.checkpoint import STEM, open_checkpoint, pipeline_folder
from anyflow_deploy.checkpoints.dtypes import CHECKPOINT_DTYPES, SAFETENSORS_NAMES
from anyflow_deploy.checkpoints.hub import TRANSFORMER_FILES, download, pipeline_from_model
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.checkpoints.safetensors_stream import (
    TensorEntry,
    build_header,
    read_bytes,
    read_header,
)
from anyflow_deploy.checkpoints.weights import check_parameters
from anyflow_deploy.errors import CheckpointError
from anyflow_deploy.memory.parameter_shapes import parameter_shapes
from anyflow_deploy.models import MODELS, Architecture

TENSORS = {
    "blocks.0.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "blocks.0.bias": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "gate": torch.tensor(0.25, dtype=torch.bfloat16),
    "table": torch.linspace(0, 1, 5, dtype=torch.float64),
}
SINGLE = f"{STEM}.safetensors"
INDEX = f"{STEM}.safetensors.index.json"


def transformer(folder: Path, tensors: dict[str, torch.Tensor] | None = TENSORS) -> Path:
    """A transformer folder as diffusers saves it, with weights of our own."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MODELS["tiny"].architecture.as_config()))
    if tensors is not None:
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def sharded(folder: Path) -> Path:
    """The same weights, one shard a tensor, with an index."""
    transformer(folder, None)
    weight_map = {
        name: f"{STEM}-{number:05d}-of-00004.safetensors" for number, name in enumerate(TENSORS, 1)
    }
    for name, file in weight_map.items():
        save_file({name: TENSORS[name]}, folder / file)
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    return folder


def pipeline(folder: Path) -> Path:
    """A pipeline around a transformer."""
    transformer(folder / "transformer")
    (folder / "model_index.json").write_text("{}")
    return folder


# safetensors, against the library


def test_reading_agrees_with_the_library(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.keys() == TENSORS.keys()
    for name, expected in load_file(path).items():
        entry = header[name]
        assert (CHECKPOINT_DTYPES[entry.type], entry.shape, entry.bytes) == (
            expected.dtype,
            tuple(expected.shape),
            expected.nbytes,
        )
        assert read_bytes(path, entry) == expected.reshape(-1).view(torch.uint8).numpy().tobytes()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(CHECKPOINT_DTYPES)),
            st.lists(st.integers(0, 4), max_size=3).map(tuple),
        ),
        max_size=6,
    ),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
)
def test_layout_is_read_by_the_library(
    tensors: list[tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    wide_first = sorted(tensors, key=lambda t: -CHECKPOINT_DTYPES[t[0]].itemsize)
    head, entries = build_header({f"tensor {i}": t for i, t in enumerate(wide_first)}, metadata)
    data = bytes(i % 64 for i in range(sum(e.bytes for e in entries.values())))
    loaded = load(head + data)
    assert loaded.keys() == entries.keys()
    for name, entry in entries.items():
        start = entry.offset - len(head)
        assert (SAFETENSORS_NAMES[loaded[name].dtype], tuple(loaded[name].shape)) == (
            entry.type,
            entry.shape,
        )
        assert entry.offset % CHECKPOINT_DTYPES[entry.type].itemsize == 0
        assert (
            loaded[name].reshape(-1).view(torch.uint8).numpy().tobytes()
            == data[start : start + entry.bytes]
        )


def test_layout_is_read_by_ourselves(tmp_path: Path) -> None:
    head, entries = build_header(
        {"wide": ("F32", (2, 2)), "narrow": ("BF16", (3,))}, {"format": "pt"}
    )
    (tmp_path / "file").write_bytes(head + bytes(22))
    assert len(head) % 64 == 0
    assert read_header(tmp_path / "file") == entries


@pytest.mark.parametrize("keep", [0, 7, 8, 9, 100, -1])
def test_truncated_files_are_refused(tmp_path: Path, keep: int) -> None:
    path = transformer(tmp_path / "t") / SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        CheckpointError, match=r"(was cut short|lie outside the file\))\. Download it again\.$"
    ):
        read_header(path)


def test_a_file_cut_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = transformer(tmp_path / "t") / SINGLE
    entry = read_header(path)["blocks.0.weight"]
    path.write_bytes(path.read_bytes()[: entry.offset + 3])
    with pytest.raises(
        CheckpointError, match=r"ended in the middle of a tensor\. Download it again\.$"
    ):
        read_bytes(path, entry)


def file_with_header(path: Path, header: object, data: bytes = bytes(16)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("length", [0, 1, 100, 2**40, 2**64 - 1])
def test_a_header_of_impossible_length_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / "file").write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(16))
    with pytest.raises(CheckpointError, match=r"/file is not a safetensors file, or was cut short"):
        read_header(tmp_path / "file")


def tensor(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}


LIES: dict[str, object] = {
    "not JSON": b"{oops",
    "not UTF-8": b'{"\xff\xfe": 1}',
    "a list": [],
    "an entry that is no object": {"x": 1},
    "no offsets": {"x": {"dtype": "F32", "shape": [2, 2]}},
    "three offsets": tensor(data_offsets=[0, 8, 16]),
    "too short for its shape": tensor(data_offsets=[0, 8]),
    "too long for its shape": tensor(shape=[2]),
    "behind the end": tensor(data_offsets=[16, 32]),
    "before the start": tensor(data_offsets=[-16, 0]),
    "unknown type": tensor(dtype="F4"),
    "shape of words": tensor(shape=["2", "2"]),
    "shape is a number": tensor(shape=4),
    # From here on: defects reported, these were accepted (the library refuses every one of them).
    "negative dimensions": tensor(shape=[-2, -2]),
    "fractions": tensor(shape=[2.0, 2.0]),
    "overlap": {**tensor(), "y": tensor()["x"]},
    "gap": tensor(shape=[1], data_offsets=[12, 16]),
    "data that no tensor owns": tensor(shape=[1], data_offsets=[0, 4]),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_headers_are_refused(tmp_path: Path, lie: str) -> None:
    path = file_with_header(tmp_path / "file", LIES[lie])
    with pytest.raises(
        CheckpointError,
        match=r"/file has a damaged safetensors header \(.*\)\. Download it again\.$",
    ):
        read_header(path)
    # The library refuses the file, too.
    with pytest.raises(SafetensorError, match="Error while deserializing"):
        load(path.read_bytes())


def test_the_honest_version_of_those_headers_is_read(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, **tensor()}
    path = file_with_header(tmp_path / "file", header)
    assert read_header(path) == {"x": TensorEntry("F32", (2, 2), path.stat().st_size - 16)}


# Folders


@pytest.mark.parametrize("make", [transformer, sharded, pipeline])
def test_every_layout_gives_the_same_weights(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    folder = make(tmp_path / "checkpoint")
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.architecture == MODELS["tiny"].architecture
    assert checkpoint.source == WeightsSource(kind="folder", location=str(folder))
    assert checkpoint.shapes() == {name: tuple(value.shape) for name, value in TENSORS.items()}
    for name, expected in TENSORS.items():
        torch.testing.assert_close(checkpoint.read(name), expected, rtol=0, atol=0)


def test_source_can_be_told(tmp_path: Path) -> None:
    source = WeightsSource(kind="hub", location="nvidia/x", revision="abc")
    assert open_checkpoint(transformer(tmp_path / "t"), source).source == source


def test_source_of_a_relative_path_is_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer(tmp_path / "t")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("t").source.location == str(tmp_path / "t")


def test_pipeline_folder_is_found_from_both_sides(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "p")
    assert pipeline_folder(folder) == pipeline_folder(folder / "transformer") == folder
    assert pipeline_folder(transformer(tmp_path / "alone")) is None


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("missing", r"a folder \(nothing is there\)"),
        ("t/config.json/x", r"a folder \(nothing is there\)"),
        ("t/config.json", "a checkpoint"),
    ],
)
def test_not_a_folder(tmp_path: Path, path: str, problem: str) -> None:
    transformer(tmp_path / "t")
    with pytest.raises(
        CheckpointError, match=rf"/{path} is not {problem}\. Give a diffusers pipeline folder, "
    ):
        open_checkpoint(tmp_path / path)


@pytest.mark.parametrize("files", [[], ["pytorch_lora_weights.safetensors", "README.md"]])
def test_neither_config_is_there(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / name).touch()
    holds = ", ".join(sorted(files)) or "nothing"
    with pytest.raises(
        CheckpointError,
        match=rf"has neither model_index\.json .* nor config\.json .*It holds: {holds}\.",
    ):
        open_checkpoint(tmp_path)


def test_a_pipeline_without_transformer(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(
        CheckpointError,
        match=r"transformer/config\.json cannot be read: No such file or directory\.$",
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", r"config\.json is not JSON \("), ("[]", r"holds a list; expected a JSON object")],
)
def test_a_damaged_config(tmp_path: Path, text: str, message: str) -> None:
    (transformer(tmp_path / "t") / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "t")


def test_another_model_is_refused_by_its_class(tmp_path: Path) -> None:
    (transformer(tmp_path / "t") / "config.json").write_text(
        '{"_class_name": "WanTransformer3DModel"}'
    )
    with pytest.raises(
        CheckpointError,
        match=r"t/config\.json describes a WanTransformer3DModel; allowed are AnyFlow",
    ):
        open_checkpoint(tmp_path / "t")


def test_missing_shards_are_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "t")
    for number in (2, 4):
        (folder / f"{STEM}-{number:05d}-of-00004.safetensors").unlink()
    missing = f"{STEM}-00002-of-00004.safetensors, {STEM}-00004-of-00004.safetensors"
    with pytest.raises(
        CheckpointError, match=rf"/t lacks 2 of 4 shards: {missing}\. Download them\.$"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/outside.safetensors",
        "sub/inside.safetensors",
        "../t/x.safetensors",
    ],
)
def test_shards_lie_beside_their_index(tmp_path: Path, shard: str) -> None:
    folder = transformer(tmp_path / "t", None)
    save_file(TENSORS, tmp_path / "outside.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"gate": shard}}))
    with pytest.raises(
        CheckpointError, match=rf"index\.json names {shard}; shards lie beside their index\.$"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}'])
def test_an_index_of_nothing(tmp_path: Path, index: str) -> None:
    (transformer(tmp_path / "t") / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json names no shards"):
        open_checkpoint(tmp_path / "t")


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index(
    tmp_path: Path, index: str
) -> None:  # the last three: defect reported, AttributeError or TypeError
    (transformer(tmp_path / "t") / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(tmp_path / "t")


@pytest.mark.parametrize("name", [f"{STEM}.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickles_are_never_loaded(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = transformer(tmp_path / "t", None)
    torch.save(TENSORS, folder / name)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was loaded"))
    expected = (
        rf"/t has only pickled weights \({name}\), which are never loaded: a pickle is a program\."
        r" .*safe_serialization=True"
    )
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(folder)


def test_pickles_beside_safetensors_are_ignored(tmp_path: Path) -> None:
    folder = transformer(tmp_path / "t")
    (folder / f"{STEM}.bin").write_bytes(b"\x80")
    assert open_checkpoint(folder).shapes().keys() == TENSORS.keys()


def test_a_pickle_under_the_name_of_safetensors_is_refused(tmp_path: Path) -> None:
    folder = transformer(tmp_path / "t", None)
    torch.save(TENSORS, folder / SINGLE)
    with pytest.raises(CheckpointError, match=rf"{SINGLE} is not a safetensors file"):
        open_checkpoint(folder)


def test_no_weights_at_all(tmp_path: Path) -> None:
    folder = transformer(tmp_path / "t", None)
    with pytest.raises(
        CheckpointError,
        match=rf"/t has no {SINGLE} \(nor shards of it\)\. Download the weights\.$",
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["blocks.0.attn1.to_q.lora_A.weight", "lora_unet_blocks_0.alpha", "blocks.0.LoRA.up"]
)
def test_lora_weights_are_refused(tmp_path: Path, name: str) -> None:
    folder = transformer(tmp_path / "t", {**TENSORS, name: torch.zeros(2)})
    with pytest.raises(
        CheckpointError, match=rf"/t holds LoRA weights \({name}, …\)\. Merge them .*fuse_lora"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int8, "I8"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.uint16, "U16"),
        (torch.complex64, "C64"),
    ],
)
def test_types_that_are_no_plain_floats_are_refused_by_name(
    tmp_path: Path, dtype: torch.dtype, name: str
) -> None:
    folder = transformer(tmp_path / "t", {"blocks.0.weight": torch.zeros(2, dtype=dtype)})
    with pytest.raises(
        CheckpointError,
        match=rf"/t stores blocks\.0\.weight \({name}\); allowed types are F64, F32, F16, BF16\.$",
    ):
        open_checkpoint(folder)


# Names and shapes


class Shapes:
    """Weights of which only the shapes are asked."""

    architecture = MODELS["tiny"].architecture
    source = WeightsSource(kind="folder", location="/somewhere")

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> torch.Tensor:
        pytest.fail(f"{name} was read")


WANTED = {"a": (1,), "b": (2, 3), "c": (4,), "d": (5,), "e": (6,)}


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"a": (1,), "b": (2, 3)}, r"\(3 missing: c, d, e\)"),
        ({}, r"\(5 missing: a, b, c\)"),
        ({**WANTED, "z": (1,), "y": ()}, r"\(2 unexpected: y, z\)"),
        ({**WANTED, "b": (3, 2)}, r"\(b is \(3, 2\), config\.json makes it \(2, 3\)\)"),
        (
            {**WANTED, "b": (2, 3, 1), "d": (6,)},
            r"\(b is \(2, 3, 1\), config\.json makes it \(2, 3\)\)",
        ),
        (
            {"b": (3, 2), "c": (4,), "d": (5,), "e": (6,), "f": (1,)},
            r"\(1 missing: a; 1 unexpected: f; b is \(3, 2\)",
        ),
    ],
)
def test_check_names(given_: dict[str, tuple[int, ...]], message: str) -> None:
    expected = (
        rf"^the weights in /somewhere do not fit their config\.json {message}.*\. Give the"
        r" checkpoint they were saved with\.$"
    )
    with pytest.raises(CheckpointError, match=expected):
        check_parameters(Shapes(given_), WANTED)


def test_check_names_accepts_any_order() -> None:
    check_parameters(Shapes(dict(reversed(WANTED.items()))), WANTED)


# The Hub


class OfflineError(Exception):
    pass


def test_a_failed_download_tells_the_ways_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise OfflineError("no route to host\nand a page of advice")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError) as caught:
        pipeline_from_model(MODELS["1.3b"], TRANSFORMER_FILES)
    for part in (
        "'nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers'",
        "(OfflineError: no route to host)",
        "--checkpoint",
        "--random-weights",
    ):
        assert part in str(caught.value)


def test_a_download_asks_for_what_is_needed_and_remembers_the_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []

    def snapshot(hub_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend((hub_id, revision, allow_patterns))
        return "/cache/snapshots/c0ffee"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    folder, source = pipeline_from_model(MODELS["14b"], TRANSFORMER_FILES)
    assert asked == [MODELS["14b"].hub_id, None, TRANSFORMER_FILES]
    assert source == WeightsSource(
        kind="hub", location=str(MODELS["14b"].hub_id), revision="c0ffee"
    )
    assert folder == download("x/y", "c0ffee", ["*.json"], "Give another.")
    assert asked[3:] == ["x/y", "c0ffee", ["*.json"]]


def test_no_pickle_is_ever_downloaded() -> None:
    assert {Path(pattern).suffix for pattern in TRANSFORMER_FILES} == {".json", ".safetensors"}


# Random weights

TINY = MODELS["tiny"].architecture
NAME = "blocks.1.attn1.to_q.weight"


def test_random_weights_are_the_same_whatever_came_before() -> None:
    first = RandomWeights(TINY, "tiny").read(NAME)
    torch.manual_seed(1)
    torch.rand(7)
    state = torch.get_rng_state()
    second = RandomWeights(TINY, "tiny", seed=0)
    second.read("proj_out.weight")
    assert torch.equal(second.read(NAME), first)
    assert torch.equal(second.read(NAME), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "seed"), [(NAME, 1), (NAME.replace("1", "2", 1), 0), (NAME.replace("to_q", "to_k"), 0)]
)
def test_random_weights_depend_on_seed_and_name(name: str, seed: int) -> None:
    assert not torch.equal(
        RandomWeights(TINY, "tiny", seed).read(name), RandomWeights(TINY, "tiny").read(NAME)
    )


def test_random_weights_do_not_depend_on_the_rest_of_the_model() -> None:
    assert torch.equal(
        RandomWeights(MODELS["far-tiny"].architecture, "far-tiny").read(NAME),
        RandomWeights(TINY, "tiny").read(NAME),
    )


def test_random_weights_are_float32_whatever_the_default() -> None:
    before = torch.get_default_dtype()
    expected = RandomWeights(TINY, "tiny").read(NAME)
    torch.set_default_dtype(torch.float64)
    try:
        found = RandomWeights(TINY, "tiny").read(NAME)
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_random_weights_fill_every_parameter_with_the_right_scale() -> None:
    weights = RandomWeights(TINY, "tiny", seed=3)
    assert weights.source == WeightsSource(kind="random", location="tiny", seed=3)
    check_parameters(weights, parameter_shapes(TINY))
    for name, shape in weights.shapes().items():
        value = weights.read(name)
        assert (tuple(value.shape), value.dtype) == (shape, torch.float32)
        assert value.isfinite().all()
    assert weights.read(NAME).std() == pytest.approx(TINY.inner_dim**-0.5, rel=0.1)
    assert weights.read("blocks.0.attn1.norm_q.weight").mean() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("model", "billions"), [("1.3b", 1.42), ("14b", 14.3)])
def test_parameters_are_counted_without_being_made(model: str, billions: float) -> None:
    shapes = parameter_shapes(MODELS[model].architecture)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e9 == pytest.approx(
        billions, abs=0.05
    )


def test_parameters_of_another_depth() -> None:
    def depth(architecture: Architecture) -> int:
        return len(
            {
                name.split(".")[1]
                for name in parameter_shapes(architecture)
                if name.startswith("blocks.")
            }
        )

    assert (depth(TINY), depth(MODELS["1.3b"].architecture)) == (3, 30)
