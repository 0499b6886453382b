"""Engines built by NVIDIA's real builder: TensorRT for RTX, on a machine without a GPU.

Every kind of bundle is parsed, and some of them are built: one for each of the compute
capabilities 8.6, 8.9 and 12.0, and a portable one. Each runs in a process of its own, as
`anyflow-build` does. Nothing is run: that needs a GPU.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from anyflow_deploy import AnyFlowError, BackendError, Bundle, load_bundle
from anyflow_deploy.engines.build import build_engine
from anyflow_deploy.engines.engine_folder import load_engine_folder
from anyflow_deploy.engines.tensorrt.lint.real_parser import parse_graphs
from anyflow_deploy.engines.tensorrt_rtx import settings
from anyflow_deploy.engines.tensorrt_rtx.devices import device_of_target, is_supported
from anyflow_deploy.engines.tensorrt_rtx.settings import TensorRTRtxSettings
from tests.conftest import CAUSAL, SMALL, Export

RTX = pytest.importorskip(
    "tensorrt_rtx", reason="TensorRT for RTX is not installed (it is for Linux on x86-64)"
)

BUILD = "from anyflow_deploy.cli.build import main; main()"

INTERRUPT_IMPORT = """
import signal, sys

def interrupt(frame, event, argument):
    # The extension module is opened and starts, which takes tens of milliseconds
    if event == "c_call" and argument.__name__ == "create_dynamic":
        sys.setprofile(None)
        signal.setitimer(signal.ITIMER_REAL, 0.001)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "tensorrt_rtx_bindings.tensorrt_rtx":
            print("importing", flush=True)
            sys.setprofile(interrupt)

signal.signal(signal.SIGALRM, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
"""


def run_build(bundle: Bundle, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BUILD, str(bundle.path), "--backend", "tensorrt-rtx", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def build(bundle: Bundle, output: Path, *words: str) -> dict[str, Any]:
    """The record of an engine that has just been built."""
    done = run_build(bundle, "--output", str(output), *words)
    assert done.returncode == 0, done.stdout + done.stderr
    load_engine_folder(output)
    return json.loads((output / "engine.json").read_text())


PLAIN = [
    (SMALL, "fp32", 20, "cpu"),
    (SMALL, "fp32", 23, "cpu"),
    (SMALL, "fp16", 20, "cpu"),
    (SMALL, "bf16", 20, "h100"),
    (SMALL, "bf16", 23, "h100"),
    (CAUSAL, "fp32", 20, "cpu"),
    (CAUSAL, "fp32", 23, "cpu"),
    (CAUSAL, "fp16", 20, "cpu"),
]
EIGHT_BITS: list[tuple[Path, str, dict[str, Any]]] = [
    (SMALL, "int8", {}),
    (SMALL, "fp8", {}),
    (CAUSAL, "fp8", {"opset": 23}),
]


def parse(bundle: Bundle) -> None:
    paths = [bundle.file(record.file) for record in bundle.manifest.graphs.values()]
    assert parse_graphs(paths, "tensorrt-rtx").problems == ()


@pytest.mark.parametrize(("checkpoint", "precision", "opset", "target"), PLAIN)
def test_the_parser_takes_every_kind(
    export_once: Export, checkpoint: Path, precision: str, opset: int, target: str
) -> None:
    parse(export_once(checkpoint, precision, opset, target))


@pytest.mark.parametrize(("checkpoint", "precision", "settings"), EIGHT_BITS)
def test_the_parser_takes_eight_bits(
    export_quantized: Export, checkpoint: Path, precision: str, settings: dict[str, Any]
) -> None:
    parse(export_quantized(checkpoint, precision, **settings))


def test_a_portable_engine(small_bundle: Export, tmp_path: Path) -> None:
    record = build(small_bundle("fp16"), tmp_path / "engine", "--target", "any")
    assert record["device"] == {"kind": "cuda", "name": "any", "compute_capability": None}
    assert record["versions"]["tensorrt_rtx"] == RTX.__version__
    assert record["achieved"] == {} and list(record["profiles"]["transition"])
    assert set(record["files"]) == {"transition.plan"}


def test_int8_for_an_rtx_3090(export_quantized: Export, tmp_path: Path) -> None:
    record = build(export_quantized(SMALL, "int8"), tmp_path / "engine", "--target", "rtx3090")
    assert record["device"]["compute_capability"] == "8.6"


def test_fp8_for_an_rtx_4090(export_quantized: Export, tmp_path: Path) -> None:
    record = build(export_quantized(SMALL, "fp8"), tmp_path / "engine", "--target", "rtx4090")
    assert record["device"]["compute_capability"] == "8.9"


def test_a_causal_model_for_an_rtx_5090(export_once: Export, tmp_path: Path) -> None:
    bundle = export_once(CAUSAL, "fp16")
    record = build(bundle, tmp_path / "engine", "--target", "rtx5090")
    assert record["device"]["compute_capability"] == "12.0"
    assert set(record["files"]) == {f"{graph}.plan" for graph in bundle.manifest.graphs}


def test_fp8_for_an_rtx_3090_is_refused_by_us(export_quantized: Export, tmp_path: Path) -> None:
    done = run_build(export_quantized(SMALL, "fp8"), "--target", "rtx3090")
    text = " ".join(done.stderr.split())
    assert done.returncode == 1 and "needs compute capability 8.9" in text
    assert "GeForce RTX 3090 24GB has 8.6" in text and "one of fp32, fp16, bf16, int8" in text
    done = run_build(export_quantized(SMALL, "fp8"), "--target", "any")
    text = " ".join(done.stderr.split())
    assert done.returncode == 1 and "--target rtx4090" in text


def test_the_builder_refuses_fp8_for_86_too(export_quantized: Export, tmp_path: Path) -> None:
    """So the row that refuses it beforehand is right; when this fails, let it through."""
    program = (
        "from anyflow_deploy.engines.tensorrt.build import builder, build_device;"
        "builder._check_precision = lambda *_: None;" + BUILD
    )
    bundle = export_quantized(SMALL, "fp8")
    words = [str(bundle.path), "--backend", "tensorrt-rtx", "--target", "rtx3090"]
    setup = "from anyflow_deploy.engines.tensorrt.library import choose_library as c;"
    command = [sys.executable, "-c", setup + "c('tensorrt-rtx');" + program, *words]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "engine")],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    text = " ".join(done.stderr.split())
    assert done.returncode == 1 and "HW-specific datatypes: fp8_e4m3" in text
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("flag", ["--refit", "--strip"])
def test_what_needs_a_gpu_says_so(tiny_bundle: Bundle, flag: str) -> None:
    done = run_build(tiny_bundle, "--target", "rtx4090", flag)
    assert done.returncode == 1
    assert f"{flag} needs a GPU" in " ".join(done.stderr.split())


def test_refit_still_fails_without_a_driver(tmp_path: Path) -> None:
    """A canary: when it passes on a machine without a driver, `--refit` may be allowed there."""
    values = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], [0.5] * 16)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"])], "g", [values], [result], [weight]
    )
    onnx.save(helper.make_model(graph, ir_version=10), tmp_path / "gemm.onnx")
    program = """
import sys, tensorrt_rtx as trt
logger = trt.Logger()
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(sys.argv[1])
config = builder.create_builder_config()
if sys.argv[2] == "refit":
    config.set_flag(trt.BuilderFlag.REFIT)
print("built" if builder.build_serialized_network(network, config) else "refused")
"""
    answers = [
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "gemm.onnx"), kind],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.split()[-1]
        for kind in ("plain", "refit")
    ]
    assert answers == ["built", "refused"]


def test_ctrl_c_stops_a_build(small_bundle: Export, tmp_path: Path) -> None:
    bundle = small_bundle("fp32")
    output = tmp_path / "engine"
    words = ["--backend", "tensorrt-rtx", "--target", "any", "--output", str(output)]
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(bundle.path), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(".anyflow-*.partial/*.plan")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_the_library_is_imported(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """pybind11 turns it into an `ImportError`, which is not what happened."""
    words = ["--backend", "tensorrt-rtx", "--target", "any", "--output", str(tmp_path / "engine")]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPT_IMPORT + BUILD, str(tiny_bundle.path), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.stdout == "importing\n", done.stderr
    assert done.returncode == 130 and "interrupted" in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_targets() -> None:
    assert device_of_target("any").compute_capability is None
    assert device_of_target("rtx5070").compute_capability == (12, 0)
    with pytest.raises(BackendError, match=r"does not run on target 'h100'.*backend tensorrt\."):
        device_of_target("h100")
    with pytest.raises(BackendError, match=r"target 'cpu'.*--backend onnxruntime\."):
        device_of_target("cpu")
    with pytest.raises(AnyFlowError, match=r"unknown target 'rtx409'.*rtx4090"):
        device_of_target("rtx409")
    supported = {(8, 0), (8, 6), (8, 9), (12, 0), (12, 1), (13, 0)}
    capabilities = {*supported, (7, 5), (8, 7), (9, 0), (10, 0), (11, 0)}
    assert {pair for pair in capabilities if is_supported(pair)} == supported


def test_an_unknown_target_is_refused_before_work(tiny_bundle: Bundle, tmp_path: Path) -> None:
    unknown = TensorRTRtxSettings(target="rtx9999")
    with pytest.raises(AnyFlowError, match="unknown target 'rtx9999'"):
        build_engine(load_bundle(tiny_bundle.path), "tensorrt-rtx", unknown, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_memory_that_is_too_small_is_refused_before_work(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = settings.build_memory(tiny_bundle)
    assert 5e8 < needed < 6e8
    monkeypatch.setattr(settings, "available_host_memory", lambda: needed - 1)
    with pytest.raises(BackendError, match=r"takes about 0\.5 GB of memory, and 0\.5 GB are free"):
        build_engine(
            load_bundle(tiny_bundle.path),
            "tensorrt-rtx",
            TensorRTRtxSettings(target="any"),
            tmp_path / "engine",
        )
    assert list(tmp_path.iterdir()) == []


def test_one_process_uses_one_library() -> None:
    program = """
from anyflow_deploy.engines.tensorrt.library import choose_library
choose_library("tensorrt-rtx")
import anyflow_deploy.engines.tensorrt.api
choose_library("tensorrt-rtx")
choose_library("tensorrt")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert re.search(r"this process already uses TensorRT for RTX, and one process", done.stderr)
