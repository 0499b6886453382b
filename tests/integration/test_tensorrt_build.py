"""anyflow-build --backend tensorrt on the stand-in: flags, profiles, progress, Ctrl-C, timing
cache, refusals."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from anyflow_deploy import AnyFlowError, BackendError, Bundle, ShapeError, load_bundle
from anyflow_deploy.cli.build import BuildOptions, build
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.engines.build import build_engine
from anyflow_deploy.engines.engine_folder import load_engine_folder
from anyflow_deploy.engines.tensorrt.build.settings import TensorRTSettings
from tests.conftest import SMALL, Export
from tests.fakes.fp8_graph import in_eight_bits
from tests.fakes.progress import Recorder
from tests.fakes.tensorrt import RELEASES, FakeTensorRT, layer, requested_layers

EVERY_RELEASE = pytest.mark.parametrize("fake_tensorrt", RELEASES, indirect=True)
SIZE = "64x96x5"


@pytest.fixture
def bundle(export_once: Export, tmp_path: Path) -> Bundle:
    return copied(export_once(SMALL), tmp_path)


def copied(bundle: Bundle, folder: Path) -> Bundle:
    shutil.copytree(bundle.path, folder / "bundle", ignore=shutil.ignore_patterns("engines"))
    return load_bundle(folder / "bundle")


def command(bundle: Bundle, words: str = f"--shapes {SIZE}") -> dict[str, Any]:
    assert (
        build(
            parse_options(BuildOptions, [str(bundle.path), "--backend", "tensorrt", *words.split()])
        )
        == 0
    )
    record: dict[str, Any] = json.loads(
        (bundle.path / "engines/tensorrt-cuda/engine.json").read_text()
    )
    return record


def plan(bundle: Bundle, graph: str = "transition") -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        (bundle.path / f"engines/tensorrt-cuda/{graph}.plan").read_bytes()
    )
    return content


def nothing_left(bundle: Bundle) -> bool:
    folder = bundle.path / "engines"
    return not folder.exists() or not list(folder.iterdir())


@EVERY_RELEASE
def test_the_record(
    fake_tensorrt: FakeTensorRT, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    record = command(bundle, "--shapes 64x96x5,128x96x1:t7")
    assert record["device"] == {
        "kind": "cuda",
        "name": "NVIDIA Stand-in",
        "compute_capability": "9.0",
    }
    assert record["versions"]["tensorrt"] == fake_tensorrt.trt.__version__
    assert list(record["profiles"]["transition"]) == ["64x96x5", "128x96x1:t7"]
    assert record["profiles"]["transition"]["128x96x1:t7"]["latents"] == [[1, 1, 4, 16, 12]] * 3
    assert record["profiles"]["transition"]["64x96x5"]["text"] == [[1, 512, 32]] * 3
    assert record["achieved"] == {"fused_attention": 1.0}
    assert set(record["files"]) == {"transition.plan", "transition.layers.json"}
    assert "NVIDIA Stand-in" in capsys.readouterr().err
    load_engine_folder(bundle.path / "engines/tensorrt-cuda")


@EVERY_RELEASE
def test_what_the_builder_is_told(fake_tensorrt: FakeTensorRT, bundle: Bundle) -> None:
    command(bundle)
    trt = fake_tensorrt.trt
    assert plan(bundle)["flags"] == [], "TF32 is off, and nothing else is on"
    assert trt.calls_of("IBuilderConfig.profiling_verbosity") == [
        {"value": trt.ProfilingVerbosity.DETAILED}
    ]
    flags = (
        "--workspace 2.5 --optimization-level 5 --version-compatible --hardware-compatible ampere+"
        " --refit --weight-streaming"
    )
    command(bundle, f"--shapes {SIZE} --overwrite {flags}")
    assert plan(bundle)["flags"] == ["REFIT", "VERSION_COMPATIBLE", "WEIGHT_STREAMING"]
    assert trt.calls_of("IBuilderConfig.set_memory_pool_limit") == [
        {"pool": trt.MemoryPoolType.WORKSPACE, "pool_size": 2_500_000_000}
    ]
    assert trt.calls_of("IBuilderConfig.builder_optimization_level") == [{"value": 5}]
    level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert trt.calls_of("IBuilderConfig.hardware_compatibility_level") == [{"value": level}]
    command(bundle, f"--shapes {SIZE} --overwrite --strip")
    assert plan(bundle)["flags"] == ["REFIT_IDENTICAL", "STRIP_PLAN"]


@pytest.mark.parametrize("fake_tensorrt", ["10.3"], indirect=True)
def test_a_level_that_this_release_lacks(fake_tensorrt: FakeTensorRT, bundle: Bundle) -> None:
    with pytest.raises(
        BackendError, match=r"same-capability is not in TensorRT 10.3.0, which has .*AMPERE_PLUS"
    ):
        command(bundle, f"--shapes {SIZE} --hardware-compatible same-capability")
    assert nothing_left(bundle)


def test_a_bias_that_a_refittable_engine_lost(fake_tensorrt: FakeTensorRT, bundle: Bundle) -> None:
    from anyflow_deploy.engines.tensorrt.build.refit_check import bias_names

    model = onnx.load(str(bundle.path / "transition.onnx"), load_external_data=False)
    bias = bias_names(model)[0]
    fake_tensorrt.lost_weights = {bias}
    with pytest.raises(BackendError, match=rf"lost 1 biases of 'transition' \({re.escape(bias)}\)"):
        command(bundle, f"--shapes {SIZE} --refit")
    assert nothing_left(bundle)
    command(bundle, f"--shapes {SIZE} --strip")  # it is refitted with the same weights


def test_progress(fake_tensorrt: FakeTensorRT, bundle: Bundle) -> None:
    progress = Recorder()
    build_engine(bundle, "tensorrt", TensorRTSettings(shapes=(SIZE,)), progress=progress)
    assert progress.stages == {
        "transition: Building Engine": 2,
        "transition: Timing": 2,
        "transition: inspecting": 0,
    }
    assert not progress.open, "deeper levels are not shown, and every stage was ended"


def test_a_report_that_fails_stops_the_build(fake_tensorrt: FakeTensorRT, bundle: Bundle) -> None:
    class Broken(Recorder):
        def stage(self, name: str, total: float | None = None) -> Any:
            raise ValueError("no terminal")

    with pytest.raises(ValueError, match="no terminal"):
        build_engine(bundle, "tensorrt", TensorRTSettings(shapes=(SIZE,)), progress=Broken())
    assert nothing_left(bundle)


def cache_file(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache" / "anyflow_deploy" / "tensorrt").iterdir()
    return file


@EVERY_RELEASE
def test_ctrl_c_stops_the_build_and_keeps_the_timing_cache(
    fake_tensorrt: FakeTensorRT, bundle: Bundle, tmp_path: Path
) -> None:
    ended = threading.Event()

    def interrupt() -> None:
        assert threading.current_thread() is not threading.main_thread()
        os.kill(os.getpid(), signal.SIGINT)
        assert not ended.wait(0.5)

    fake_tensorrt.during_build = interrupt
    with pytest.raises(KeyboardInterrupt):
        command(bundle)
    ended.set()
    assert nothing_left(bundle)
    assert json.loads(cache_file(tmp_path).read_bytes())["transition"] == 1.0
    fake_tensorrt.during_build = lambda: None
    command(bundle)


@EVERY_RELEASE
def test_the_timing_cache(fake_tensorrt: FakeTensorRT, bundle: Bundle, tmp_path: Path) -> None:
    command(bundle)
    file = cache_file(tmp_path)
    assert file.name == f"nvidia-stand-in-{fake_tensorrt.trt.__version__}.timing"
    fake_tensorrt.during_build = lambda: (
        file.write_text(json.dumps({"version": fake_tensorrt.trt.__version__, "other": 2.0}))
        and None
    )
    command(bundle, f"--shapes {SIZE} --overwrite")
    assert set(json.loads(file.read_bytes())) == {
        "version",
        "transition",
        "other",
    }, "what another build wrote meanwhile is kept"
    given = fake_tensorrt.trt.calls_of("IBuilderConfig.create_timing_cache")
    assert [bytes(call["serialized_timing_cache"])[:1] for call in given][:2] == [
        b"",
        b"{",
    ], "the second build started from the first"


def test_a_timing_cache_of_elsewhere(
    fake_tensorrt: FakeTensorRT, bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = tmp_path / "elsewhere.timing"
    elsewhere.write_text(json.dumps({"version": "9.9"}))
    command(bundle, f"--shapes {SIZE} --timing-cache {elsewhere}")
    assert "is of another device or TensorRT version" in caplog.text


def test_a_timing_cache_that_cannot_be_kept(
    fake_tensorrt: FakeTensorRT,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("")
    command(bundle, f"--shapes {SIZE} --timing-cache {tmp_path / 'file' / 'x.timing'}")
    assert "timing cache could not be written" in caplog.text and "cannot be read" in caplog.text


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        (
            "[defaultAllocator.cpp] Cuda Runtime (out of memory): could not be allocated",
            r"lower --workspace, name fewer or smaller",
        ),
        (
            "Could not find any implementation for node x due to insufficient workspace",
            r"raise --workspace, or leave it out",
        ),
        ("Internal Error: assertion failed", "log of anyflow_deploy.tensorrt"),
    ],
)
def test_a_build_that_fails_says_which_knob(
    fake_tensorrt: FakeTensorRT, bundle: Bundle, tmp_path: Path, said: str, advice: str
) -> None:
    fake_tensorrt.failure = said
    with pytest.raises(
        BackendError,
        match=rf"TensorRT 11.* could not build 'transition' on NVIDIA Stand-in: .*{advice}",
    ):
        command(bundle)
    assert nothing_left(bundle)
    assert cache_file(tmp_path).exists(), "what was measured is kept"


def test_a_disk_that_is_full(
    fake_tensorrt: FakeTensorRT, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        BackendError,
        match=(
            r"GB free, and the plans take about .* --output FOLDER, or build without weights"
            r" .*--strip"
        ),
    ):
        command(bundle)
    assert not fake_tensorrt.trt.calls_of("Builder.__init__"), "before TensorRT has begun"
    monkeypatch.undo()


@EVERY_RELEASE
def test_a_disk_that_fills_up(
    fake_tensorrt: FakeTensorRT, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("anyflow_deploy.bundle.atomic_io.HashingFile.write", full)
    with pytest.raises(OSError, match="No space left"):
        command(bundle)
    assert nothing_left(bundle)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (
            "--shapes 480x832",
            AnyFlowError,
            r"--shapes is '480x832'; allowed is HEIGHTxWIDTHxFRAMES",
        ),
        ("--shapes 480x832x80", ShapeError, r"frames is 80; allowed are 4n\+1"),
        ("--shapes 481x832x81", ShapeError, "height is 481; allowed are multiples of 16"),
        (
            "--shapes 4096x832x81",
            ShapeError,
            r"--shapes 4096x832x81: height is 512, but this bundle declares",
        ),
        (
            f"--shapes {SIZE} --range-profile",
            AnyFlowError,
            r"batch range has no end .* Name video sizes with --shapes",
        ),
        (
            f"--shapes {SIZE} --workspace 0",
            AnyFlowError,
            "--workspace is 0.0; allowed are gigabytes above 0",
        ),
        (
            f"--shapes {SIZE} --optimization-level 6",
            AnyFlowError,
            "--optimization-level is 6; allowed are 0",
        ),
        (
            f"--shapes {SIZE} --hardware-compatible ampere",
            AnyFlowError,
            r"allowed are ampere\+, .* Did you mean 'ampere\+'",
        ),
        (f"--shapes {SIZE} --strip --weight-streaming", AnyFlowError, "exclude each other"),
        (
            f"--shapes {SIZE} --provider cpu",
            BackendError,
            "TensorRT runs on NVIDIA GPUs only; provider is 'cpu'",
        ),
    ],
)
def test_wrong_settings(
    fake_tensorrt: FakeTensorRT, bundle: Bundle, words: str, error: type[AnyFlowError], message: str
) -> None:
    with pytest.raises(error, match=message):
        command(bundle, words)
    assert nothing_left(bundle) and not fake_tensorrt.trt.calls


def test_a_precision_that_the_gpu_lacks(fake_tensorrt: FakeTensorRT, bundle: Bundle) -> None:
    fake_tensorrt.cuda.properties |= {"major": 8, "minor": 7, "name": b"Orin"}
    with pytest.raises(
        BackendError,
        match=(
            r"is fp8, which needs compute capability 8\.9; Orin has 8\.7\. .* fp32, fp16, bf16,"
            r" int8"
        ),
    ):
        command(in_eight_bits(bundle))


def test_a_graph_that_the_parser_refuses(
    fake_tensorrt: FakeTensorRT, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = fake_tensorrt.trt
    error = trt.make_object("ParserError")
    trt.behaviour |= {
        "OnnxParser.parse_from_file": lambda parser, path: False,
        "OnnxParser.num_errors": lambda parser: 1,
        "OnnxParser.get_error": lambda parser, index: error,
        "ParserError.desc": lambda e: "unsupported",
        "ParserError.node_name": lambda e: "blocks.0/X",
        "ParserError.node_operator": lambda e: "X",
    }
    with pytest.raises(
        BackendError, match=r"cannot parse .*transition.onnx: blocks.0/X \(X\): unsupported"
    ):
        command(bundle)
    assert nothing_left(bundle)


@pytest.mark.parametrize("fake_tensorrt", ["10.3"], indirect=True)
def test_a_graph_that_the_lint_refuses(fake_tensorrt: FakeTensorRT, bundle: Bundle) -> None:
    path = bundle.path / "transition.onnx"
    model = onnx.load(path, load_external_data=False)
    model.opset_import[0].version = 23
    path.write_bytes(model.SerializeToString())
    with pytest.raises(
        BackendError,
        match=r"TensorRT 10\.3\.0 does not take this bundle: transition.onnx.*opset 23",
    ):
        build_engine(
            load_bundle(bundle.path, verify=False), "tensorrt", TensorRTSettings(shapes=(SIZE,))
        )
    assert not fake_tensorrt.trt.calls_of("Builder.__init__")


def test_eight_bits_that_were_achieved(fake_tensorrt: FakeTensorRT, bundle: Bundle) -> None:
    in_eight_bits(bundle)
    record = command(bundle)
    assert (
        record["achieved"]["eight_bit_products"] == 1.0
        and record["achieved"]["asked_in_eight_bits"] > 20
    )
    assert record["achieved"]["run_wider"] == []


def test_eight_bits_that_were_not(
    fake_tensorrt: FakeTensorRT, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Thor builds have done: everything in float32, and no word about it."""
    in_eight_bits(bundle)

    def in_float(model: Any) -> list[dict[str, Any]]:
        rows = requested_layers(model)
        for row in rows:
            if "blocks.1.ffn" in row["Name"]:
                row["TacticName"] = "sm90_xmma_gemm_f32f32_f32"
                row["Inputs"] = [{"Format/Datatype": "Float"}]
        return rows

    fake_tensorrt.layers = in_float
    with pytest.raises(
        BackendError,
        match=(
            r"2 of \d+ eight-bit matrix products run in a wider type"
            r" \(blocks.1.ffn.*--allow-fallback"
        ),
    ):
        command(bundle)
    assert nothing_left(bundle)
    record = command(bundle, f"--shapes {SIZE} --allow-fallback")
    assert (
        len(record["achieved"]["run_wider"]) == 2
        and 0.8 < record["achieved"]["eight_bit_products"] < 1
    )
    shown = " ".join(capsys.readouterr().err.split())
    assert "run wider blocks.1.ffn" in shown and "fused attention 100 %" in shown


def test_an_inspector_that_says_nothing_is_not_taken_for_success(
    fake_tensorrt: FakeTensorRT, bundle: Bundle
) -> None:
    fake_tensorrt.layers = lambda model: []
    with pytest.raises(BackendError, match=r"none of \d+ eight-bit matrix products could be found"):
        command(in_eight_bits(bundle))


def test_attention_that_was_not_fused(fake_tensorrt: FakeTensorRT, bundle: Bundle) -> None:
    fake_tensorrt.layers = lambda model: [
        layer(n.name, (n.name,), "sm90_x", "Half")
        for n in model.graph.node
        if n.op_type in ("Gemm", "MatMul", "Softmax")
    ]
    assert command(bundle)["achieved"] == {"fused_attention": 0.0}


def test_shapes_by_default(fake_tensorrt: FakeTensorRT, bundle: Bundle, tmp_path: Path) -> None:
    assert [made.name for made in TensorRTSettings().profiles(bundle)["transition"]] == [
        "480x832x81"
    ], "the ranges have no end"
    path = bundle.path / "manifest.json"
    raw = json.loads(path.read_text())
    raw["ranges"] |= {
        "batch": {"minimum": 1, "maximum": 2, "multiple": 1},
        "text": {"minimum": 8, "maximum": 64, "multiple": 1},
        "frames": {"minimum": 1, "maximum": 21, "multiple": 1},
        "height": {"minimum": 30, "maximum": 60, "multiple": 2},
        "width": {"minimum": 52, "maximum": 104, "multiple": 2},
    }
    path.write_text(json.dumps(raw))
    (made,) = TensorRTSettings().profiles(load_bundle(bundle.path))["transition"]
    assert made.name == "ranges"
    assert made.shapes["latents"] == ((1, 1, 4, 30, 52), (1, 21, 4, 60, 104), (2, 21, 4, 60, 104))
    assert made.shapes["text"] == ((1, 8, 32), (1, 64, 32), (2, 64, 32))
    both = TensorRTSettings(shapes=("480x832x81:t64",), range_profile=True).profiles(
        load_bundle(bundle.path)
    )["transition"]
    assert [profile.name for profile in both] == [
        "480x832x81:t64",
        "ranges",
    ], "the fixed one is tried first"
    assert np.isclose(
        both[0].distance(
            {"latents": (1, 21, 4, 60, 52), "text": (1, 64, 32), "t": (1, 21), "r": (1, 21)}
        ),
        np.log(105 / 53),
    )
