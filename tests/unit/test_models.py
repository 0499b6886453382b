"""The model table and the reader of `config.json`: known rows, exact round trips, and a named
refusal of every variant whose computation this project does not reproduce."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from typing import Any

import pytest

from anyflow_deploy.errors import AnyFlowError, CheckpointError
from anyflow_deploy.models import (
    BIDIRECTIONAL_CLASS,
    CAUSAL_CLASS,
    MODELS,
    architecture_from_config,
    get_model,
    model_name,
)

CAUSAL_KEYS = ("compressed_patch_size", "full_chunk_limit", "chunk_partition")


def config(model: str = "tiny", **changes: Any) -> dict[str, Any]:
    return {**MODELS[model].architecture.as_config(), **changes}


@pytest.mark.parametrize(
    ("name", "hub_id", "layers", "inner", "feed_forward", "causal"),
    [
        ("tiny", None, 3, 96, 192, False),
        ("shapes", None, 5, 192, 640, False),
        ("1.3b", "nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers", 30, 1536, 8960, False),
        ("14b", "nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers", 40, 5120, 13824, False),
        ("far-tiny", None, 3, 96, 192, True),
        ("far-shapes", None, 5, 192, 640, True),
        ("far-1.3b", "nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers", 30, 1536, 8960, True),
        ("far-14b", "nvidia/AnyFlow-FAR-Wan2.1-14B-Diffusers", 40, 5120, 13824, True),
    ],
)
def test_rows(
    name: str, hub_id: str | None, layers: int, inner: int, feed_forward: int, causal: bool
) -> None:
    model = get_model(name)
    a = model.architecture
    assert (model.name, model.hub_id) == (name, hub_id)
    assert (a.num_layers, a.inner_dim, a.ffn_dim, a.causal) == (layers, inner, feed_forward, causal)


def test_table_is_complete_and_its_rows_can_be_told_apart() -> None:
    sizes = ["tiny", "shapes", "1.3b", "14b"]
    assert list(MODELS) == [*sizes, *(f"far-{size}" for size in sizes)]
    assert [model_name(row.architecture) for row in MODELS.values()] == list(MODELS)


@pytest.mark.parametrize("row", MODELS.values(), ids=MODELS)
def test_default_video_obeys_the_rules(row: Any) -> None:
    frames, height, width = row.video
    assert (frames % 4, height % 16, width % 16) == (1, 0, 0)


def test_causal_differs_from_bidirectional_by_its_chunks_alone() -> None:
    causal = MODELS["far-1.3b"].architecture
    plain = MODELS["1.3b"].architecture
    unchunked: dict[str, Any] = dict.fromkeys(CAUSAL_KEYS)
    assert dataclasses.replace(causal, **unchunked) == plain
    assert sum(causal.chunk_partition or ()) == (MODELS["far-1.3b"].video[0] - 1) // 4 + 1


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("1.3", "1.3b"), ("1.3B", "1.3b"), ("14", "14b"), ("far-1.3", "far-1.3b"), ("tny", "tiny")],
)
def test_get_model_suggests(given: str, nearest: str) -> None:
    with pytest.raises(
        AnyFlowError,
        match=rf"^unknown model '{given}': known are tiny, shapes, .*Did you mean '{nearest}'\?$",
    ):
        get_model(given)


def test_get_model_does_not_guess_wildly() -> None:
    with pytest.raises(
        AnyFlowError, match=r"^unknown model 'stable-diffusion': known are .*far-14b\.$"
    ):
        get_model("stable-diffusion")


def test_an_architecture_outside_the_table_is_custom() -> None:
    assert model_name(dataclasses.replace(MODELS["1.3b"].architecture, num_layers=31)) == "custom"


@pytest.mark.parametrize("row", MODELS.values(), ids=MODELS)
def test_config_round_trip(row: Any) -> None:
    stored = json.loads(json.dumps(row.architecture.as_config()))
    assert stored["_class_name"] == (
        CAUSAL_CLASS if row.architecture.causal else BIDIRECTIONAL_CLASS
    )
    assert (set(stored) >= set(CAUSAL_KEYS)) == row.architecture.causal
    assert architecture_from_config(stored) == row.architecture


@pytest.mark.parametrize(
    ("model", "class_name"), [("tiny", BIDIRECTIONAL_CLASS), ("far-tiny", CAUSAL_CLASS)]
)
def test_keys_are_those_that_diffusers_registers(model: str, class_name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    arguments = inspect.signature(getattr(diffusers, class_name).__init__).parameters.keys() - {
        "self"
    }
    assert set(config(model)) == arguments | {"_class_name"}


def test_diffusers_own_remarks_and_absent_defaults_are_fine() -> None:
    small = {
        k: v
        for k, v in config().items()
        if k not in ("gate_value", "eps", "deltatime_type", "image_dim")
    }
    assert (
        architecture_from_config({**small, "_diffusers_version": "0.42.0"})
        == MODELS["tiny"].architecture
    )


@pytest.mark.parametrize("name", [None, "WanTransformer3DModel", "anyflowtransformer3dmodel"])
def test_other_classes_are_refused(name: str | None) -> None:
    expected = (
        rf"^here\.json describes a {name or 'model without _class_name'}; allowed are"
        rf" {BIDIRECTIONAL_CLASS} and {CAUSAL_CLASS}"
    )
    with pytest.raises(CheckpointError, match=expected):
        architecture_from_config(config(_class_name=name), "here.json")


def test_unknown_keys_are_named() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"^here\.json has keys this version does not know: novel, window\. .*update anyflow",
    ):
        architecture_from_config(config(window=None, novel=1), "here.json")


NEUTRAL = {
    "qk_norm": "rms_norm_across_heads",
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
    "init_flowmap_model": True,
}


@pytest.mark.parametrize("model", ["tiny", "far-tiny"])
def test_keys_of_wan_are_read_at_their_neutral_values_alone(model: str) -> None:
    assert architecture_from_config(config(model, **NEUTRAL)) == MODELS[model].architecture
    others = {
        "qk_norm": "layer_norm",
        "added_kv_proj_dim": 8,
        "pos_embed_seq_len": 514,
        "init_flowmap_model": False,
    }
    for key, value in others.items():
        expected = rf"^here\.json has {key} {re.escape(repr(value))}; "
        with pytest.raises(CheckpointError, match=expected):
            architecture_from_config(config(model, **{**NEUTRAL, key: value}), "here.json")


def nvlabs_config(model: str, **changes: Any) -> dict[str, Any]:
    """A config as NVlabs' class registers it: one class and all keys for both kinds."""
    chunks = dict(zip(CAUSAL_KEYS, ([1, 4, 4], 3, None), strict=True))
    causal = MODELS[model].architecture.causal
    own = {"_class_name": "FAR_Wan_Transformer3DModel", "init_far_model": causal}
    return {**chunks, **config(model), **NEUTRAL, **own, **changes}


@pytest.mark.parametrize("model", ["tiny", "far-tiny"])
def test_nvlabs_class_is_read_as_the_kind_it_says(model: str) -> None:
    row = MODELS[model].architecture
    assert architecture_from_config(nvlabs_config(model)) == row
    # Loaded and saved again by diffusers: its class, the other keys as they were
    name = config(model)["_class_name"]
    assert architecture_from_config(nvlabs_config(model, _class_name=name)) == row
    # A chunk_partition means nothing without the flag, and its default is that of the release
    other = nvlabs_config(model, chunk_partition=[1, 2] if model == "tiny" else None)
    assert architecture_from_config(other) == row


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("tiny", {"init_far_model": None}, "init_far_model None; it has to be true for a causal"),
        ("tiny", {"init_far_model": 1}, "init_far_model 1; it has to be"),
        ("tiny", {"_class_name": CAUSAL_CLASS}, "init_far_model False; it has to be"),
        ("far-tiny", {"_class_name": BIDIRECTIONAL_CLASS}, "init_far_model True; it has to be"),
        ("far-tiny", {"full_chunk_limit": None}, "full_chunk_limit null"),
    ],
)
def test_a_kind_that_contradicts_itself_is_refused(
    model: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        architecture_from_config(nvlabs_config(model, **changes))


@pytest.mark.parametrize("model", ["tiny", "far-tiny"])
def test_a_gate_that_two_projects_read_differently_is_asked_for(model: str) -> None:
    silent = {k: v for k, v in nvlabs_config(model).items() if k != "gate_value"}
    with pytest.raises(CheckpointError, match=r"gate_value, which is 0 to NVlabs.*0\.25 to diff"):
        architecture_from_config(silent)
    named = {**silent, "_class_name": config(model)["_class_name"]}
    assert architecture_from_config(named).gate_value == 0.25
    assert architecture_from_config({**silent, "gate_value": 0}).gate_value == 0


@pytest.mark.parametrize("class_name", [BIDIRECTIONAL_CLASS, CAUSAL_CLASS])
def test_a_key_that_is_not_there_has_diffusers_default(class_name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(
            getattr(diffusers, class_name).__init__
        ).parameters.items()
        if name != "self"
    }
    architecture = architecture_from_config({"_class_name": class_name})
    given = {k: v for k, v in dataclasses.asdict(architecture).items() if k in defaults}
    assert given == defaults and architecture.causal == (class_name == CAUSAL_CLASS)
    assert architecture_from_config({"_class_name": class_name, "out_channels": None}) == (
        architecture
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": [2, 2, 2]}, r"patch_size (2, 2, 2) (allowed: [1, p, p])"),
        ({"patch_size": [1, 2, 4]}, r"patch_size (1, 2, 4) (allowed: [1, p, p])"),
        ({"out_channels": 32}, r"in_channels 16 and out_channels 32"),
        ({"image_dim": 1280}, r"image_dim 1280"),
        ({"deltatime_type": "r-t"}, r"deltatime_type 'r-t' (allowed: 'r', 't-r')"),
        ({"attention_head_dim": 25}, r"attention_head_dim 25 (rotary needs an even number)"),
    ],
)
def test_variants_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"^here\.json cannot be exported: {re.escape(message)}"
    ):
        architecture_from_config(config(**changes), "here.json")


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(CheckpointError, match=r"image_dim 8 .*; attention_head_dim 25"):
        architecture_from_config(config(image_dim=8, attention_head_dim=25))


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": 2},
        {"patch_size": [1, 2]},
        {"num_layers": "30"},
        {"attention_head_dim": "24"},
        {"num_layers": 0},
        {"gate_value": None},
        {"eps": "x"},
    ],
)
def test_values_of_the_wrong_kind_are_named(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        architecture_from_config(config(**changes), "here.json")


def test_a_bidirectional_class_with_chunks_is_refused() -> None:
    with pytest.raises(CheckpointError, match="with chunk_partition; compressed_patch_size"):
        architecture_from_config(config("far-tiny", _class_name=BIDIRECTIONAL_CLASS))
