"""benchmarks/gpu.py as far as it goes without a GPU, run in this process."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def gpu(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """What `python benchmarks/gpu.py WORDS` does."""
    monkeypatch.setattr(sys, "argv", [str(GPU), *words])
    monkeypatch.syspath_prepend(GPU.parent)  # where it finds common.py
    runpy.run_path(str(GPU), run_name="__main__")


def test_the_gpu_benchmark_runs_in_small_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line of it but CUDA's; a backend that cannot run is named and does not end it."""
    words = (
        "--tiny --device cpu --engines onnxruntime:fp32,tensorrt:fp32 --rounds 1 --repeats 1"
        " --skip-diffusers"
    )
    gpu(monkeypatch, *words.split())
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["tokens"] == 3 * 4 * 6 and result["layers"] == 3
    ours = result["whole"]["contestants"]["onnxruntime:fp32"]
    assert ours["step_ms"] > 0 and set(ours["clip_ms"]) == {"1", "2", "4", "8"}
    assert result["whole"]["contestants"]["tensorrt:fp32"]["not_run"]
    assert (
        0
        < result["causal"]["onnxruntime:fp32"]["first_chunk_ms"]
        < result["causal"]["onnxruntime:fp32"]["clip_ms"]
    )


def test_a_failure_of_diffusers_does_not_cost_the_causal_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("diffusers cannot")

    monkeypatch.syspath_prepend(GPU.parent)
    part, device, size = (
        importlib.import_module(name) for name in ("gpu_causal", "gpu_device", "gpu_size")
    )
    monkeypatch.setattr(part, "diffusers_clips", fail)
    options = SimpleNamespace(engines="tensorrt:fp32", rounds=1, skip_diffusers=False)
    result = part.causal(options, size.sizes(True, 1), tmp_path, device.BenchmarkDevice("cpu"))
    assert result["diffusers"] == {"not_run": "diffusers cannot"}
    assert set(result) == {"tensorrt:fp32", "diffusers"}


def test_fewer_layers_where_minutes_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(GPU.parent)
    size = runpy.run_path(str(GPU))["sizes"](True, 2)
    assert (size.model.num_layers, size.causal.num_layers) == (2, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the absence of a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="--tiny --device cpu"):
        gpu(monkeypatch, "--tiny", "--device", "cuda")
