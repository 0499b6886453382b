"""The models this project knows, one row each, and the architecture they share.

AnyFlow (arXiv 2605.13724) is Wan2.1's video transformer with a second time embedding, so that one
forward pass predicts the average velocity from time t to time r. `Architecture` holds the numbers
in the checkpoint's `config.json` under diffusers' own names; `MODELS` is the table that `--model`
looks into. A checkpoint need not be in the table: its config.json alone decides what is exported.

This module imports neither torch nor diffusers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import PositiveInt, TypeAdapter, ValidationError

from anyflow_deploy.errors import AnyFlowError, CheckpointError, suggestion

BIDIRECTIONAL_CLASS = "AnyFlowTransformer3DModel"
CAUSAL_CLASS = "AnyFlowFARTransformer3DModel"

SPATIAL_FACTOR = 8
"""Pixels per latent row and column of Wan's VAE, which every AnyFlow model uses."""

TEMPORAL_FACTOR = 4
"""Frames per latent frame of Wan's VAE, after the first frame, which stands alone."""

TEXT_TOKENS = 512
"""Length that Wan pads prompt embeddings to."""

FPS = 16
"""Playback rate of the videos Wan was trained on."""


@dataclass(frozen=True)
class Architecture:
    """The numbers of a transformer, named as in diffusers' `config.json`.

    Attributes:
        patch_size: latent frames, rows and columns per token.
        gate_value: share g of the target-time embedding: `(1 - g) emb(t) + g emb_delta(r)`. It is
            not among the weights (a non-persistent buffer in diffusers), so a wrong value here is a
            silently wrong model.
        deltatime_type: "r" feeds r to the second embedder, "t-r" the difference.
        rope_max_seq_len: entries of the rotary table, the limit of frames, rows and columns in
            tokens.
        compressed_patch_size, full_chunk_limit, chunk_partition: causal models only, None
            otherwise.
    """

    num_attention_heads: PositiveInt
    attention_head_dim: PositiveInt
    ffn_dim: PositiveInt
    num_layers: PositiveInt
    patch_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 2, 2)
    in_channels: PositiveInt = 16
    out_channels: PositiveInt = 16
    text_dim: PositiveInt = 4096
    freq_dim: PositiveInt = 256
    cross_attn_norm: bool = True
    eps: float = 1e-6
    image_dim: PositiveInt | None = None
    rope_max_seq_len: PositiveInt = 1024
    gate_value: float = 0.25
    deltatime_type: str = "r"
    compressed_patch_size: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    full_chunk_limit: PositiveInt | None = None
    chunk_partition: tuple[PositiveInt, ...] | None = None

    @property
    def inner_dim(self) -> int:
        """Channels of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def causal(self) -> bool:
        """Whether it is AnyFlow-FAR, which generates a video chunk by chunk."""
        return self.full_chunk_limit is not None

    def as_config(self) -> dict[str, Any]:
        """Return the `config.json` of this architecture, as diffusers writes it."""
        name = CAUSAL_CLASS if self.causal else BIDIRECTIONAL_CLASS
        fields = {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()
        }
        if not self.causal:
            for key in ("compressed_patch_size", "full_chunk_limit", "chunk_partition"):
                del fields[key]
        return {"_class_name": name, **fields}


NVLABS_CLASS = "FAR_Wan_Transformer3DModel"
"""The class of NVlabs' own code, for both kinds; `init_far_model` says which."""

_CHUNK_KEYS = ("compressed_patch_size", "full_chunk_limit", "chunk_partition")

_DIFFUSERS_DEFAULTS = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "ffn_dim": 13824,
    "num_layers": 40,
}
"""What diffusers' classes take where config.json is silent; `Architecture` has the others."""

_CAUSAL_DEFAULTS = {
    "compressed_patch_size": (1, 4, 4),
    "full_chunk_limit": 3,
    "chunk_partition": (1, 3, 3, 3, 3, 3, 3, 2),
}

_NEUTRAL_KEYS: dict[str, Any] = {
    "qk_norm": "rms_norm_across_heads",
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
    "window_size": (-1, -1),
    "add_img_emb": False,
    "quantization_config": None,
    "init_flowmap_model": True,
}
"""Keys of Wan's and NVlabs' classes that diffusers' AnyFlow classes ignore, each with the one value
at which it changes nothing."""


def architecture_from_config(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """Read a transformer's `config.json` as diffusers does.

    NVlabs' class counts as diffusers' one of the same kind, and a key that is not there has
    diffusers' default.

    Args:
        config: the parsed file.
        where: its name, for error messages.

    Raises:
        CheckpointError: not an AnyFlow transformer, an unknown key, or a variant that cannot be
            exported.
    """
    name = config.get("_class_name")
    values = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in config.items()
        if not k.startswith("_")
    }
    causal = _is_causal(name, values, where)
    _remove_neutral_keys(values, where)
    fields = {f.name for f in dataclasses.fields(Architecture)}
    unknown = sorted(set(values) - fields)
    if unknown:
        raise CheckpointError(
            f"{where} has keys this version does not know: {', '.join(unknown)}. "
            "They may change the computation, so nothing is exported; update anyflow_deploy."
        )
    if name == NVLABS_CLASS and "gate_value" not in values:
        raise CheckpointError(
            f"{where} is a {name} without gate_value, which is 0 to NVlabs' code and 0.25 to"
            ' diffusers. Write the one that the model was trained with into it, as "gate_value":'
            " 0.25."
        )
    if causal:
        if values.get("chunk_partition", ()) is None:
            del values["chunk_partition"]
        values = {**_CAUSAL_DEFAULTS, **values}
    values = {**_DIFFUSERS_DEFAULTS, **values}
    if values.get("out_channels", 0) is None:
        values["out_channels"] = values.get("in_channels", Architecture.in_channels)
    try:
        architecture = TypeAdapter(Architecture).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{where} has {first['loc'][0]} {first['input']!r}: {first['msg'].lower()}."
        ) from None
    _check_supported(architecture, where)
    return architecture


def _is_causal(name: Any, values: dict[str, Any], where: str) -> bool:
    """Return whether a config is of a causal model; take the keys that only say so out of it.

    A bidirectional model's chunk keys go, too: its class ignores them.
    """
    if name not in (BIDIRECTIONAL_CLASS, CAUSAL_CLASS, NVLABS_CLASS):
        raise CheckpointError(
            f"{where} describes a {name or 'model without _class_name'}; allowed are"
            f" {BIDIRECTIONAL_CLASS} and {CAUSAL_CLASS} (or NVlabs' {NVLABS_CLASS}). Give an"
            " AnyFlow checkpoint in diffusers' layout."
        )
    flag = values.pop("init_far_model", None)
    causal = flag if name == NVLABS_CLASS else name == CAUSAL_CLASS
    if not isinstance(causal, bool) or flag not in (None, causal):
        raise CheckpointError(
            f"{where} is a {name} with init_far_model {flag!r}; it has to be true for a causal"
            " model and false for a bidirectional one. Give the config.json that was saved with"
            " the weights."
        )
    if causal:
        missing = [k for k in _CHUNK_KEYS[:2] if values.get(k, 0) is None]
        if missing:
            raise CheckpointError(
                f"{where} is a {name} with {missing[0]} null; a causal model needs a value, as"
                f" {_CAUSAL_DEFAULTS[missing[0]]}."
            )
        return True
    if flag is None and values.get("chunk_partition") is not None:
        raise CheckpointError(
            f"{where} is a {name} with chunk_partition; {', '.join(_CHUNK_KEYS)} belong to"
            f" {CAUSAL_CLASS}. Give the config.json that was saved with the weights."
        )
    for key in _CHUNK_KEYS:
        values.pop(key, None)
    return False


def _remove_neutral_keys(values: dict[str, Any], where: str) -> None:
    """Take out the keys that change nothing, and refuse them at any other value."""
    for key, neutral in _NEUTRAL_KEYS.items():
        value = values.pop(key, neutral)
        if value != neutral or isinstance(value, bool) != isinstance(neutral, bool):
            shown = json.dumps(neutral)
            raise CheckpointError(
                f"{where} has {key} {value!r}; an AnyFlow transformer has {shown} or leaves it out."
                " It may change the computation, so nothing is exported."
            )


def _check_supported(a: Architecture, where: str) -> None:
    """Refuse what the traceable module does not compute."""
    problems = []
    if len(a.patch_size) != 3 or a.patch_size[0] != 1 or a.patch_size[1] != a.patch_size[2]:
        problems.append(f"patch_size {a.patch_size} (allowed: [1, p, p])")
    if a.in_channels != a.out_channels:
        problems.append(
            f"in_channels {a.in_channels} and out_channels {a.out_channels} (the Euler step needs"
            " them equal)"
        )
    if a.image_dim is not None:
        problems.append(
            f"image_dim {a.image_dim} (image embeddings are not part of released AnyFlow models)"
        )
    if a.deltatime_type not in ("r", "t-r"):
        problems.append(f"deltatime_type {a.deltatime_type!r} (allowed: 'r', 't-r')")
    if a.attention_head_dim % 2:
        problems.append(f"attention_head_dim {a.attention_head_dim} (rotary needs an even number)")
    if problems:
        raise CheckpointError(f"{where} cannot be exported: " + "; ".join(problems) + ".")


@dataclass(frozen=True)
class Model:
    """One row of the table.

    Attributes:
        name: what `--model` takes.
        hub_id: repository on the Hugging Face Hub; None for the models that need no download: the
            tiny ones, which are made on this machine, and those with an asset.
        architecture: the network's numbers.
        shift: timestep shift of the sampling schedule the model was distilled with.
        video: frames, height and width (pixels) of the video that is generated by default.
        asset: name of the folder under `assets/` of a checkout that has the pipeline; None for all
            but the `shapes` models, which this project trained.
    """

    name: str
    hub_id: str | None
    architecture: Architecture
    shift: float = 5.0
    video: tuple[int, int, int] = (81, 480, 832)
    asset: str | None = None


TINY_VIDEO = (17, 64, 96)
SHAPES_SHIFT = 3.0


def _causal_variant(base: Architecture) -> Architecture:
    """Add chunks and a second, coarser patch embedding to a backbone."""
    return dataclasses.replace(
        base,
        compressed_patch_size=(1, 4, 4),
        full_chunk_limit=3,
        chunk_partition=(1, 3, 3, 3, 3, 3, 3, 2),
    )


_TINY = Architecture(
    num_attention_heads=4,
    attention_head_dim=24,
    ffn_dim=192,
    num_layers=3,
    text_dim=64,
    freq_dim=64,
    rope_max_seq_len=256,
)
_SHAPES = Architecture(
    num_attention_heads=6,
    attention_head_dim=32,
    ffn_dim=640,
    num_layers=5,
    text_dim=64,
    freq_dim=128,
)
_1_3B = Architecture(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30)
_14B = Architecture(num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=40)

MODELS = {
    row.name: row
    for row in (
        Model("tiny", None, _TINY, video=TINY_VIDEO),
        Model("shapes", None, _SHAPES, SHAPES_SHIFT, TINY_VIDEO, "shapes"),
        Model("1.3b", "nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers", _1_3B),
        Model("14b", "nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers", _14B),
        Model("far-tiny", None, _causal_variant(_TINY), video=(81, *TINY_VIDEO[1:])),
        Model(
            "far-shapes",
            None,
            _causal_variant(_SHAPES),
            SHAPES_SHIFT,
            (33, *TINY_VIDEO[1:]),
            "far-shapes",
        ),
        Model("far-1.3b", "nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers", _causal_variant(_1_3B)),
        Model("far-14b", "nvidia/AnyFlow-FAR-Wan2.1-14B-Diffusers", _causal_variant(_14B)),
    )
}


def get_model(name: str) -> Model:
    """Return the row of a name.

    Raises:
        AnyFlowError: for an unknown name, with the nearest known one.
    """
    if name not in MODELS:
        raise AnyFlowError(
            f"unknown model {name!r}: known are {', '.join(MODELS)}.{suggestion(name, MODELS)}"
        )
    return MODELS[name]


def model_name(architecture: Architecture) -> str:
    """Return the table's name of an architecture, or "custom" if it has none."""
    return next((row.name for row in MODELS.values() if row.architecture == architecture), "custom")
