"""Building the C++ library for the tests: once a session for each configuration, with the tools of
this Python environment."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from anyflow_deploy.bundle.manifest import records_from_ranges
from anyflow_deploy.models import architecture_from_config
from anyflow_deploy.shape_ranges import widest_ranges

GOLDEN = Path(__file__).parent / "golden"
KINDS = {kind: GOLDEN / kind for kind in ("bidirectional", "causal")}
SOURCE = Path(__file__).parent.parent / "engines" / "cpp"


def find_tool(name: str) -> str:
    """cmake or ninja: of this environment (the dev extra), or the system's."""
    here = Path(sys.executable).parent / name
    found = str(here) if here.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: pip install 'anyflow-deploy[dev]' brings it")
    return found


def find_compiler() -> str:
    """The C++ compiler that CMake will take."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    pytest.skip(
        "there is no C++ compiler here: apt install g++ (or name one in CXX), and the C++ library"
        " is tested"
    )


def run(*words: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    """A command that has to succeed; what it said is in the failure."""
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False, **more
    )
    assert done.returncode == 0, (
        f"{' '.join(map(str, words))}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    )
    return done


def configure(folder: Path, *settings: str) -> str:
    """Configure into `folder`; what CMake said."""
    find_compiler()
    tools = (f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}", f"-DANYFLOW_PYTHON={sys.executable}")
    return run(
        find_tool("cmake"), "-S", SOURCE, "-B", folder, "-G", "Ninja", *tools, *settings
    ).stdout


def build_targets(folder: Path, *targets: str) -> Path:
    """Build targets in a configured folder."""
    run(
        find_tool("cmake"),
        "--build",
        folder,
        "--parallel",
        "2",
        *(["--target", *targets] if targets else []),
    )
    return folder


def sample_manifest(kind: str) -> dict[str, Any]:
    """A manifest like the exporter's, of a golden model, that lists one file."""
    config = json.loads((KINDS[kind] / "config.json").read_text())
    tensor = {
        "name": "latents",
        "dtype": "float32",
        "shape": ["batch", "frames", 4, "height", "width"],
    }
    graph = {"file": "weights.bin", "opset": 20, "inputs": [tensor], "outputs": [tensor]}
    keys = {"name": "key.0", "dtype": "float16", "shape": [1, "tokens", 2, 8]}
    graphs: dict[str, Any] = {"transition": graph}
    if kind == "causal":
        graphs = {"text": graph, "chunk": {**graph, "outputs": [tensor, keys]}, "compress": graph}
    ranges = records_from_ranges(widest_ranges(architecture_from_config(config)))
    return {
        "schema": 1,
        "kind": kind,
        "model": "custom",
        "config": config,
        "source": {"kind": "folder", "location": "somewhere", "revision": None, "seed": None},
        "precision": "fp32",
        "quantization": None,
        "achieved": {
            "weight_bytes": {"F32": 10},
            "quantized_flops": 0.0,
            "quantized_weights": 0.0,
            "full_precision_layers": {"a": "b"},
        },
        "target": "cpu",
        "graphs": graphs,
        "ranges": {axis: r.model_dump() for axis, r in ranges.items()},
        "schedule": {"shift": 5.0, "steps": 4},
        "video": {
            "spatial_factor": 8,
            "temporal_factor": 4,
            "fps": 16,
            "text_tokens": 512,
            "frames": 9,
            "height": 64,
            "width": 96,
        },
        "tools": {"anyflow-deploy": "0.2.0"},
        "files": {
            "weights.bin": {"bytes": 11, "sha256": hashlib.sha256(b"some weight").hexdigest()}
        },
    }


def engine_record(digest: str) -> dict[str, Any]:
    """An engine.json of the toy backend."""
    return {
        "schema": 1,
        "backend": "toy",
        "bundle": digest,
        "device": {"kind": "cpu", "name": "x86_64", "compute_capability": None},
        "versions": {"torch": "2.13.0"},
        "settings": {"provider": "cpu", "device": 0, "strip": False},
        "ranges": sample_manifest("bidirectional")["ranges"],
        "profiles": {"transition": {"any": {"latents": [[1], [2], [3]]}}},
        "achieved": {"transition": "x"},
        "seconds": 1.5,
        "files": {},
    }


def fuzz_corpus() -> dict[str, list[dict[str, Any]]]:
    """What the fuzzers start from, by target."""
    return {
        "manifest": [sample_manifest(kind) for kind in KINDS],
        "engine": [engine_record("0" * 64)],
        "safetensors": [
            {
                "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
                "__metadata__": {"x": "y"},
            }
        ],
    }


class Conformance:
    """The program `conformance`, asked one question after the other."""

    def __init__(self, program: Path, **more: str) -> None:
        environment = {
            **os.environ,
            **more,
            "ASAN_OPTIONS": "detect_leaks=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        self._process = subprocess.Popen(
            [str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __call__(self, question: str, **details: Any) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"question": question, **details}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the program died with {self._process.wait()} over {question} {details}"
        return dict(json.loads(line))

    def close(self) -> None:
        """End it; a sanitizer's complaint (a leak, say) is its exit status."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        assert self._process.wait(60) == 0
        self._process.stdout.close()


@functools.cache
def sanitizers_work() -> bool:
    """Whether the compiler can link its address sanitizer."""
    words = [find_compiler(), "-x", "c++", "-fsanitize=address,undefined", "-o", os.devnull, "-"]
    return (
        subprocess.run(
            words, input="int main() {}", text=True, capture_output=True, check=False
        ).returncode
        == 0
    )
