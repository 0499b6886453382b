"""Every float type of safetensors widens to the numbers that torch reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from anyflow_deploy.checkpoints.float_arrays import FLOAT_TYPES, float32_from_bytes
from anyflow_deploy.dtypes import SAFETENSORS
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.pipelines.text_encoder import load_embeddings, save_embeddings


@pytest.mark.parametrize("kind", FLOAT_TYPES)
def test_every_type_has_torchs_values(kind: str) -> None:
    size = SAFETENSORS[kind].bytes
    data = bytes(range(256)) if size == 1 else np.random.default_rng(0).bytes(512 * size)
    expected = torch.frombuffer(bytearray(data), dtype=getattr(torch, SAFETENSORS[kind].name))
    with np.errstate(over="ignore"):
        actual = float32_from_bytes(kind, data)
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual, expected.float().numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
def test_embeddings_of_any_type_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    embeds = torch.tensor([[[1.0, -0.5], [0.25, 3.0]]]).to(dtype)
    save_file({"prompt_embeds": embeds}, tmp_path / "e.safetensors")
    loaded, prompts = load_embeddings(tmp_path / "e.safetensors")
    assert loaded.dtype == np.float32 and prompts == []
    np.testing.assert_array_equal(loaded, embeds.float().numpy())


def test_saved_embeddings_are_read_back(tmp_path: Path) -> None:
    embeds = np.random.default_rng(0).standard_normal((2, 3, 4), np.float32)
    save_embeddings(tmp_path / "12:30", embeds, ["a fox", "…"])
    loaded, prompts = load_embeddings(tmp_path / "12:30")
    np.testing.assert_array_equal(loaded, embeds)
    assert prompts == ["a fox", "…"]


def test_files_without_embeddings_say_what_they_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "e.safetensors"
    save_file({"latents": torch.zeros(1)}, path)
    with pytest.raises(AnyFlowError, match=r"no prompt embeddings \(it holds latents\)"):
        load_embeddings(path)
    save_file({"prompt_embeds": torch.zeros(1, dtype=torch.int64)}, path)
    with pytest.raises(AnyFlowError, match=r"prompt_embeds is I64; allowed are F64, F32, F16, BF"):
        load_embeddings(path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(AnyFlowError, match=r"is there and may not be read \(permission denied\)"):
        load_embeddings(path)
