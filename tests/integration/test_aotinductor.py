"""AOTInductor: the authors' own results through compiled packages, in other precisions, and all
that is refused.

A package takes half a minute to compile, so each engine is built once a session
(`build_aotinductor` in conftest).
"""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from anyflow_deploy import (
    AnyFlowError,
    BackendError,
    Bundle,
    Schedule,
    ShapeError,
    load_engine,
    noise,
    sample,
    stream,
)
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.cli.validate import ValidateOptions, validate
from anyflow_deploy.engines.aotinductor import build, compiler
from anyflow_deploy.engines.aotinductor.build import AotInductorSettings
from anyflow_deploy.engines.aotinductor.compiled_graph import CudaGraphRunner
from anyflow_deploy.engines.build import build_engine
from anyflow_deploy.engines.engine_folder import EngineFolder
from anyflow_deploy.engines.metrics import difference
from anyflow_deploy.engines.torch_common import device
from anyflow_deploy.engines.torch_common.device import instruction_sets
from anyflow_deploy.engines.torch_common.weights import TorchWeights
from anyflow_deploy.engines.validation import THRESHOLDS
from anyflow_deploy.export.diffusers_engine import DiffusersEngine
from anyflow_deploy.export.exporter import ExportSettings, export_bundle
from anyflow_deploy.export.program import network_from_bundle, program_from_bundle
from anyflow_deploy.export.quantization.calibrate import CalibrationSettings, run_calibration
from anyflow_deploy.export.quantization.prompts import PROMPTS, random_prompt_embeds
from anyflow_deploy.export.torch_engine import TorchEngine
from anyflow_deploy.model.transformer import FlowMapTransformer
from tests.conftest import CAUSAL, SMALL, Export, causal_golden
from tests.integration.test_causal import three_jumps, whole

Arrays = dict[str, NDArray[np.float32]]

FLOAT32 = 1e-5
AGREES = 1e-3
"""As in test_quantize: two programs that round on the same grid."""

BARE = """
import sys
class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Bare())
from anyflow_deploy.cli import build, generate
{"build": build, "generate": generate}[sys.argv.pop(1)].main()
"""


@pytest.fixture(scope="module")
def oracle() -> Arrays:
    return load_file(SMALL / "golden.safetensors")


@pytest.fixture(scope="module")
def folder(small_bundle: Export, build_aotinductor: Any) -> EngineFolder:
    return build_aotinductor(small_bundle())


@pytest.fixture(scope="module")
def engine(small_bundle: Export, folder: EngineFolder) -> Any:
    return load_engine(small_bundle(), "aotinductor", engine=folder.path)


@pytest.mark.parametrize("suffix", ["", "_per_frame"])
def test_golden_velocities(oracle: Arrays, engine: Any, suffix: str) -> None:
    with engine.start(oracle["latents"], oracle["text"]) as run:
        velocity = run.velocity(oracle[f"timestep{suffix}"], oracle[f"r_timestep{suffix}"])
    assert difference(velocity, oracle[f"velocity{suffix}"]).relative_l2 < FLOAT32


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 13])
def test_golden_samples(oracle: Arrays, engine: Any, steps: int) -> None:
    latents = sample(engine, oracle["latents"], oracle["text"], Schedule.uniform(steps))
    assert difference(latents, oracle[f"sample_{steps}"]).relative_l2 < FLOAT32


@pytest.mark.parametrize("shape", [(1, 1, 4, 2, 2), (3, 2, 4, 6, 4), (1, 7, 4, 10, 18)])
@pytest.mark.parametrize("tokens", [1, 33])
def test_one_engine_takes_any_shape(engine: Any, shape: tuple[int, ...], tokens: int) -> None:
    latents = noise(shape, 0)
    text = noise((shape[0], tokens, 32), 1)
    reference = DiffusersEngine(open_checkpoint(SMALL))
    made, expected = (sample(e, latents, text, Schedule.uniform(3)) for e in (engine, reference))
    assert difference(made, expected).relative_l2 < FLOAT32


def test_runs_are_apart_and_what_was_read_stays(engine: Any) -> None:
    text, shape = noise((1, 3, 32), 1), (1, 2, 4, 4, 6)
    given = noise(shape, 5)
    alone = [sample(engine, noise(shape, seed), text, Schedule.uniform(2)) for seed in (5, 6)]
    with engine.start(given, text) as a, engine.start(noise(shape, 6), text) as b:
        before = a.read()
        for t, r in Schedule.uniform(2).transitions:
            velocity = a.velocity(t, r)
            expected = a.read() - np.float32((t - r) / 1000) * velocity
            a.step(t, r)
            np.testing.assert_allclose(a.read(), expected, rtol=1e-5, atol=1e-6)
            b.step(t, r)
        np.testing.assert_array_equal(a.read(), alone[0])
        np.testing.assert_array_equal(b.read(), alone[1])
        np.testing.assert_array_equal(before, noise(shape, 5))
        np.testing.assert_array_equal(given, before)
    with pytest.raises(AnyFlowError, match="this run is closed"):
        a.step(500, 0)


def test_what_the_sampler_refuses(engine: Any) -> None:
    with pytest.raises(ShapeError, match="height is 3"):
        engine.start(noise((1, 1, 4, 3, 2), 0), noise((1, 3, 32), 1))
    with (
        engine.start(noise((1, 1, 4, 2, 2), 0), noise((1, 3, 32), 1)) as run,
        pytest.raises(AnyFlowError, match="1000 >= t"),
    ):
        run.step(400, 500)
    with pytest.raises(AnyFlowError, match="bidirectional model: use sample"):
        engine.open_stream(noise((1, 3, 32), 1), None)


def test_threads_and_closing(small_bundle: Export, folder: EngineFolder) -> None:
    before = torch.get_num_threads()
    try:
        engine: Any = load_engine(small_bundle(), "aotinductor", threads=2, engine=folder.path)
        assert torch.get_num_threads() == 2 and engine.description.startswith(
            "AOTInductor, torch 2."
        )
    finally:
        torch.set_num_threads(before)
    weight = engine._weights["blocks.0.ffn.net.2.weight"]
    assert weight.untyped_storage().nbytes() == 4 * weight.numel()
    run = engine.start(noise((1, 1, 4, 2, 2), 0), noise((1, 3, 32), 1))
    engine.close()
    assert weight.untyped_storage().nbytes() == 0, (
        "the memory is back, though the runtime still refers to it"
    )
    for use in (
        lambda: run.step(500, 0),
        lambda: engine.start(noise((1, 1, 4, 2, 2), 0), noise((1, 3, 32), 1)),
    ):
        with pytest.raises(AnyFlowError, match="this engine is closed"):
            use()
    engine.close()


def test_an_engine_that_is_dropped_gives_its_weights_back_once_its_runs_are_gone(
    small_bundle: Export, folder: EngineFolder
) -> None:
    engine: Any = load_engine(small_bundle(), "aotinductor", engine=folder.path)
    weight = engine._weights["blocks.0.ffn.net.2.weight"]
    run = engine.start(noise((1, 1, 4, 2, 2), 0), noise((1, 3, 32), 1))
    del engine
    gc.collect()
    run.step(1000, 0)
    assert np.isfinite(run.read()).all() and weight.untyped_storage().nbytes() > 0
    del run
    gc.collect()
    assert weight.untyped_storage().nbytes() == 0


def test_the_engine_is_small_and_holds_no_weights(
    small_bundle: Export, folder: EngineFolder
) -> None:
    record = folder.record
    assert set(record.files) == {"transition.pt2"}
    assert b"pickle" not in folder.file("transition.pt2").read_bytes()
    assert record.achieved == {"transition": "6 of 6 attentions fused"}
    assert (
        record.versions["torch"] == torch.__version__
        and "processor instructions" in record.versions
    )


def test_validate_proves_it(small_bundle: Export, folder: EngineFolder, tmp_path: Path) -> None:
    options = {
        "steps": (1, 4),
        "height": 64,
        "width": 64,
        "output": tmp_path,
        "backend": "aotinductor",
    }
    assert (
        validate(ValidateOptions(bundle=small_bundle().path, engine=str(folder.path), **options))
        == 0
    )
    assert "AOTInductor" in (tmp_path / "validation.json").read_text()


@pytest.fixture(scope="module")
def causal(export_once: Export, build_aotinductor: Any) -> tuple[Any, Arrays]:
    bundle = export_once(CAUSAL)
    oracle = causal_golden()
    return load_engine(bundle, "aotinductor", engine=build_aotinductor(bundle).path), oracle


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_golden_streams(causal: tuple[Any, Arrays], steps: int) -> None:
    engine, oracle = causal
    made = whole(stream(engine, oracle["latents"], oracle["text"], Schedule.uniform(steps)))
    assert difference(made, oracle[f"sample_{steps}"]).relative_l2 < FLOAT32


@pytest.mark.slow
def test_golden_streams_of_other_kinds(causal: tuple[Any, Arrays]) -> None:
    engine, oracle = causal
    inputs = engine, oracle["latents"], oracle["text"]
    context = whole(stream(*inputs, Schedule.uniform(4), context=oracle["context"]))
    assert difference(context, oracle["sample_from_context_4"]).relative_l2 < FLOAT32
    jumps = whole(stream(*inputs, three_jumps(8, 7)))
    assert difference(jumps, oracle["shortcut_8_7"]).relative_l2 < FLOAT32


@pytest.mark.slow
def test_a_window_and_a_growing_plan_compute_what_onnx_runtime_does(
    causal: tuple[Any, Arrays], export_once: Export
) -> None:
    engine, oracle = causal
    latents = noise((1, 19, 4, 12, 20), 3)
    other = load_engine(export_once(CAUSAL))
    ours, theirs = (
        whole(
            stream(e, latents, oracle["text"], Schedule.uniform(1), (1, 3, 3, 3, 3, 3, 3), window=2)
        )
        for e in (engine, other)
    )
    assert difference(ours, theirs).relative_l2 < FLOAT32


@pytest.mark.slow
def test_streams_share_one_copy_of_the_weights(causal: tuple[Any, Arrays]) -> None:
    engine, oracle = causal
    shared = set(engine._graphs["chunk"].weights) & set(engine._graphs["compress"].weights)
    assert len(shared) > 20 and shared < set(engine._weights)
    with pytest.raises(AnyFlowError, match="causal model, .* use stream"):
        engine.start(oracle["latents"], oracle["text"])


ONE_LAYER = dataclasses.replace(open_checkpoint(SMALL).architecture, num_layers=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "base", "achieved", "least"),
    [
        # ONNX Runtime has no CPU kernels for either type.
        (
            "fp8",
            "bf16",
            "10 calls of _scaled_mm",
            1e-3,
        ),
        ("int8", "fp32", "10 calls of _int_mm", 1e-3),
        ("fp16", None, "", 1e-6),
    ],
)
def test_every_precision_is_compiled(
    build_aotinductor: Any,
    tmp_path_factory: pytest.TempPathFactory,
    precision: str,
    base: str | None,
    achieved: str,
    least: float,
) -> None:
    """The compiled network against the same one in eager torch, and against float32, from which it
    has to differ."""
    weights = RandomWeights(ONE_LAYER, "one layer")
    settings = CalibrationSettings(
        random_prompt_embeds(weights, PROMPTS[:2], 40), (2, 4, 8, 12), steps=(1, 2)
    )
    how = ExportSettings(precision, target="h100")
    if base:
        how = dataclasses.replace(how, base=base, calibration=run_calibration(weights, settings))
    bundle = export_bundle(weights, tmp_path_factory.mktemp("one") / "bundle", how)
    folder = build_aotinductor(bundle)
    assert folder.record.achieved["transition"].split(", ")[1:] == ([achieved] if achieved else [])
    latents = noise((1, 2, 4, 8, 12), 0)
    text = noise((1, 40, 32), 1)
    with load_engine(bundle, "aotinductor", engine=folder.path).start(latents, text) as run:
        found = run.velocity(900, 500)
    with TorchEngine(weights).start(latents, text) as run:
        exact = run.velocity(900, 500)
    bound = THRESHOLDS["fp16" if precision == "fp16" else "bf16"].transition
    assert difference(found, eager(bundle, latents, text)).relative_l2 < bound
    assert least < difference(found, exact).relative_l2 < THRESHOLDS[precision].transition


def eager(
    bundle: Bundle,
    latents: NDArray[np.float32],
    text: NDArray[np.float32],
    weights: dict[str, torch.Tensor] | None = None,
) -> NDArray[np.float32]:
    """The velocity from 900 to 500 of the network that is compiled, not compiled."""
    if weights is None:
        stored = TorchWeights(torch, bundle, "cpu")
        weights = stored.select(list(stored))
    network = network_from_bundle(bundle, "transition", weights)
    times = [torch.full(latents.shape[:2], time) for time in (900.0, 500.0)]
    with torch.no_grad():
        return network(torch.from_numpy(latents), *times, torch.from_numpy(text))[1].numpy()


@pytest.mark.parametrize(
    ("precision", "kind", "limit"), [("fp16", torch.float16, 5e-4), ("bf16", torch.bfloat16, 5e-3)]
)
def test_half_precisions(
    small_bundle: Export, oracle: Arrays, precision: str, kind: torch.dtype, limit: float
) -> None:
    """The network that is compiled, from a float32 bundle whose manifest and weights were converted
    in memory."""
    bundle = small_bundle()
    changed = dataclasses.replace(
        bundle, manifest=bundle.manifest.model_copy(update={"precision": precision})
    )
    with torch.device("meta"):
        types = {
            n: p.dtype
            for n, p in FlowMapTransformer(bundle.manifest.architecture, kind).named_parameters()
        }
    stored = TorchWeights(torch, bundle, "cpu")
    weights = {name: stored[name].to(types.get(name, torch.float32)) for name in stored}
    with load_engine(bundle).start(oracle["latents"], oracle["text"]) as run:
        expected = run.velocity(900, 500)
    assert (
        difference(eager(changed, oracle["latents"], oracle["text"], weights), expected).relative_l2
        < limit
    )


KEPT = (
    "blocks.0.attn1.to_q",
    "blocks.1.attn1.to_k",
    "blocks.1.ffn.net.0.proj",
    "blocks.2.attn2.to_k",
)
"""Their inputs are smoothed, although they are not quantized."""


@pytest.mark.parametrize(
    "how", [("int8", {"full_precision_layers": KEPT}), ("fp8", {})], ids=["int8", "fp8"]
)
def test_eight_bits_are_those_of_the_onnx_graph(
    export_quantized: Export, oracle: Arrays, how: tuple[str, dict[str, Any]]
) -> None:
    bundle = export_quantized(SMALL, how[0], **how[1])
    with load_engine(bundle).start(oracle["latents"], oracle["text"]) as run:
        expected = run.velocity(900, 500)
    assert (
        difference(eager(bundle, oracle["latents"], oracle["text"]), expected).relative_l2 < AGREES
    )


def test_an_input_is_rounded_once_for_all_that_read_it(export_quantized: Export) -> None:
    bundle = export_quantized(SMALL, "fp8")
    weights = TorchWeights(torch, bundle, "cpu")
    program = program_from_bundle(bundle, "transition", weights.select(list(weights)), "cpu")
    targets = [str(node.target) for node in program.graph.nodes]
    products = sum("_scaled_mm" in target for target in targets)
    assert products == 30 and sum("clamp" in target for target in targets) == 19, (
        "six inputs in each of three layers, and the text"
    )
    assert sum("scaled_dot_product_attention" in target for target in targets) == 6


# What is refused, before work starts.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"versions": {"torch": "2.12.0"}}, r"built with torch 2\.12\.0, and here is torch 2"),
        (
            {"versions": {"processor instructions": "AVX512 (9, 0)"}},
            r"built with processor instructions AVX512 \(9, 0\), and",
        ),
        (
            {"device": {"kind": "cuda", "name": "NVIDIA H100", "compute_capability": "9.0"}},
            r"built for NVIDIA H100 \(comp.*9\.0",
        ),
    ],
)
def test_an_engine_from_elsewhere(
    small_bundle: Export, folder: EngineFolder, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    import json

    shutil.copytree(folder.path, tmp_path / "engine")
    raw = json.loads((tmp_path / "engine" / "engine.json").read_text())
    for key, value in change.items():
        raw[key] = {**raw[key], **value}
    (tmp_path / "engine" / "engine.json").write_text(json.dumps(raw))
    with pytest.raises(BackendError, match=message):
        load_engine(small_bundle(), "aotinductor", engine=tmp_path / "engine")


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the absence of a GPU")
def test_no_gpu(small_bundle: Export, folder: EngineFolder) -> None:
    with pytest.raises(
        BackendError, match=r"provider is 'cuda', and PyTorch .* finds no GPU .*use provider 'cpu'"
    ):
        build_engine(small_bundle(), "aotinductor", AotInductorSettings(provider="cuda"))
    with pytest.raises(BackendError, match="finds no GPU"):
        load_engine(small_bundle(), "aotinductor", "cuda", engine=folder.path)
    assert (
        not list((small_bundle().path / "engines").iterdir())
        if (small_bundle().path / "engines").exists()
        else True
    )


def test_no_compiler(small_bundle: Export, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch._inductor.cpp_builder as builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(builder, "get_cpp_compiler", missing)
    with pytest.raises(BackendError, match=r"needs a C\+\+ compiler.*apt install g\+\+.*CXX"):
        build_engine(small_bundle(), "aotinductor", AotInductorSettings(), tmp_path / "engine")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(28, "No space left on device"),
            r"No space left on device.*TORCHINDUCTOR_CACHE_DIR",
        ),
        (RuntimeError("g++ said no"), r"cannot be compiled \(RuntimeError\): g\+\+ said no"),
        (
            RuntimeError("C++ compile error\n\nCommand:\ng++ x.cpp\n\nx.cpp:1:2: error: no header"),
            r"cannot be compiled \(RuntimeError\): x\.cpp:1:2: error: no header$",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), r"out of memory: .*--max-autotune"),
    ],
)
def test_a_compiler_that_fails_leaves_nothing(
    small_bundle: Export,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: Exception,
    message: str,
) -> None:
    def fail(*_: Any, package_path: str, **__: Any) -> None:
        Path(package_path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(compiler, "program_from_bundle", lambda *_: None)
    monkeypatch.setattr(compiler, "aoti_compile_and_package", fail)
    with pytest.raises(BackendError, match=message):
        build_engine(small_bundle(), "aotinductor", AotInductorSettings(), tmp_path / "engine")
    assert not list(tmp_path.iterdir())


def test_attention_that_was_not_fused_is_refused(
    small_bundle: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        compiler,
        "count_calls",
        lambda _: {"cpu_bmm_out": 12, "_scaled_dot_product_flash_attention_for_cpu": 5},
    )
    with pytest.raises(BackendError, match="5 of 6 attentions of transition became one operator"):
        compiler.summarize_package(small_bundle(), "transition", Path("transition.pt2"))


def test_fp8_attention_is_refused(export_quantized: Export) -> None:
    manifest = SimpleNamespace(quantization=SimpleNamespace(attention="fp8"), precision="fp8")
    with pytest.raises(
        BackendError,
        match=r"attention in fp8.*--attention high, or use backend tensorrt or onnxruntime",
    ):
        build.check_precision(torch, SimpleNamespace(path="bundle", manifest=manifest), "cpu", 0)  # type: ignore[arg-type]


def test_fp8_needs_ada_and_int8_needs_rows_on_a_gpu(
    export_quantized: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimpleNamespace(
        get_device_capability=lambda _: (8, 0), get_device_name=lambda _: "NVIDIA A100"
    )
    with pytest.raises(
        BackendError, match=r"NVIDIA A100 \(compute capability 8\.0\) has no FP8 products"
    ):
        build.check_precision(SimpleNamespace(cuda=gpu), export_quantized(SMALL, "fp8"), "cuda", 0)
    bundle = export_quantized(SMALL, "int8", full_precision_layers=KEPT)
    ranges = build._buildable_ranges(bundle, "cuda")
    assert (
        ranges["text"].minimum == 17
        and ranges["height"].minimum * ranges["width"].minimum // 4 >= 17
    )
    assert build._buildable_ranges(bundle, "cpu")["text"].minimum == 1


@pytest.mark.parametrize("command", ["build", "generate"])
def test_without_torch(small_bundle: Export, tmp_path: Path, command: str) -> None:
    embeddings = tmp_path / "fox.safetensors"
    save_file({"prompt_embeds": noise((1, 8, 32), 0)}, embeddings)
    more = (
        ["--prompt-embeds", embeddings, "--output", tmp_path / "z.safetensors"]
        if command == "generate"
        else []
    )
    words = [
        str(word) for word in (command, small_bundle().path, "--backend", "aotinductor", *more)
    ]
    done = subprocess.run(
        [sys.executable, "-c", BARE, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "this backend's runtime. Run: pip install 'anyflow-deploy[aotinductor]'" in " ".join(
        done.stderr.split()
    )


def test_instructions_are_compared_not_kernels(tmp_path: Path) -> None:
    def of(flags: str) -> str:
        (tmp_path / "cpuinfo").write_text(f"model name : X\nflags\t\t: {flags}\n")
        return instruction_sets("AVX512", tmp_path / "cpuinfo")

    assert of("fpu sse2 avx512f hypervisor") == of("avx512f sse2 ibrs_enhanced")
    assert of("sse2 avx512f") != of("sse2 avx2")
    assert of("sse2 avx512f").startswith("AVX512 (2, ")
    assert device.instruction_sets("DEFAULT", tmp_path / "missing").startswith("DEFAULT (1, ")


# CUDA graphs, with a stand-in for CUDA: what is recorded, where inputs go, and that runs do not
# mix.


class Tape:
    """Replays what was called while it was recording."""

    recording: Tape | None = None

    def __init__(self) -> None:
        self.again: list[Callable[[], None]] = []

    def replay(self) -> None:
        for work in self.again:
            work()


class Recording:
    def __init__(self, tape: Tape, pool: object) -> None:
        self.tape = tape
        assert pool == "pool"

    def __enter__(self) -> None:
        Tape.recording = self.tape

    def __exit__(self, *_: object) -> None:
        Tape.recording = None


@pytest.fixture
def recorded() -> tuple[CudaGraphRunner, list[str]]:
    calls: list[str] = []

    def double(x: torch.Tensor) -> list[torch.Tensor]:
        calls.append("recorded" if Tape.recording else "called")
        out = x * 2

        def again() -> None:
            calls.append("replayed")
            out.copy_(x * 2)

        if Tape.recording:
            Tape.recording.again.append(again)
        return [out]

    cuda = SimpleNamespace(
        CUDAGraph=Tape,
        graph=Recording,
        graph_pool_handle=lambda: "pool",
        synchronize=lambda: calls.append("settled"),
    )
    return CudaGraphRunner(SimpleNamespace(cuda=cuda), double), calls


def test_cuda_graphs_are_recorded_at_the_second_call_of_a_shape(
    recorded: tuple[CudaGraphRunner, list[str]],
) -> None:
    graph, calls = recorded
    first, second, third = (graph(torch.full((2,), value))[0] for value in (1.0, 2.0, 3.0))
    assert calls == ["called", "settled", "recorded", "replayed", "replayed"]
    assert [float(x[0]) for x in (first, second, third)] == [
        2,
        4,
        6,
    ], "outputs are copies: later replays leave them alone"
    assert float(graph(torch.ones(3))[0][0]) == 2 and calls[-1] == "called", (
        "another shape begins anew"
    )


def test_old_recordings_make_room(recorded: tuple[CudaGraphRunner, list[str]]) -> None:
    graph, calls = recorded
    for size in range(1, 7):
        for _ in range(2):
            graph(torch.ones(size))
    assert len(graph._graphs) == 4
    calls.clear()
    graph(torch.ones(1))
    assert calls == [
        "settled",
        "recorded",
        "replayed",
    ], "an old shape is warm and only recorded again"
    graph.close()
    assert not graph._graphs


def test_disk_and_folder(small_bundle: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(BackendError, match="cannot be written to"):
        build_engine(small_bundle(), "aotinductor", AotInductorSettings())
