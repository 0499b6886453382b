"""What only TensorRT for RTX does, on the stand-in: which GPUs open an engine, the runtime config,
kernels kept on disk, progress of the first opening, precision read there."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from anyflow_deploy import (
    AnyFlowError,
    BackendError,
    Bundle,
    Schedule,
    load_bundle,
    load_engine,
    sample,
)
from anyflow_deploy.cli.generate import GenerateOptions, generate
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.engines.build import build_engine
from anyflow_deploy.engines.metrics import difference
from anyflow_deploy.engines.tensorrt.build.settings import TensorRTSettings
from anyflow_deploy.engines.tensorrt.library import chosen_library
from anyflow_deploy.engines.tensorrt_rtx.settings import TensorRTRtxSettings
from anyflow_deploy.pipelines.video_pipeline import VideoPipeline
from tests.conftest import SMALL, Export
from tests.fakes.fp8_graph import in_eight_bits
from tests.fakes.progress import Recorder
from tests.fakes.tensorrt import RTX, requested_layers
from tests.fakes.tensorrt_rtx import FakeTensorRTRtx

pytestmark = pytest.mark.parametrize("fake_tensorrt", [RTX], indirect=True)
BACKEND = "tensorrt-rtx"
SIZE = "64x96x5:t9"
GOLDEN_SIZE = "96x160x9:b2:t9"
Golden = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def bundle(export_once: Export) -> Bundle:
    return export_once(SMALL)


@pytest.fixture(scope="module")
def small() -> Golden:
    return load_file(SMALL / "golden.safetensors")


@pytest.fixture
def fp8_bundle(bundle: Bundle, tmp_path: Path) -> Bundle:
    ignore = shutil.ignore_patterns("engines")
    shutil.copytree(bundle.path, tmp_path / "fp8", ignore=ignore)
    return in_eight_bits(load_bundle(tmp_path / "fp8"))


def built(bundle: Bundle, folder: Path, target: str | None = "rtx4090", **settings: Any) -> Path:
    """An engine that was built elsewhere, for a GPU that is only named."""
    options = TensorRTRtxSettings(shapes=(SIZE, GOLDEN_SIZE), target=target, **settings)
    return build_engine(bundle, BACKEND, options, folder / "engine").path


def opened(bundle: Bundle, folder: Path, **options: Any) -> Any:
    return load_engine(bundle, BACKEND, "cuda", engine=folder, **options)


def kernel_files(tmp_path: Path, ending: str = "kernels") -> list[Path]:
    return sorted((tmp_path / "cache" / "anyflow_deploy" / BACKEND).glob(f"*.{ending}"))


def becomes(machine: FakeTensorRTRtx, name: str, major: int, minor: int) -> None:
    machine.cuda.properties |= {"name": name.encode(), "major": major, "minor": minor}


# Which GPU opens what


@pytest.mark.parametrize(
    ("target", "name", "capability", "message"),
    [
        ("rtx4090", "NVIDIA GeForce RTX 4060", (8, 9), None),
        (
            "rtx4090",
            "NVIDIA GeForce RTX 3090",
            (8, 6),
            r"was built for GeForce RTX 4090 24GB \(compute capability 8\.9\), and this is NVIDIA"
            r" GeForce RTX 3090 \(compute capability 8\.6\)\. Build for this GPU: anyflow-build"
            r" \S+ --backend tensorrt-rtx$",
        ),
        (
            "rtx4090",
            "NVIDIA H200",
            (9, 0),
            r"RTX 4090 24GB .* and this is NVIDIA H200 \(compute capability 9\.0\), on which"
            r" TensorRT for RTX opens no engines\. .*anyflow-build \S+ --backend tensorrt$",
        ),
        ("any", "NVIDIA A100", (8, 0), None),
        ("any", "NVIDIA GeForce RTX 3090", (8, 6), None),
        ("any", "NVIDIA GB10", (12, 1), None),
        ("any", "NVIDIA H200", (9, 0), r"was built for several GPUs, and this is NVIDIA H200 "),
        ("any", "Orin", (8, 7), r"was built for several GPUs, and this is Orin .*tensorrt$"),
    ],
)
def test_gpus_that_open_an_engine(
    fake_tensorrt: FakeTensorRTRtx,
    bundle: Bundle,
    tmp_path: Path,
    target: str,
    name: str,
    capability: tuple[int, int],
    message: str | None,
) -> None:
    folder = built(bundle, tmp_path, target)
    becomes(fake_tensorrt, name, *capability)
    if message is None:
        assert name in opened(bundle, folder).description
        return
    with pytest.raises(BackendError, match=message):
        opened(bundle, folder)


def test_the_release_has_to_be_the_same(
    fake_tensorrt: FakeTensorRTRtx, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = built(bundle, tmp_path)
    opened(bundle, folder)
    monkeypatch.setattr("anyflow_deploy.engines.tensorrt.engine.VERSION", "1.8.0.1")
    with pytest.raises(
        BackendError,
        match=r"built with tensorrt_rtx 1\.7\.1\.116, and here is tensorrt_rtx 1\.8\.0\.1.*"
        r"--backend tensorrt-rtx",
    ):
        opened(bundle, folder)


def test_one_library_a_process(
    fake_tensorrt: FakeTensorRTRtx, bundle: Bundle, tmp_path: Path
) -> None:
    opened(bundle, built(bundle, tmp_path))
    refusal = "this process already uses TensorRT for RTX, .*Run TensorRT in a process of its own"
    with pytest.raises(BackendError, match=refusal):
        load_engine(bundle, "tensorrt", "cuda")
    with pytest.raises(BackendError, match=refusal):
        build_engine(bundle, "tensorrt", TensorRTSettings(shapes=(SIZE,)), tmp_path / "other")


def test_a_library_that_is_missing_leaves_the_choice_open(
    fake_tensorrt: FakeTensorRTRtx, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(
        BackendError, match=r"cannot be imported .*pip install 'anyflow-deploy\[tensorrt-rtx\]'"
    ):
        load_engine(bundle, BACKEND, "cuda")
    assert chosen_library().backend == "tensorrt"


# The runtime config


def values_of(machine: FakeTensorRTRtx, name: str) -> list[str]:
    return [call["value"].name for call in machine.trt.calls_of(f"IRuntimeConfig.{name}")]


def test_runs_that_repeat_are_captured_by_the_library_alone(
    fake_tensorrt: FakeTensorRTRtx, bundle: Bundle, small: Golden, tmp_path: Path
) -> None:
    """Two state buffers are exchanged, so there are two calls that repeat, each captured once."""
    engine = opened(bundle, built(bundle, tmp_path))
    for _ in range(2):
        latents = sample(engine, small["latents"], small["text"], Schedule.uniform(13))
        assert difference(latents, small["sample_13"]).relative_l2 < 1e-5
    assert values_of(fake_tensorrt, "cuda_graph_strategy") == [
        "DISABLED",
        "WHOLE_GRAPH_CAPTURE",
        "WHOLE_GRAPH_CAPTURE",
    ], "the context of the opening runs the first calls"
    assert fake_tensorrt.captures == 2
    assert fake_tensorrt.replays == 26 - 2 * 2 - 2, "two runs of each call come first"
    assert not fake_tensorrt.cuda.launches


def test_without_cuda_graphs(
    fake_tensorrt: FakeTensorRTRtx, bundle: Bundle, small: Golden, tmp_path: Path
) -> None:
    engine = opened(bundle, built(bundle, tmp_path), cuda_graphs=False)
    latents = sample(engine, small["latents"], small["text"], Schedule.uniform(13))
    assert difference(latents, small["sample_13"]).relative_l2 < 1e-5
    assert values_of(fake_tensorrt, "cuda_graph_strategy") == ["DISABLED"]
    assert not fake_tensorrt.captures and not fake_tensorrt.cuda.launches


@pytest.mark.parametrize("given", [None, "lazy", "eager", "none"])
def test_kernel_specialization(
    fake_tensorrt: FakeTensorRTRtx, bundle: Bundle, tmp_path: Path, given: str | None
) -> None:
    opened(bundle, built(bundle, tmp_path), kernel_specialization=given)
    name = "dynamic_shapes_kernel_specialization_strategy"
    assert values_of(fake_tensorrt, name) == [(given or "lazy").upper()]


def test_kernel_specialization_that_is_refused(
    fake_tensorrt: FakeTensorRTRtx, bundle: Bundle
) -> None:
    message = "means nothing to backend onnxruntime; it is an option of tensorrt-rtx"
    with pytest.raises(BackendError, match=message):
        load_engine(bundle, kernel_specialization="eager")
    with pytest.raises(BackendError, match=message):
        VideoPipeline(bundle, kernel_specialization="eager")
    with pytest.raises(
        AnyFlowError, match=r"kernel specialization is 'late'; allowed are lazy, eager, none"
    ):
        load_engine(bundle, BACKEND, kernel_specialization="late")
    with pytest.raises(
        AnyFlowError, match="--kernel-specialization is 'late': input should be 'lazy', 'eager'"
    ):
        parse_options(GenerateOptions, [str(bundle.path), "--kernel-specialization", "late"])


def test_the_command_line(
    fake_tensorrt: FakeTensorRTRtx,
    bundle: Bundle,
    small: Golden,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = built(bundle, tmp_path)
    save_file({"prompt_embeds": small["text"][:1]}, tmp_path / "text.safetensors")
    words = (
        f"{bundle.path} --backend {BACKEND} --engine {folder} --kernel-specialization eager"
        f" --prompt-embeds {tmp_path / 'text.safetensors'} --steps 1"
        f" --height 64 --width 96 --frames 5 --output {tmp_path / 'latents.safetensors'}"
    )
    assert generate(parse_options(GenerateOptions, words.split())) == 0
    assert values_of(fake_tensorrt, "dynamic_shapes_kernel_specialization_strategy") == ["EAGER"]
    assert "compiling kernels for NVIDIA Stand-in" in " ".join(capsys.readouterr().err.split())
    assert np.isfinite(load_file(tmp_path / "latents.safetensors")["latents"]).all()


# Kernels on disk


def test_the_next_opening_compiles_nothing(
    fake_tensorrt: FakeTensorRTRtx, bundle: Bundle, small: Golden, tmp_path: Path
) -> None:
    folder = built(bundle, tmp_path)
    engine = opened(bundle, folder)
    assert fake_tensorrt.compiled == ["transition"], "at the opening, not at the first run"
    (file,) = kernel_files(tmp_path)
    assert file.name.startswith("nvidia-stand-in-8.9-cuda12.9-1.7.1.116-")
    after_opening = file.read_bytes()
    sample(engine, small["latents"], small["text"], Schedule.uniform(1))
    assert len(fake_tensorrt.compiled) == 2, "for the shape, at its first run"
    assert file.read_bytes() != after_opening, "kept after the first run, close or no close"
    engine.close()
    fake_tensorrt.compiled.clear()
    again = opened(bundle, folder)
    sample(again, small["latents"], small["text"], Schedule.uniform(1))
    assert not fake_tensorrt.compiled
    assert kernel_files(tmp_path) == [file]


def test_kernels_are_written_where_some_have_come(
    fake_tensorrt: FakeTensorRTRtx,
    bundle: Bundle,
    small: Golden,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = built(bundle, tmp_path)
    opened(bundle, folder)
    written: list[Path] = []
    from anyflow_deploy.engines.tensorrt_rtx import runtime_cache

    write = runtime_cache.write_bytes_atomically
    monkeypatch.setattr(
        runtime_cache,
        "write_bytes_atomically",
        lambda path, data: (written.append(path), write(path, data))[1],
    )
    opened(bundle, folder).close()
    assert not written, "nothing has changed"
    engine = opened(bundle, folder)
    for batch in (2, 1):
        latents = small["latents"][:batch] if batch == 2 else np.zeros((1, 2, 4, 8, 12), np.float32)
        sample(engine, latents, small["text"][:batch], Schedule.uniform(1))
    assert len(written) == 1, "after the first run; the next ones wait for the end"
    engine.close()
    engine.close()
    assert len(written) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda machine: setattr(machine.cuda, "driver", 13000),
        lambda machine: becomes(machine, "NVIDIA GeForce RTX 4060", 8, 9),
    ],
    ids=["another driver", "another GPU"],
)
def test_kernels_of_elsewhere_are_not_asked_for(
    fake_tensorrt: FakeTensorRTRtx,
    bundle: Bundle,
    tmp_path: Path,
    change: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = built(bundle, tmp_path)
    opened(bundle, folder).close()
    change(fake_tensorrt)
    opened(bundle, folder).close()
    assert fake_tensorrt.compiled == ["transition"] * 2 and not caplog.records
    assert len(kernel_files(tmp_path)) == 2


def test_engines_do_not_share_kernels(
    fake_tensorrt: FakeTensorRTRtx, bundle: Bundle, tmp_path: Path
) -> None:
    for target in ("rtx4090", "any"):
        (tmp_path / target).mkdir()
        opened(bundle, built(bundle, tmp_path / target, target)).close()
    assert len(kernel_files(tmp_path)) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: b"x" * 20,
        lambda content: content[:40] + b"!" + content[41:],
    ],
    ids=["cut", "empty", "short", "flipped"],
)
def test_a_damaged_file_is_dropped(
    fake_tensorrt: FakeTensorRTRtx,
    bundle: Bundle,
    tmp_path: Path,
    damage: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = built(bundle, tmp_path)
    opened(bundle, folder).close()
    (file,) = kernel_files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    opened(bundle, folder).close()
    assert f"{file} is damaged; it is dropped, and kernels are compiled again" in caplog.text
    assert file.read_bytes() == whole
    assert fake_tensorrt.compiled == ["transition"] * 2


def test_a_file_that_the_library_refuses_is_dropped(
    fake_tensorrt: FakeTensorRTRtx,
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = built(bundle, tmp_path)
    opened(bundle, folder).close()
    monkeypatch.setitem(
        fake_tensorrt.trt.behaviour, "IRuntimeCache.deserialize", lambda cache, blob: False
    )
    opened(bundle, folder).close()
    assert "was refused by TensorRT for RTX; it is dropped" in caplog.text
    assert fake_tensorrt.compiled == ["transition"] * 2 and kernel_files(tmp_path)


def test_a_folder_that_cannot_be_written(
    fake_tensorrt: FakeTensorRTRtx,
    bundle: Bundle,
    small: Golden,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = built(bundle, tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    engine = opened(bundle, folder)
    latents = sample(engine, small["latents"], small["text"], Schedule.uniform(1))
    assert difference(latents, small["sample_1"]).relative_l2 < 1e-5
    engine.close()
    assert "the compiled kernels could not be written to" in caplog.text
    assert {record.levelname for record in caplog.records} == {"WARNING"}


# The first opening


def test_the_first_opening_shows_progress(
    fake_tensorrt: FakeTensorRTRtx,
    bundle: Bundle,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "anyflow_deploy.tensorrt")
    folder = built(bundle, tmp_path)
    first, second = Recorder(), Recorder()
    opened(bundle, folder, progress=first).close()
    assert first.stages == {"compiling kernels for NVIDIA Stand-in": 1} and not first.open
    line = "compiling kernels for NVIDIA Stand-in; the next opening is fast"
    assert caplog.text.count(line) == 1
    opened(bundle, folder, progress=second).close()
    assert not second.stages and caplog.text.count(line) == 1


# What was achieved


def in_float(model: Any) -> list[dict[str, Any]]:
    """The inspector's list of an engine that runs one block's feed-forward in float32."""
    rows = requested_layers(model)
    for row in rows:
        if "blocks.1.ffn" in row["Name"]:
            row["TacticName"] = "sm89_xmma_gemm_f32f32_f32"
            row["Inputs"] = [{"Format/Datatype": "Float"}]
    return rows


def inspections(machine: FakeTensorRTRtx) -> int:
    return len(machine.trt.calls_of("EngineInspector.get_engine_information"))


def test_precision_is_read_once_at_the_first_opening(
    fake_tensorrt: FakeTensorRTRtx,
    fp8_bundle: Bundle,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "anyflow_deploy.tensorrt")
    folder = built(fp8_bundle, tmp_path)
    assert json.loads((folder / "engine.json").read_text())["achieved"] == {}
    engine = opened(fp8_bundle, folder)
    assert engine.achieved["eight_bit_products"] == 1.0
    assert engine.achieved["asked_in_eight_bits"] > 20
    assert "on NVIDIA Stand-in: eight bit products 100 %, fused attention 100 %" in caplog.text
    (record,) = kernel_files(tmp_path, "json")
    assert json.loads(record.read_text()) == {
        "schema": 1,
        "achieved": engine.achieved,
        "shortfall": None,
    }
    assert opened(fp8_bundle, folder).achieved == engine.achieved
    assert inspections(fake_tensorrt) == 1


def test_precision_that_was_read_at_the_build_is_not_read_again(
    fake_tensorrt: FakeTensorRTRtx, bundle: Bundle, tmp_path: Path
) -> None:
    folder = built(bundle, tmp_path, target=None)
    assert opened(bundle, folder).achieved == {"fused_attention": 1.0}
    assert inspections(fake_tensorrt) == 1, "by the build, which had a GPU"
    assert not kernel_files(tmp_path, "json")


def test_a_shortfall_is_an_error(
    fake_tensorrt: FakeTensorRTRtx, fp8_bundle: Bundle, tmp_path: Path
) -> None:
    fake_tensorrt.layers = in_float
    folder = built(fp8_bundle, tmp_path)
    for _ in range(2):
        with pytest.raises(
            BackendError,
            match=r"TensorRT for RTX 1\.7\.1\.116 on NVIDIA Stand-in: 2 of \d+ eight-bit matrix"
            r" products run in a wider type \(blocks\.1\.ffn.*\)\. Keep such an engine with"
            r" --allow-fallback, try another TensorRT for RTX, or export in a precision without",
        ):
            opened(fp8_bundle, folder)
    assert inspections(fake_tensorrt) == 1, "the second time it was known"


def test_a_shortfall_that_was_allowed(
    fake_tensorrt: FakeTensorRTRtx, fp8_bundle: Bundle, tmp_path: Path
) -> None:
    fake_tensorrt.layers = in_float
    engine = opened(fp8_bundle, built(fp8_bundle, tmp_path, allow_fallback=True))
    assert len(engine.achieved["run_wider"]) == 2
    share = 100 * engine.achieved["eight_bit_products"]
    assert f", {share:.0f} % of its eight-bit products in 8 bits" in engine.description


def test_a_damaged_record_is_read_again(
    fake_tensorrt: FakeTensorRTRtx,
    bundle: Bundle,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = built(bundle, tmp_path)
    achieved = opened(bundle, folder).achieved
    (record,) = kernel_files(tmp_path, "json")
    record.write_text("{")
    assert opened(bundle, folder).achieved == achieved == {"fused_attention": 1.0}
    assert "The precision is read from the engine again." in caplog.text
    assert json.loads(record.read_text())["achieved"] == achieved
