from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

GPU = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


def gpu(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(GPU), *words], capture_output=True, text=True, timeout=300)


def test_the_gpu_benchmark_runs_in_small_on_the_cpu() -> None:
    """Every line of it but CUDA's; a backend that cannot run is named and does not end it."""
    words = "--tiny --device cpu --layers 2 --engines onnxruntime:fp32,tensorrt:fp32 --rounds 1 --repeats 1 --skip-diffusers"
    done = gpu(*words.split())
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tokens"] == 3 * 4 * 6 and result["layers"] == 2
    ours = result["whole"]["contestants"]["onnxruntime:fp32"]
    assert ours["step_ms"] > 0 and set(ours["clip_ms"]) == {"1", "2", "4", "8"}
    assert result["whole"]["contestants"]["tensorrt:fp32"]["not_run"]
    assert 0 < result["causal"]["onnxruntime:fp32"]["first_chunk_ms"] < result["causal"]["onnxruntime:fp32"]["clip_ms"]


def test_without_a_gpu_it_says_so() -> None:
    done = gpu("--tiny", "--device", "cuda")
    assert done.returncode == 1 and "--tiny --device cpu" in done.stderr
