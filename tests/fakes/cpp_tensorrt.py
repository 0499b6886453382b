"""The C++ library's TensorRT backend on a fake machine: engines/cpp/tests/fakes built against
NVIDIA's own headers, the library built on it by its own CMake, and the plans' arithmetic once more
in numpy. With headers of TensorRT for RTX it is that backend.

NVIDIA's headers are not ours to check in. ANYFLOW_TENSORRT_HEADERS names them (folders with colons
between: TensorRT's, CUDA's and, where it is apart, the one with crt/), or tools/tensorrt_headers.py
has put a release into .cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from anyflow_deploy import Bundle, load_bundle
from anyflow_deploy.engines.engine import Array, frame_times, prepare_inputs
from anyflow_deploy.engines.kv_cache import CachePlan
from anyflow_deploy.engines.streaming import CacheStream, Positions, cache_tensor_names
from tests.cpp_build import (
    SOURCE,
    build_targets,
    configure,
    find_compiler,
    find_tool,
    run,
    sample_manifest,
    sanitizers_work,
)
from tools import tensorrt_headers

F, Bytes = np.float32, NDArray[np.uint8]
ELEMENT = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}
NO_HEADERS = (
    "no headers of {} here: they are in no wheel, and not checked in. make test-cpp-tensorrt"
    " fetches them into .cache/tensorrt-headers and runs these tests (or name folders in"
    " ANYFLOW_TENSORRT_HEADERS)"
)
"""Why a test is skipped, and the command that runs it."""
INTERFACES = ("VRuntime", "VCudaEngine", "VExecutionContext")
RTX_INTERFACES = ("VRuntimeConfig",)
"""Those that the backend uses of TensorRT for RTX, besides."""


def find_headers(*releases: str) -> list[Path]:
    """Where NVIDIA's headers are, TensorRT's first: those that ANYFLOW_TENSORRT_HEADERS names, or
    the first of some releases that lies in .cache. Empty where there are none."""
    named = os.environ.get("ANYFLOW_TENSORRT_HEADERS")
    if not named:
        return tensorrt_headers.cached_header_folders(*releases)
    folders = [Path(folder) for folder in named.split(":")]
    trt = next((folder for folder in folders if (folder / "NvInferRuntime.h").exists()), None)
    assert trt is not None, f"none of {folders} holds NvInferRuntime.h"
    return [trt, *(folder for folder in folders if folder != trt)]


def header_folders() -> list[Path]:
    """`find_headers`, which skips the test where there are none."""
    folders = find_headers()
    if not folders:
        pytest.skip(NO_HEADERS.format("TensorRT"))
    return folders


def are_of_rtx(trt: Path) -> bool:
    """Whether headers are those of TensorRT for RTX."""
    return "TRT_MAJOR_RTX" in (trt / "NvInferVersion.h").read_text()


RTX = any(are_of_rtx(folder) for folder in find_headers()[:1])
"""Whether the library that is faked here is TensorRT for RTX."""
BACKEND, VERSION_KEY, LIBRARY, OPTION = (
    ("tensorrt-rtx", "tensorrt_rtx", "tensorrt_rtx", "TENSORRT_RTX")
    if RTX
    else ("tensorrt", "tensorrt", "nvinfer", "TENSORRT")
)
"""Of that library: our backend, its name in engine.json, its file, and what CMake calls it."""
CAPABILITY = "12.0" if RTX else "9.0"
"""Of the GPU."""


def v_classes(implementation: str) -> str:
    """Classes that have every function of TensorRT's internal interfaces; each says, when it is
    called, that it is not acted."""
    made = [
        "#pragma once",
        "// Made from NvInferImpl.h.",
        "namespace standin {",
        "using namespace nvinfer1;",
    ]
    for name in (*INTERFACES, *(RTX_INTERFACES if RTX else ())):
        body = re.search(
            rf"class {name} : public VRoot\s*\{{(.*?)\n\}};", implementation, re.DOTALL
        )
        assert body, f"NvInferImpl.h has no {name} as its releases had it so far"
        functions = re.findall(
            r"virtual\s+([^;]*?)\b(\w+)\(([^)]*)\)\s*(const)?\s*noexcept\s*= 0;", body[1]
        )
        assert len(functions) == body[1].count("= 0;"), f"a function of {name} was not understood"
        made.append(f"class {name}Base : public apiv::{name} {{\n public:")
        for kind, function, parameters, const in functions:
            head = f"  {kind} {function}({' '.join(parameters.split())}) {const} noexcept override"
            made.append(f'{head} {{ violation("{name}::{function} is not acted"); }}')
        made.append("};")
    return "\n".join([*made, "}  // namespace standin", ""])


def version_of(trt: Path) -> str:
    """ "10.3.0", from the headers."""
    text = (trt / "NvInferVersion.h").read_text()
    defined = dict(re.findall(r"#define (\w+) (\S+)", text))
    numbers = [defined[f"NV_TENSORRT_{part}"] for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(defined.get(number, number) for number in numbers)


class FakeTensorRTBuild:
    """Where the stand-in and the library on it were built.

    Attributes:
        program: `conformance` of the library's own build.
        misuse_test: a program that breaks the stand-in's rules.
        version: of TensorRT.
    """

    def __init__(self, folder: Path, sanitize: str | None = None) -> None:
        trt, *cuda = header_folders()
        find_compiler()
        self.version = version_of(trt)
        tensorrt = folder / "tensorrt"
        toolkit = folder / "cuda"
        made = folder / "made"
        for place in (tensorrt, toolkit / "include", made):
            place.mkdir(parents=True, exist_ok=True)
        headers = [
            (tensorrt / "include", trt),
            *((toolkit / "include" / h.name, h) for place in cuda for h in place.iterdir()),
        ]
        for link, header in headers:
            if not link.is_symlink() or link.readlink() != header:  # a folder of another release
                link.unlink(missing_ok=True)
                link.symlink_to(header)
        (toolkit / "version.json").write_text('{"cuda": {"version": "12.9.0"}}')
        classes = v_classes((trt / "NvInferImpl.h").read_text())
        header = made / "v_classes.hpp"
        if not header.exists() or header.read_text() != classes:
            header.write_text(classes)
        if sanitize is None:
            sanitize = "address,undefined" if sanitizers_work() else ""
        flags = (
            f"-fsanitize={sanitize};-fno-sanitize-recover=all;-fno-omit-frame-pointer"
            if sanitize
            else ""
        )
        debug = ("-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0 -g1 -Werror")
        run(
            find_tool("cmake"),
            "-S",
            SOURCE / "tests" / "fakes",
            "-B",
            folder / "standin",
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DTENSORRT={tensorrt}",
            f"-DCUDA={toolkit}",
            f"-DV_CLASSES={made}",
            f"-DLIBRARY={LIBRARY}",
            f"-DCAPABILITY={CAPABILITY}",
            f"-DSANITIZE={flags}",
            *debug,
        )
        self.misuse_test = build_targets(folder / "standin") / "misuse_test"
        said = configure(
            folder / "library",
            f"-DANYFLOW_{OPTION}=ON",
            f"-DTensorRT{'_RTX' if RTX else ''}_ROOT={tensorrt}",
            f"-DCUDAToolkit_ROOT={toolkit}",
            "-DANYFLOW_AOTINDUCTOR=OFF",
            "-DANYFLOW_OPENSSL=OFF",
            "-DANYFLOW_TESTS=ON",
            f"-DANYFLOW_SANITIZE={sanitize}",
            *debug,
        )
        assert f"{OPTION} is built" in said
        self.program = build_targets(folder / "library", "conformance") / "tests" / "conformance"


# Bundles and engines.


def graph_records(config: dict[str, Any], kind: str, cache: str) -> dict[str, Any]:
    """The graphs' tensors, as the exporter names them."""
    channels, text = config["in_channels"], config["text_dim"]
    heads = [config["num_attention_heads"], config["attention_head_dim"]]

    def tensor(name: str, dtype: str, *shape: Any) -> dict[str, Any]:
        return {"name": name, "dtype": dtype, "shape": list(shape)}

    batch: Any = "batch" if kind == "bidirectional" else 1
    state = ["frames", channels, "height", "width"]
    times = [tensor(name, "float32", batch, "frames") for name in ("t", "r")]
    latents = tensor("latents", "float32", batch, *state)
    words = tensor("text", "float32", batch, "text", text)
    moved = [tensor(name, "float32", batch, *state) for name in ("z_r", "velocity")]
    about = {"file": "weights.bin", "opset": 20}
    if kind == "bidirectional":
        return {"transition": {**about, "inputs": [latents, *times, words], "outputs": moved}}
    names = cache_tensor_names(config["num_layers"])

    def cached(prefix: str, axis: str, which: list[str] = names) -> list[dict[str, Any]]:
        return [tensor(prefix + name, cache, 1, axis, *heads) for name in which]

    where = tensor("positions", "int64", "frames")
    own = cached("", "tokens")
    of_text = cached("text_", "text")
    seen = cached("past_", "past", names[:-2])  # `compress` does not use the last layer's
    return {
        "text": {**about, "inputs": [words], "outputs": of_text},
        "chunk": {
            **about,
            "inputs": [latents, *times, where, *of_text, *cached("past_", "past")],
            "outputs": [*moved, *own],
        },
        "compress": {**about, "inputs": [latents, where, *of_text[:-2], *seen], "outputs": own},
    }


def write_bundle(folder: Path, kind: str, cache: str = "float32") -> Bundle:
    """A bundle of a golden model, with the graphs' tensors and without the graphs."""
    manifest = sample_manifest(kind)
    manifest["graphs"] = graph_records(manifest["config"], kind, cache)
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"some weight")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return load_bundle(folder)


LIMITS = {
    "batch": (1, 2),
    "frames": (1, 4),
    "height": (4, 12),
    "width": (4, 12),
    "text": (1, 9),
    "past": (0, 400),
}
"""Of the profile that everything lies in."""


def plan_text(
    bundle: Bundle,
    graph: str,
    version: str,
    *lines: str,
    profiles: list[dict[str, tuple[int, int]]] | None = None,
) -> str:
    """A plan for the stand-in; see engines/cpp/tests/fakes/plan.cpp. Later lines overrule earlier
    ones."""
    model = bundle.manifest.graphs[graph]
    architecture = bundle.manifest.architecture
    patch = architecture.compressed_patch_size if graph == "compress" else architecture.patch_size
    assert patch is not None
    text = [
        "standin-plan",
        f"version {version}",
        f"capability {CAPABILITY}",
        f"graph {graph}",
        f"patch {patch[1]}",
        "weights 1000",
    ]
    for word, tensors in (("input", model.inputs), ("output", model.outputs)):
        for tensor in tensors:
            axes = " ".join(str(axis if isinstance(axis, int) else -1) for axis in tensor.shape)
            text.append(f"{word} {tensor.name} {tensor.dtype} {axes}")
    for limits in profiles or [{}]:
        text.append("profile")
        for tensor in model.inputs:
            ends = [
                (axis, axis) if isinstance(axis, int) else {**LIMITS, **limits}[axis]
                for axis in tensor.shape
            ]
            rows = [
                [least for least, _ in ends],
                [most for _, most in ends],
                [most for _, most in ends],
            ]
            text.append(f"range {tensor.name} " + " ".join(str(n) for row in rows for n in row))
    return "\n".join([*text, *lines, "end", ""])


def write_engine(bundle: Bundle, version: str, name: str = "tensorrt-sm90", **how: Any) -> Path:
    """An engine folder inside the bundle.

    Args:
        bundle: the bundle.
        version: of TensorRT.
        name: of the folder.
        how: `lines`: of each graph's plan, more; `profiles`; `content`: of each graph, in place of
            a plan; `settings`, `record`: changes to engine.json; `graphs`: those that are built.
    """
    folder = bundle.path / "engines" / name
    folder.mkdir(parents=True)
    files, profiles = {}, how.get("profiles") or [{}]
    for graph in how.get("graphs", bundle.manifest.graphs):
        text = plan_text(
            bundle, graph, version, *how.get("lines", {}).get(graph, ()), profiles=profiles
        )
        content = how.get("content", {}).get(graph, text.encode())
        (folder / f"{graph}.plan").write_bytes(content)
        files[f"{graph}.plan"] = {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    record = {
        "schema": 1,
        "backend": BACKEND,
        "bundle": bundle.digest,
        "device": {"kind": "cuda", "name": "NVIDIA Stand-in", "compute_capability": CAPABILITY},
        "versions": {VERSION_KEY: version},
        "settings": {"strip": False, **how.get("settings", {})},
        "ranges": json.loads((bundle.path / "manifest.json").read_text())["ranges"],
        "profiles": {
            g.removesuffix(".plan"): {f"p{i}": {} for i in range(len(profiles))} for g in files
        },
        "seconds": 1.5,
        "files": files,
        **how.get("record", {}),
    }
    (folder / "engine.json").write_text(json.dumps(record))
    return folder


# The plans' arithmetic in numpy.


def hash_bytes(content: bytes) -> int:
    """See plan.cpp."""
    octets = np.frombuffer(content, np.uint8).astype(np.uint64)
    factors = (np.arange(len(octets), dtype=np.uint64) * 2654435761 + 97) & 0xFFFFFFFF
    return int(((octets + 1) * factors % 2**32).sum()) % 2**32


def bytes_of_type(values: NDArray[np.uint32], dtype: str) -> bytes:
    """0 to 255 in a type."""
    exact = values.astype(np.float32)
    if dtype == "bfloat16":
        return (exact.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return exact.astype(dtype).tobytes()


def compute_plan(
    bundle: Bundle, graph: str, inputs: dict[str, Any], tokens: int = 0
) -> dict[str, Any]:
    """What a plan computes: arrays of latents, and bytes of keys and values."""
    model = bundle.manifest.graphs[graph]
    hashes = {
        tensor.name: hash_bytes(bytes(inputs[tensor.name])) * (i + 1)
        for i, tensor in enumerate(model.inputs)
    }
    memory = (
        sum(value for name, value in hashes.items() if name not in ("latents", "t", "r")) % 2**32
    )
    total, outputs = sum(hashes.values()) % 2**32, {}
    for ordinal, tensor in enumerate(model.outputs, 1):
        if tensor.name in ("z_r", "velocity"):
            z = inputs["latents"]
            t, r = (inputs[name][:, :, None, None, None] for name in ("t", "r"))
            velocity = z * F(0.5) + t * F(2**-10) + r * F(2**-12) + F(memory % 65536) / F(65536)
            outputs[tensor.name] = (
                velocity if tensor.name == "velocity" else z - (t - r) / F(1000) * velocity
            )
        else:
            count = tokens * int(
                np.prod([axis for axis in tensor.shape[2:] if isinstance(axis, int)])
            )
            values = (np.arange(count, dtype=np.uint64) * 7 + ordinal * 31 + total) % 2**32 % 256
            outputs[tensor.name] = bytes_of_type(values.astype(np.uint32), tensor.dtype)
    return outputs


class FakePlanRun:
    """See `engine.Run`."""

    def __init__(self, bundle: Bundle, graph: str, latents: Array, others: dict[str, Any]) -> None:
        self._bundle = bundle
        self._graph = graph
        self._z = latents.copy()
        self._others = others

    def _compute(self, t: ArrayLike, r: ArrayLike) -> dict[str, Any]:
        source, target = frame_times(t, r, self._z.shape)
        return compute_plan(
            self._bundle,
            self._graph,
            {"latents": self._z, "t": source, "r": target, **self._others},
        )

    def step(self, t: ArrayLike, r: ArrayLike) -> None:
        self._z = self._compute(t, r)["z_r"]

    def velocity(self, t: ArrayLike, r: ArrayLike) -> Array:
        return np.asarray(self._compute(t, r)["velocity"])

    def read(self) -> Array:
        return self._z.copy()

    def close(self) -> None: ...

    def __enter__(self) -> FakePlanRun:
        return self

    def __exit__(self, *_: object) -> None: ...


class FakePlanCache:
    """See `streaming.Cache`."""

    def __init__(self, bundle: Bundle, text: Array, plan: CachePlan) -> None:
        self._bundle = bundle
        self._names = cache_tensor_names(plan.layers)
        self._plan = plan
        dtype = next(
            tensor.dtype
            for tensor in bundle.manifest.graphs["chunk"].outputs
            if tensor.name == "key.0"
        )
        self._token = plan.heads * plan.channels * ELEMENT[dtype]
        self._buffers = {
            name: np.zeros(plan.capacity * self._token, np.uint8) for name in self._names
        }
        self._words = compute_plan(bundle, "text", {"text": text}, text.shape[1])

    def _inputs(self, positions: Positions, past: int) -> dict[str, Any]:
        seen = {f"past_{name}": self._buffers[name][: past * self._token] for name in self._names}
        return {"positions": positions, **self._words, **seen}

    def run(self, latents: Array, positions: Positions, past: int) -> FakePlanRun:
        return FakePlanRun(self._bundle, "chunk", latents, self._inputs(positions, past))

    def write(
        self, graph: str, latents: Array, positions: Positions, past: int, tokens: int
    ) -> None:
        still = np.zeros(latents.shape[:2], np.float32)
        inputs = {"latents": latents, "t": still, "r": still, **self._inputs(positions, past)}
        made = compute_plan(self._bundle, graph, inputs, tokens)
        for name in self._names:
            begin = past * self._token
            self._buffers[name][begin : begin + tokens * self._token] = np.frombuffer(
                made[name], np.uint8
            )

    def move(self, to: int, start: int, tokens: int) -> None:
        for buffer in self._buffers.values():
            held = buffer[start * self._token : (start + tokens) * self._token].copy()
            buffer[to * self._token : (to + tokens) * self._token] = held

    def grow(self, capacity: int) -> None:
        raise NotImplementedError

    def close(self) -> None: ...


class FakePlanEngine:
    """See `Engine`."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.description = bundle, "machine"
        self.architecture = bundle.manifest.architecture
        self.ranges = bundle.manifest.shape_ranges

    def start(self, latents: ArrayLike, text: ArrayLike) -> FakePlanRun:
        a = self.architecture
        z, words = prepare_inputs(self.ranges, a.in_channels, a.text_dim, latents, text)
        return FakePlanRun(self.bundle, "transition", z, {"text": words})

    def open_stream(self, text: ArrayLike, plan: CachePlan) -> CacheStream:
        return CacheStream(FakePlanCache(self.bundle, np.asarray(text, np.float32), plan), plan)

    def close(self) -> None: ...
