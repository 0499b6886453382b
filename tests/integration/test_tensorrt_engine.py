"""The TensorRT backends on the stand-in: golden vectors through plans, buffers, streams, caches and
captured graphs. What only TensorRT for RTX does is in test_tensorrt_rtx.py."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from anyflow_deploy import (
    AnyFlowError,
    BackendError,
    Bundle,
    Schedule,
    ShapeError,
    load_bundle,
    load_engine,
    sample,
    stream,
)
from anyflow_deploy.engines.build import build_engine, settings_type
from anyflow_deploy.engines.kv_cache import cache_plan
from anyflow_deploy.engines.metrics import difference
from anyflow_deploy.engines.tensorrt.library import chosen_library
from tests.conftest import CAUSAL, SMALL, Export, causal_golden
from tests.fakes.tensorrt import ALL_RELEASES, FakeTensorRT

LIMIT, CAUSAL_LIMIT = 1e-5, 1e-4
EVERY_RELEASE = pytest.mark.parametrize("fake_tensorrt", ALL_RELEASES, indirect=True)
Golden = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def bundle(export_once: Export) -> Bundle:
    return export_once(SMALL)


@pytest.fixture(scope="module")
def causal(export_once: Export) -> Bundle:
    return export_once(CAUSAL)


@pytest.fixture(scope="module")
def small() -> Golden:
    return load_file(SMALL / "golden.safetensors")


@pytest.fixture(scope="module")
def oracle() -> Golden:
    return causal_golden()


def size_of(latents: NDArray[Any], text: NDArray[Any]) -> str:
    batch, frames, _, height, width = latents.shape
    return f"{8 * height}x{8 * width}x{4 * frames - 3}:b{batch}:t{text.shape[1]}"


def opened(
    bundle: Bundle, folder: Path, *shapes: str, cuda_graphs: bool = True, **settings: Any
) -> Any:
    backend = chosen_library().backend
    build_settings = settings_type(backend)(shapes=shapes, **settings)  # type: ignore[call-arg]
    build_engine(bundle, backend, build_settings, folder / "engine")
    return load_engine(bundle, backend, "cuda", engine=folder / "engine", cuda_graphs=cuda_graphs)


@pytest.fixture
def engine(fake_tensorrt: FakeTensorRT, bundle: Bundle, small: Golden, tmp_path: Path) -> Any:
    return opened(bundle, tmp_path, size_of(small["latents"], small["text"]))


@EVERY_RELEASE
def test_golden_samples(fake_tensorrt: FakeTensorRT, engine: Any, small: Golden) -> None:
    library = f"{fake_tensorrt.library.title} {fake_tensorrt.trt.__version__}"
    assert engine.description == f"{library}, NVIDIA Stand-in, fp32"
    for steps in (1, 2, 4, 8, 13):
        latents = sample(engine, small["latents"], small["text"], Schedule.uniform(steps))
        assert difference(latents, small[f"sample_{steps}"]).relative_l2 < LIMIT
    assert fake_tensorrt.replays > 10, "the later steps are replayed"
    assert fake_tensorrt.trt.calls_of("Builder.create_network") == [
        {"flags": 1 << int(strongly_typed(fake_tensorrt))}
    ]


def strongly_typed(machine: FakeTensorRT) -> int:
    return int(machine.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


@EVERY_RELEASE
def test_golden_streams(
    fake_tensorrt: FakeTensorRT, causal: Bundle, oracle: Golden, tmp_path: Path
) -> None:
    engine = opened(causal, tmp_path, size_of(oracle["latents"], oracle["text"]).replace(":b1", ""))
    for steps in (1, 2, 8):
        chunks = list(stream(engine, oracle["latents"], oracle["text"], Schedule.uniform(steps)))
        made = np.concatenate([chunk.latents for chunk in chunks], axis=1)
        assert difference(made, oracle[f"sample_{steps}"]).relative_l2 < CAUSAL_LIMIT
    given = list(
        stream(
            engine,
            oracle["latents"],
            oracle["text"],
            Schedule.uniform(4),
            context=oracle["context"],
        )
    )
    assert np.isfinite(np.concatenate([chunk.latents for chunk in given], axis=1)).all()
    before = fake_tensorrt.cuda.reserved_bytes()
    engine.close()
    gc.collect()
    assert fake_tensorrt.cuda.reserved_bytes() == 0 < before, "everything is given back"


def test_the_profiles_of_a_causal_bundle(
    fake_tensorrt: FakeTensorRT, causal: Bundle, tmp_path: Path
) -> None:
    opened(causal, tmp_path, "96x160x45")
    record = json.loads((tmp_path / "engine" / "engine.json").read_text())
    assert {f"{graph}.plan" for graph in ("text", "chunk", "compress")} <= set(record["files"])
    chunk = record["profiles"]["chunk"]
    assert chunk["96x160x45 first"]["past_key.0"] == [[1, 0, 4, 24]] * 3
    # (1 + 3) * 15 + (3 + 3) * 60
    assert [shape[1] for shape in chunk["96x160x45 later"]["past_key.0"]] == [
        1,
        420,
        420,
    ]
    assert [shape[1] for shape in chunk["96x160x45 later"]["latents"]] == [1, 3, 3]


def test_streams_equal_onnx_runtime_with_a_window(
    fake_tensorrt: FakeTensorRT, causal: Bundle, oracle: Golden, tmp_path: Path
) -> None:
    """Forgotten chunks make the cache move within its own buffers."""
    plan = (1, 1, 1, 1, 1, 1)
    shorter = oracle["latents"][:, :6]
    engine = opened(causal, tmp_path, size_of(oracle["latents"], oracle["text"]).replace(":b1", ""))
    ours = list(
        stream(engine, shorter, oracle["text"], Schedule.uniform(1), chunk_plan=plan, window=1)
    )
    theirs = list(
        stream(
            load_engine(causal),
            shorter,
            oracle["text"],
            Schedule.uniform(1),
            chunk_plan=plan,
            window=1,
        )
    )
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        assert difference(ours_.latents, theirs_.latents).relative_l2 < LIMIT


def test_two_streams_do_not_mix(
    fake_tensorrt: FakeTensorRT, causal: Bundle, oracle: Golden, tmp_path: Path
) -> None:
    engine = opened(causal, tmp_path, size_of(oracle["latents"], oracle["text"]).replace(":b1", ""))
    noises = (oracle["latents"], oracle["latents"][::-1] * 0.5)
    alone = [
        [c.latents for c in stream(engine, z, oracle["text"], Schedule.uniform(2))] for z in noises
    ]
    pairs = list(
        zip(*(stream(engine, z, oracle["text"], Schedule.uniform(2)) for z in noises), strict=True)
    )
    for which in range(2):
        for number, pair in enumerate(pairs):
            np.testing.assert_array_equal(pair[which].latents, alone[which][number])


def test_a_stream_that_grows(
    fake_tensorrt: FakeTensorRT, causal: Bundle, oracle: Golden, tmp_path: Path
) -> None:
    """A run that is open while the cache moves elsewhere reads it where it is now."""
    engine = opened(causal, tmp_path, size_of(oracle["latents"], oracle["text"]).replace(":b1", ""))
    plans = [
        cache_plan(engine.architecture, chunks, 12, 20, text_tokens=oracle["text"].shape[1])
        for chunks in ((1, 3), (1, 3, 3, 3))
    ]
    results = []
    for grown in (False, True):
        memory = engine.open_stream(oracle["text"], plans[0] if grown else plans[1])
        memory.append(oracle["latents"][:, :1])
        with memory.start(oracle["latents"][:, 1:4]) as run:
            if grown:
                memory.extend(plans[1])
            run.step(1000.0, 0.0)
            results.append(run.read())
        memory.close()
    np.testing.assert_array_equal(*results)


def test_velocity_leaves_the_state(engine: Any, small: Golden) -> None:
    with engine.start(small["latents"], small["text"]) as run:
        velocity = run.velocity(1000.0, 500.0)
        np.testing.assert_array_equal(run.read(), small["latents"])
        run.step(1000.0, 500.0)
        np.testing.assert_allclose(run.read(), small["latents"] - 0.5 * velocity, atol=1e-5)


def test_two_runs_do_not_mix(engine: Any, small: Golden) -> None:
    scales, times = (1.0, 0.5), ((1000.0, 500.0), (500.0, 0.0))
    runs = [engine.start(small["latents"] * scale, small["text"]) for scale in scales]
    for t, r in times:
        for run in runs:
            run.step(t, r)
    for scale, run in zip(scales, runs, strict=True):
        with engine.start(small["latents"] * scale, small["text"]) as alone:
            for t, r in times:
                alone.step(t, r)
            np.testing.assert_array_equal(run.read(), alone.read())


def test_the_next_run_of_the_same_shape_reserves_nothing(
    fake_tensorrt: FakeTensorRT, engine: Any, small: Golden
) -> None:
    sample(engine, small["latents"], small["text"], Schedule.uniform(4))
    fake_tensorrt.cuda.calls.clear()
    fake_tensorrt.cuda.launches = 0
    sample(engine, small["latents"], small["text"], Schedule.uniform(4))
    sample(engine, small["latents"], small["text"], Schedule.uniform(4))
    assert "cudaMalloc" not in fake_tensorrt.cuda.calls
    assert fake_tensorrt.cuda.launches >= 6, "both ways between the two buffers are captured by now"
    created = len(fake_tensorrt.trt.calls_of("ICudaEngine.create_execution_context"))
    assert created == 3, "one for everything, one for each captured way"


def test_without_cuda_graphs(
    fake_tensorrt: FakeTensorRT, bundle: Bundle, small: Golden, tmp_path: Path
) -> None:
    engine = opened(bundle, tmp_path, size_of(small["latents"], small["text"]), cuda_graphs=False)
    latents = sample(engine, small["latents"], small["text"], Schedule.uniform(13))
    assert difference(latents, small["sample_13"]).relative_l2 < LIMIT
    assert not fake_tensorrt.cuda.launches


def test_a_capture_that_fails_is_said_and_survived(
    fake_tensorrt: FakeTensorRT,
    engine: Any,
    small: Golden,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    failure = (fake_tensorrt.cuda.cudaError_t.cudaErrorNotSupported, None)
    monkeypatch.setattr(
        fake_tensorrt.cuda, "_cudaGraphInstantiate", lambda graph, flags: failure, raising=True
    )
    latents = sample(engine, small["latents"], small["text"], Schedule.uniform(13))
    assert difference(latents, small["sample_13"]).relative_l2 < LIMIT
    assert "runs without CUDA graphs" in caplog.text


@EVERY_RELEASE
def test_weight_streaming(
    fake_tensorrt: FakeTensorRT, bundle: Bundle, small: Golden, tmp_path: Path
) -> None:
    engine = opened(
        bundle, tmp_path, size_of(small["latents"], small["text"]), weight_streaming=True
    )
    latents = sample(engine, small["latents"], small["text"], Schedule.uniform(8))
    assert difference(latents, small["sample_8"]).relative_l2 < LIMIT
    assert not fake_tensorrt.replays, "TensorRT cannot capture it"
    assert fake_tensorrt.trt.calls_of("ICudaEngine.weight_streaming_budget_v2") == [
        {"value": 1 << 20}
    ]


@EVERY_RELEASE
def test_a_stripped_plan_gets_the_bundles_weights(
    fake_tensorrt: FakeTensorRT, bundle: Bundle, small: Golden, tmp_path: Path
) -> None:
    engine = opened(bundle, tmp_path, size_of(small["latents"], small["text"]), strip=True)
    latents = sample(engine, small["latents"], small["text"], Schedule.uniform(1))
    assert difference(latents, small["sample_1"]).relative_l2 < LIMIT
    assert fake_tensorrt.trt.calls_of("Refitter.refit_cuda_engine")


def test_a_shape_outside_every_profile_names_the_nearest(engine: Any, small: Golden) -> None:
    wide = np.concatenate([small["latents"]] * 2, axis=4)
    with pytest.raises(
        ShapeError,
        match=(
            r"no profile of this engine's 'transition' holds latents .*; the nearest is '.*'"
            r" \(latents"
        ),
    ):
        engine.start(wide, small["text"])
    sample(engine, small["latents"], small["text"], Schedule.uniform(1))


def test_longer_streams_than_were_built_for(
    fake_tensorrt: FakeTensorRT, causal: Bundle, oracle: Golden, tmp_path: Path
) -> None:
    engine = opened(causal, tmp_path, "96x160x1:t9")
    chunks = stream(engine, oracle["latents"], oracle["text"], Schedule.uniform(1))
    with pytest.raises(ShapeError, match=r"no profile .* the nearest is '96x160x1:t9 first'"):
        list(chunks)
    gc.collect()
    engine.close()
    assert fake_tensorrt.cuda.reserved_bytes() == 0


def test_no_memory_left(fake_tensorrt: FakeTensorRT, engine: Any, small: Golden) -> None:
    fake_tensorrt.cuda.limit = fake_tensorrt.cuda.reserved_bytes() + 5000
    with pytest.raises(BackendError, match=r"NVIDIA Stand-in has no .* MB left: .* are free"):
        engine.start(small["latents"], small["text"])
    fake_tensorrt.cuda.limit = 1 << 30
    sample(engine, small["latents"], small["text"], Schedule.uniform(1))


def test_a_run_that_found_no_room_goes_on_when_there_is(
    fake_tensorrt: FakeTensorRT, engine: Any, small: Golden
) -> None:
    """What the stand-in wants for activations grows with the shapes; here it finds no room for them
    first."""
    run = engine.start(small["latents"], small["text"])
    fake_tensorrt.cuda.limit = fake_tensorrt.cuda.reserved_bytes() + 300
    for _ in range(2):
        with pytest.raises(BackendError, match="MB left"):
            run.step(1000.0, 0.0)
    fake_tensorrt.cuda.limit = 1 << 30
    run.step(1000.0, 0.0)
    assert difference(run.read(), small["sample_1"]).relative_l2 < LIMIT
    run.close()


def test_nothing_is_on_its_way_after_a_run_that_failed(
    fake_tensorrt: FakeTensorRT, engine: Any, small: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The times of a step are uploaded from arrays that end with it."""
    run = engine.start(small["latents"], small["text"])
    monkeypatch.setattr(run._slot, "_runners", {"transition": Refusing()})
    with pytest.raises(BackendError, match="no run today"):
        run.step(1000.0, 0.0)
    assert not any(fake_tensorrt.cuda._streams.values())


class Refusing:
    """A runner whose TensorRT refuses."""

    def run(self, call: object) -> None:
        raise BackendError("no run today")

    def drop_graphs(self) -> None: ...


def test_a_closed_engine_and_a_closed_run(engine: Any, small: Golden) -> None:
    run = engine.start(small["latents"], small["text"])
    engine.close()
    run.step(1000.0, 0.0)
    assert difference(run.read(), small["sample_1"]).relative_l2 < LIMIT, "what is open goes on"
    run.close()
    run.close()
    with pytest.raises(AnyFlowError, match="this run is closed"):
        run.step(1000.0, 0.0)
    with pytest.raises(AnyFlowError, match="this engine is closed"):
        engine.start(small["latents"], small["text"])


def test_each_kind_says_how_it_is_run(
    engine: Any, causal: Bundle, small: Golden, oracle: Golden, tmp_path: Path
) -> None:
    with pytest.raises(AnyFlowError, match=r"bidirectional model: use sample\(\)"):
        engine.open_stream(small["text"][:1], None)
    (tmp_path / "far").mkdir()
    far = opened(causal, tmp_path / "far", "96x160x45:t9")
    with pytest.raises(AnyFlowError, match=r"causal model, which generates chunk by chunk"):
        far.start(oracle["latents"], oracle["text"])


def test_the_cpu_is_refused(fake_tensorrt: FakeTensorRT, bundle: Bundle) -> None:
    with pytest.raises(
        BackendError, match="runs on NVIDIA GPUs only; provider is 'cpu'. Choose provider 'cuda'"
    ):
        load_engine(bundle, "tensorrt", "cpu")


def test_no_gpu(fake_tensorrt: FakeTensorRT, bundle: Bundle, tmp_path: Path) -> None:
    fake_tensorrt.cuda.devices = 0
    with pytest.raises(
        BackendError, match=r"CUDA could not find a GPU: .* \(cudaErrorInsufficientDriver\)"
    ):
        opened(bundle, tmp_path, "64x96x5")
    fake_tensorrt.cuda.devices = 1
    with pytest.raises(BackendError, match="there is no CUDA device 3: this machine has 1"):
        opened(bundle, tmp_path, "64x96x5", device=3)


@pytest.mark.parametrize(
    ("properties", "version", "settings", "message"),
    [
        (
            {"name": b"NVIDIA Other"},
            None,
            {},
            r"built for NVIDIA Stand-in \(compute capability 9.0\), and this is NVIDIA Other",
        ),
        ({"minor": 1}, None, {}, r"this is NVIDIA Stand-in \(compute capability 9.1\)"),
        ({"name": b"NVIDIA Other"}, None, {"hardware_compatible": "same-capability"}, None),
        (
            {"name": b"B", "major": 12},
            None,
            {"hardware_compatible": "same-capability"},
            "this is B",
        ),
        ({"name": b"B", "major": 12}, None, {"hardware_compatible": "ampere+"}, None),
        ({"name": b"T", "major": 7}, None, {"hardware_compatible": "ampere+"}, "this is T"),
        ({}, "11.5.0.1", {}, r"built with tensorrt 11.4.0.106, and here is tensorrt 11.5.0.1"),
        ({}, "11.5.0.1", {"version_compatible": True}, None),
        ({}, "11.3.0.1", {"version_compatible": True}, "here is tensorrt 11.3.0.1"),
        ({}, "12.0.0.1", {"version_compatible": True}, "here is tensorrt 12.0.0.1"),
    ],
)
def test_plans_of_another_gpu_or_version(
    fake_tensorrt: FakeTensorRT,
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    properties: dict[str, Any],
    version: str | None,
    settings: dict[str, Any],
    message: str | None,
) -> None:
    opened(bundle, tmp_path, "64x96x5", **settings)
    fake_tensorrt.cuda.properties |= properties
    if version:
        monkeypatch.setattr("anyflow_deploy.engines.tensorrt.engine.VERSION", version)
    reopen = lambda: load_engine(bundle, "tensorrt", "cuda", engine=tmp_path / "engine")  # noqa: E731
    if message is None:
        reopen()
    else:
        with pytest.raises(BackendError, match=message):
            reopen()


def test_a_plan_of_another_bundle(
    fake_tensorrt: FakeTensorRT, bundle: Bundle, causal: Bundle, tmp_path: Path
) -> None:
    opened(bundle, tmp_path, "64x96x5")
    with pytest.raises(
        BackendError,
        match=rf"was built from bundle {bundle.digest[:12]}, and .* is {causal.digest[:12]}",
    ):
        load_engine(causal, "tensorrt", "cuda", engine=tmp_path / "engine")


def test_a_plan_of_another_graph(
    fake_tensorrt: FakeTensorRT, causal: Bundle, tmp_path: Path
) -> None:
    """Two plans of one folder exchanged, hashes and all."""
    opened(causal, tmp_path, "96x160x45:t9")
    folder = tmp_path / "engine"
    record = json.loads((folder / "engine.json").read_text())
    chunk, text = (record["files"][f"{name}.plan"] for name in ("chunk", "text"))
    record["files"] |= {"chunk.plan": text, "text.plan": chunk}
    shutil.move(folder / "chunk.plan", folder / "x")
    shutil.move(folder / "text.plan", folder / "chunk.plan")
    shutil.move(folder / "x", folder / "text.plan")
    (folder / "engine.json").write_text(json.dumps(record))
    with pytest.raises(BackendError, match="is not a plan of this bundle's 'text': it has tensors"):
        load_engine(causal, "tensorrt", "cuda", engine=folder)


def test_what_is_no_plan(fake_tensorrt: FakeTensorRT, bundle: Bundle, tmp_path: Path) -> None:
    import hashlib

    opened(bundle, tmp_path, "64x96x5")
    plan = tmp_path / "engine/transition.plan"
    record = tmp_path / "engine/engine.json"
    plan.write_bytes(b"not a plan")
    raw = json.loads(record.read_text())
    raw["files"]["transition.plan"] = {
        "bytes": 10,
        "sha256": hashlib.sha256(b"not a plan").hexdigest(),
    }
    record.write_text(json.dumps(raw))
    with pytest.raises(
        BackendError, match=r"TensorRT 11.* cannot open .*transition.plan.*Build it on this machine"
    ):
        load_engine(bundle, "tensorrt", "cuda", engine=tmp_path / "engine")


def test_bundles_are_left_alone(fake_tensorrt: FakeTensorRT, bundle: Bundle, engine: Any) -> None:
    assert load_bundle(bundle.path) == bundle


@EVERY_RELEASE
def test_layers_and_launches_are_profiled(
    fake_tensorrt: FakeTensorRT, bundle: Bundle, tmp_path: Path
) -> None:
    """The profiler sees layers of uncaptured runs, enqueueing is timed on captured ones."""
    from anyflow_deploy.engines.registry import EngineOptions
    from anyflow_deploy.profiling import layer_profiling
    from anyflow_deploy.profiling.workload import build_workloads
    from tests.fakes.profile_sample import sample_point

    video = build_workloads(bundle.manifest, ("64x96x5",), None)[0]
    shapes = ("64x96x5", size_of(video.latents, video.text))
    opened(bundle, tmp_path, *shapes).close()
    options = EngineOptions("cuda", engine=tmp_path / "engine")
    layers, enqueue = layer_profiling.profile_layers(
        bundle, chosen_library().backend, options, video, sample_point()
    )
    assert enqueue is not None and enqueue.count == layer_profiling.ENQUEUES
    assert fake_tensorrt.replays > 10
    assert layers.source.startswith(f"{fake_tensorrt.library.title}'s IProfiler")
    assert layers.seconds == pytest.approx(0.25e-3 * len(layers.rows)) and {
        row.operator for row in layers.rows
    } == {"gemm"}
    assert {"attn1.to_q", "ffn.net.2"} <= {row.name for row in layers.by_part}
    gc.collect()
    assert fake_tensorrt.cuda.reserved_bytes() == 0, "everything is given back"
