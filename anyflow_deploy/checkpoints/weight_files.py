"""Find the files that a transformer's weights lie in, in every layout that people have.

One file or shards with an index or without, named `diffusion_pytorch_model` as diffusers names them
or `model` as others do, with or without a variant (`.fp16`); or the file itself. Only safetensors
count: `.bin` and `.pt` files are pickles, and loading a pickle runs whatever program is inside.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from anyflow_deploy.errors import CheckpointError, unreadable

STEM = "diffusion_pytorch_model"
STEMS = (STEM, "model")
INDEX_SUFFIX = ".safetensors.index.json"
_SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>.*)\.safetensors")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt"}


def find_weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Find the weight files in a transformer folder.

    Args:
        folder: holds them.
        variant: such as "fp16", for `diffusion_pytorch_model.fp16.safetensors`.

    Returns:
        One file, or all shards.

    Raises:
        CheckpointError: no weights, missing shards, pickles alone, or weights of other variants,
            with what there is.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise CheckpointError(unreadable(folder, error)) from None
    ending = "" if variant is None else f".{variant}"
    for stem in STEMS:
        indexes = [f"{stem}{ending}{INDEX_SUFFIX}", f"{stem}.safetensors.index{ending}.json"]
        for name in indexes:
            if name in names:
                return files_from_index(folder / name)
        if f"{stem}{ending}.safetensors" in names:
            return [folder / f"{stem}{ending}.safetensors"]
        shards = _shards_without_index(folder, names, stem, ending)
        if shards:
            return shards
    raise CheckpointError(_what_there_is(folder, names, f"{STEM}{ending}.safetensors"))


def files_from_index(index: Path) -> list[Path]:
    """Return the shards that an index names.

    Raises:
        CheckpointError: a damaged index, names of other folders, or missing shards.
    """
    weight_map = read_json(index).get("weight_map", {})
    if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
        raise CheckpointError(
            f"{index} is damaged: weight_map has to map parameters to file names. Download it"
            " again."
        )
    names = sorted(set(weight_map.values()))
    outside = [n for n in names if len(PurePosixPath(n).parts) != 1]
    if outside or not names:
        raise CheckpointError(
            f"{index} names {outside[0] if outside else 'no shards'}; shards lie beside their"
            " index."
        )
    _check_complete(index.parent, names)
    return [index.parent / n for n in names]


def _shards_without_index(folder: Path, names: list[str], stem: str, ending: str) -> list[Path]:
    """Return the shards whose names say that they belong together; empty where there are none."""
    matches = [match for name in names if (match := _SHARD.fullmatch(name))]
    own = [
        match
        for match in matches
        if match["name"] + match["end"] == stem + ending and not (match["end"] and not ending)
    ]
    if not own:
        return []
    counts = sorted({match["count"] for match in own})
    if len(counts) > 1:
        raise CheckpointError(
            f"{folder} has shards of {' and '.join(str(int(count)) for count in counts)} and no"
            f" index ({stem}{ending}{INDEX_SUFFIX}) that says which belong together. Download the"
            " index, or keep one set."
        )
    first = own[0]
    expected = [
        f"{first['name']}-{number:05d}-of-{first['count']}{first['end']}.safetensors"
        for number in range(1, int(first["count"]) + 1)
    ]
    _check_complete(folder, expected)
    return [folder / name for name in expected]


def _check_complete(folder: Path, names: list[str]) -> None:
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(names)} shards: {', '.join(missing)}."
            " Download them."
        )


def _what_there_is(folder: Path, names: list[str], wanted: str) -> str:
    """Say which weights a folder has in place of the wanted ones, and how to get at them."""
    stored = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if Path(name).suffix in _PICKLES]
    if not stored and pickles:
        return (
            f"{folder} has only pickled weights ({', '.join(pickles)}), which are never loaded: a"
            " pickle is a program. Convert them where you trust them: pipe.save_pretrained(DIR,"
            " safe_serialization=True)."
        )
    if not stored:
        return f"{folder} has no {wanted} (nor shards of it). Download the weights."
    shown = ", ".join(stored[:6]) + (", …" if len(stored) > 6 else "")
    variants = sorted({v for name in stored if (v := _variant_of(name))})
    advice = f"Give --variant {variants[0]}." if variants else "Give the file itself."
    if variants and wanted.removeprefix(STEM).count(".") > 1:
        advice = f"Its variants: {', '.join(variants)}."
    return f"{folder} has no {wanted}; it holds {shown}. {advice}"


def _variant_of(name: str) -> str | None:
    shard = _SHARD.fullmatch(name)
    plain = (shard["name"] + shard["end"]) if shard else name.removesuffix(".safetensors")
    stem, dot, variant = plain.partition(".")
    return variant if dot and stem in STEMS else None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content
