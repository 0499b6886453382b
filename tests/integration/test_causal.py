"""Causal models: the authors' own results through ONNX Runtime, the cache's plan, streams that are
closed, mixed or wrong."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from anyflow_deploy import (
    MODELS,
    AnyFlowError,
    Chunk,
    Schedule,
    ShapeError,
    load_engine,
    noise,
    sample,
    stream,
)
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.engines.engine import BundleEngine
from anyflow_deploy.engines.kv_cache import cache_plan, check_budget
from anyflow_deploy.engines.metrics import difference
from anyflow_deploy.export.torch_engine import TorchEngine, network_from_weights
from anyflow_deploy.model.causal import ChunkCompressor, TextKVEncoder
from tests.conftest import GOLDEN, SMALL, Export, causal_golden
from tests.fakes.profile_sample import assert_operations_match_graph
from tests.integration.test_graph import TENSORRT_10_3

CAUSAL = GOLDEN.parent / "causal"
FLOAT32 = 1e-4
PLAN = (1, 3, 3, 3, 2)


@pytest.fixture(scope="module")
def oracle() -> dict[str, NDArray[np.float32]]:
    """The golden tensors, latents as (B, F, C, H, W)."""
    return causal_golden(CAUSAL)


@pytest.fixture(
    scope="module",
    params=[("fp32", 20), ("fp32", 23), ("fp16", 20)],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def any_engine(export_once: Export, request: pytest.FixtureRequest) -> tuple[BundleEngine, float]:
    """An engine, and how far it may be from the oracle."""
    precision, opset = request.param
    return load_engine(export_once(CAUSAL, precision, opset)), (
        FLOAT32 if precision == "fp32" else 5e-3
    )


@pytest.fixture(scope="module")
def engine(export_once: Export) -> BundleEngine:
    return load_engine(export_once(SMALL.parent / "causal"))


def whole(chunks: Iterator[Chunk]) -> NDArray[np.float32]:
    return np.concatenate([chunk.latents for chunk in chunks], axis=1)


def three_jumps(steps: int, index: int) -> Schedule:
    """The training roll-out: s_0 -> s_g -> s_(g+1) -> 0 of the grid, empty jumps left out."""
    s = Schedule.uniform(steps).timesteps
    return Schedule.from_timesteps(dict.fromkeys((s[0], s[index], s[index + 1], 0.0)))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_samples(
    oracle: dict[str, Any], any_engine: tuple[BundleEngine, float], steps: int
) -> None:
    engine, limit = any_engine
    made = whole(stream(engine, oracle["latents"], oracle["text"], Schedule.uniform(steps)))
    assert difference(made, oracle[f"sample_{steps}"]).relative_l2 < limit


@pytest.mark.parametrize("steps", [1, 4])
def test_samples_in_torch(oracle: dict[str, Any], steps: int) -> None:
    engine = TorchEngine(open_checkpoint(CAUSAL))
    made = whole(stream(engine, oracle["latents"], oracle["text"], Schedule.uniform(steps)))
    assert difference(made, oracle[f"sample_{steps}"]).relative_l2 < FLOAT32


def test_samples_from_a_context(
    oracle: dict[str, Any], any_engine: tuple[BundleEngine, float]
) -> None:
    engine, limit = any_engine
    chunks = list(
        stream(
            engine,
            oracle["latents"],
            oracle["text"],
            Schedule.uniform(4),
            context=oracle["context"],
        )
    )
    assert [chunk.given for chunk in chunks] == [True, False, False, False, False]
    np.testing.assert_array_equal(chunks[0].latents, oracle["context"])
    assert difference(whole(iter(chunks)), oracle["sample_from_context_4"]).relative_l2 < limit


@pytest.mark.parametrize(("steps", "index"), [(4, 1), (8, 0), (8, 7)])
def test_three_jump_rollouts(
    oracle: dict[str, Any], any_engine: tuple[BundleEngine, float], steps: int, index: int
) -> None:
    engine, limit = any_engine
    made = whole(stream(engine, oracle["latents"], oracle["text"], three_jumps(steps, index)))
    assert difference(made, oracle[f"shortcut_{steps}_{index}"]).relative_l2 < limit


def test_diffusers_class_is_wrong_where_tokens_are_not_a_multiple_of_128(
    oracle: dict[str, Any],
) -> None:
    """Its KV-read path pads to 128 tokens without a mask. Users who compare with it should know
    which is right."""
    from diffusers import AnyFlowFARTransformer3DModel

    model = AnyFlowFARTransformer3DModel.from_pretrained(CAUSAL).eval()
    shape = (2, 1, model.config.num_attention_heads, 0, model.config.attention_head_dim)
    nothing = {
        i: {"full_cache": torch.zeros(shape), "compressed_cache": torch.zeros(shape)}
        for i in range(model.config.num_layers)
    }
    frames = oracle["latents"][:, :1]
    times = torch.full((1, 1), 1000.0), torch.zeros(1, 1)
    with torch.no_grad():
        theirs, _ = model(
            hidden_states=torch.from_numpy(frames),
            timestep=times[0],
            r_timestep=times[1],
            encoder_hidden_states=torch.from_numpy(oracle["text"]),
            chunk_partition=[1],
            kv_cache=nothing,
            kv_cache_flag={"num_cached_chunks": 0, "is_cache_step": False},
            return_dict=False,
        )
    right = frames - oracle["sample_1"][:, :1]
    assert 1e-3 < difference(theirs.numpy(), right).relative_l2 < 0.2


def reference(
    oracle: dict[str, Any], chunks: Sequence[int], latents: NDArray[np.float32], window: int
) -> NDArray[np.float32]:
    """A windowed stream of one step a chunk, in torch, with a list for a cache."""
    checkpoint = open_checkpoint(SMALL.parent / "causal")
    chunk = network_from_weights(checkpoint)
    layers = checkpoint.architecture.num_layers
    z = torch.from_numpy(latents)
    words = TextKVEncoder.forward(chunk, torch.from_numpy(oracle["text"]))
    nothing = [torch.zeros(1, 0, 4, 24)] * (2 * layers)

    def joined(parts: Any) -> list[torch.Tensor]:
        return [torch.cat(tensors, 1) for tensors in zip(*([nothing, *parts]), strict=True)]

    old: list[Any] = []
    clean: list[tuple[torch.Tensor, torch.Tensor]] = []
    first, recent, made = 0, [], []
    for frames in chunks:
        positions = torch.arange(first, first + frames)
        t = torch.full((1, frames), 1000.0)
        out = chunk(
            z[:, first : first + frames], t, 0 * t, positions, *words, *joined([*old, *recent])
        )[0]
        made.append(out)
        clean.append((out, positions))
        first += frames
        if len(clean) > 2:
            item = clean.pop(0)
            if len(old) == 1 + window:
                del old[1]
            old.append(list(ChunkCompressor.forward(chunk, *item, *words[:-2], *joined(old)[:-2])))
            recent, todo = [], clean
        else:
            todo = clean[-1:]
        for latent, where in todo:
            still = torch.zeros(1, latent.shape[1])
            recent.append(
                list(chunk(latent, still, still, where, *words, *joined([*old, *recent]))[2:])
            )
    return torch.cat(made, 1).numpy()


@torch.no_grad()
def test_a_window_is_what_it_says(oracle: dict[str, Any], engine: BundleEngine) -> None:
    chunks = (1, 3, 2, 3, 3, 1, 3, 2)
    latents = noise((1, sum(chunks), 4, 12, 20), 4)
    for window in (1, 2):
        made = whole(
            stream(
                engine,
                latents,
                oracle["text"],
                Schedule.uniform(1),
                chunk_plan=chunks,
                window=window,
            )
        )
        assert difference(made, reference(oracle, chunks, latents, window)).relative_l2 < 1e-5
    everything = whole(
        stream(engine, latents, oracle["text"], Schedule.uniform(1), chunk_plan=chunks)
    )
    wide = whole(
        stream(engine, latents, oracle["text"], Schedule.uniform(1), chunk_plan=chunks, window=5)
    )
    np.testing.assert_array_equal(everything, wide)
    assert difference(made, everything).relative_l2 > 1e-4


def test_two_streams_on_one_engine_do_not_mix(oracle: dict[str, Any], engine: BundleEngine) -> None:
    noises = [noise(oracle["latents"].shape, seed) for seed in (1, 2)]
    alone = [whole(stream(engine, z, oracle["text"], Schedule.uniform(2))) for z in noises]
    pairs = zip(
        *(stream(engine, z, oracle["text"], Schedule.uniform(2)) for z in noises), strict=True
    )
    together = list(zip(*pairs, strict=True))
    for one, chunks in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, whole(iter(chunks)))


def test_the_schedule_may_differ_by_chunk(oracle: dict[str, Any], engine: BundleEngine) -> None:
    asked: list[int] = []

    class FirstFour(Schedule):
        """Four steps for the first chunk, one for all later ones."""

        def for_chunk(self, index: int) -> Schedule:
            asked.append(index)
            return Schedule.uniform(4 if index == 0 else 1)

    policy = FirstFour.uniform(1)
    made = list(stream(engine, oracle["latents"], oracle["text"], policy))
    assert asked == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(made[0].latents, oracle["sample_4"][:, :1], atol=1e-4)
    assert difference(made[1].latents, oracle["sample_4"][:, 1:4]).relative_l2 > 1e-3


def test_a_stream_can_be_closed_at_any_moment(oracle: dict[str, Any], engine: BundleEngine) -> None:
    for taken in range(4):
        chunks = stream(engine, oracle["latents"], oracle["text"], Schedule.uniform(1))
        for _ in range(taken):
            next(chunks)
        memory = weakref.ref(chunks.gi_frame.f_locals["kv_stream"]) if taken else lambda: None  # type: ignore[attr-defined]
        chunks.close()  # type: ignore[attr-defined]
        gc.collect()
        assert memory() is None
        with pytest.raises(StopIteration):
            next(chunks)
    assert np.isfinite(
        whole(stream(engine, oracle["latents"], oracle["text"], Schedule.uniform(1)))
    ).all()


def test_an_exception_in_the_consumer_leaves_the_engine_usable(
    oracle: dict[str, Any], engine: BundleEngine
) -> None:
    expected = whole(stream(engine, oracle["latents"], oracle["text"], Schedule.uniform(1)))
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the loop is what is tested
        for chunk in stream(engine, oracle["latents"], oracle["text"], Schedule.uniform(1)):
            _ = 1 / (1 - chunk.index)
    np.testing.assert_array_equal(
        whole(stream(engine, oracle["latents"], oracle["text"], Schedule.uniform(1))), expected
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_plan": (1, 3, 3)}, r"plan \[1, 3, 3\] has 7 latent frames and latents have 12"),
        ({"chunk_plan": (1, 3, 0, 8)}, r"positive whole numbers"),
        ({"chunk_plan": ()}, r"one or more positive whole numbers"),
        ({"chunk_plan": (1,) * 200}, r"200 latent frames; the rotary table ends at 128"),
        (
            {"context": noise((1, 2, 4, 12, 20), 0)},
            r"2 latent frames, which is not where a chunk ends \(\[1, 4, 7, 10, 12\]\)",
        ),
        ({"context": noise((1, 13, 4, 12, 20), 0)}, "only the frames may differ, and be fewer"),
        ({"context": noise((1, 1, 4, 12, 16), 0)}, "only the frames may differ"),
        ({"latents": noise((1, 4, 12, 12, 20), 0)}, "has 12 latent frames and latents have 4"),
        ({"latents": noise((2, 12, 4, 12, 20), 0)}, "one video"),
        (
            {"latents": noise((1, 12, 4, 11, 20), 0)},
            "latents of 11 x 20: a causal model takes multiples of 2, from 4 on",
        ),
        ({"text": noise((2, 9, 32), 0)}, "one video at a time"),
        ({"window": 0}, "window is 0; allowed are whole numbers from 1"),
    ],
)
def test_wrong_streams_are_refused_at_once(
    oracle: dict[str, Any], engine: BundleEngine, changes: dict[str, Any], message: str
) -> None:
    call = {
        "latents": oracle["latents"],
        "text": oracle["text"],
        "policy": Schedule.uniform(1),
        **changes,
    }
    with pytest.raises(AnyFlowError, match=message):
        stream(engine, **call)


def test_a_chunk_beyond_the_plan_is_refused(oracle: dict[str, Any], engine: BundleEngine) -> None:
    memory = engine.open_stream(oracle["text"], cache_plan(engine.architecture, (1, 1), 12, 20))
    with pytest.raises(AnyFlowError, match="chunk 0 has 1 latent frames in the plan; 3 were given"):
        memory.start(oracle["latents"][:, :3])
    memory.append(oracle["latents"][:, :1])
    with pytest.raises(
        AnyFlowError, match=r"chunk 1 is the last of the plan.* extend\(\) the plan first"
    ):
        memory.append(oracle["latents"][:, :1])
    memory.close()
    with pytest.raises(AnyFlowError, match="this stream is closed"):
        memory.start(oracle["latents"][:, :1])


def test_each_kind_of_model_says_how_it_is_run(
    oracle: dict[str, Any], engine: BundleEngine, small_bundle: Export
) -> None:
    with pytest.raises(AnyFlowError, match=r"causal model.*use stream\(\)"):
        sample(engine, oracle["latents"], oracle["text"], Schedule.uniform(1))
    with pytest.raises(AnyFlowError, match=r"bidirectional model.*Use sample\(\)"):
        stream(load_engine(small_bundle()), oracle["latents"], oracle["text"], Schedule.uniform(1))


def test_the_plan_of_the_released_model() -> None:
    """480x832, 81 frames: 1,560 tokens a frame, 390 compressed."""
    plan = cache_plan(MODELS["far-1.3b"].architecture, None, 60, 104)
    assert (plan.full_tokens, plan.compressed_tokens, plan.frames) == (1560, 390, 21)
    assert [plan.cached_tokens(chunk) for chunk in range(8)] == [
        (0, 0),
        (0, 1560),
        (0, 4 * 1560),
        *((frames * 390, 6 * 1560) for frames in (1, 4, 7, 10, 13)),
    ]
    assert plan.capacity == 13 * 390 + 6 * 1560
    assert plan.bytes(2) == 2 * 30 * (plan.capacity + 512) * 1536 * 2
    assert plan.encoded_tokens == 58_110


def test_a_window_makes_memory_flat() -> None:
    architecture = dataclasses.replace(MODELS["far-1.3b"].architecture)
    long = (1, *(3,) * 300)
    plans = [cache_plan(architecture, long[:n], 60, 104, window=8) for n in (40, 300)]
    assert plans[0].capacity == plans[1].capacity == 390 * (1 + 8 * 3) + 6 * 1560
    assert plans[1].kept_chunks(299) == [0, *range(289, 297)]
    assert cache_plan(architecture, long, 60, 104).capacity > 8 * plans[0].capacity


def test_a_cache_that_does_not_fit_is_refused_with_the_numbers() -> None:
    plan = cache_plan(MODELS["far-1.3b"].architecture, None, 60, 104)
    check_budget(plan, 2, plan.bytes(2))
    with pytest.raises(
        AnyFlowError,
        match=(
            r"8 chunks takes 2,754\.1 MB \(14,430 tokens and 512 of text in 30 layers\); 1,000\.0"
            r" MB are allowed"
        ),
    ):
        check_budget(plan, 2, 1e9)


def test_sides_that_the_coarse_patches_do_not_divide() -> None:
    """720p has 90 latent rows: 22 coarse patches, and two rows that compressed chunks leave out."""
    plan = cache_plan(MODELS["far-1.3b"].architecture, None, 90, 160)
    assert (plan.full_tokens, plan.compressed_tokens) == (45 * 80, 22 * 40)
    with pytest.raises(
        ShapeError, match="latents of 90 x 2: a causal model takes multiples of 2, from 4 on"
    ):
        cache_plan(MODELS["far-1.3b"].architecture, None, 90, 2)


def test_the_bundle_of_a_causal_model(export_once: Export) -> None:
    bundle = export_once(SMALL.parent / "causal", "fp16")
    assert bundle.manifest.kind == "causal" and list(bundle.manifest.graphs) == [
        "text",
        "chunk",
        "compress",
    ]
    text, chunk, compress = bundle.manifest.graphs.values()
    assert [t.name for t in text.inputs] == ["text"] and text.outputs[1].name == "text_value.0"
    assert [t.name for t in chunk.inputs[:6]] == [
        "latents",
        "t",
        "r",
        "positions",
        "text_key.0",
        "text_value.0",
    ]
    past = chunk.inputs[4 + 2 * 3]
    assert (past.name, past.dtype, past.shape) == ("past_key.0", "float16", [1, "past", 4, 24])
    assert [t.name for t in chunk.outputs[:4]] == ["z_r", "velocity", "key.0", "value.0"]
    assert len(compress.inputs) == 2 + 2 * 2 * 2 and len(compress.outputs) == 2 * 3
    stored = load_file(bundle.path / "weights.safetensors")
    assert sum(bundle.manifest.achieved.weight_bytes.values()) == sum(
        a.nbytes for a in stored.values()
    )


@pytest.mark.parametrize("graph", ["text", "chunk", "compress"])
def test_opset_20_is_what_tensorrt_10_3_parses(export_once: Export, graph: str) -> None:
    import onnx

    model = onnx.load(
        str(export_once(SMALL.parent / "causal").path / f"{graph}.onnx"), load_external_data=False
    )
    assert {node.op_type for node in model.graph.node} <= {
        *TENSORRT_10_3.split(),
        "CastLike",
        "ConstantOfShape",
        "Gather",
    }


def test_the_last_layer_of_compression_computes_keys_and_values_alone(export_once: Export) -> None:
    import onnx

    bundle = export_once(SMALL.parent / "causal", "fp32")
    graph = onnx.load(str(Path(bundle.path) / "compress.onnx"), load_external_data=False).graph
    last = {tensor.name for tensor in graph.initializer if tensor.name.startswith("blocks.2.")}
    assert last == {
        f"blocks.2.{name}"
        for name in (
            "scale_shift_table",
            "attn1.norm_k.weight",
            "attn1.to_k.weight",
            "attn1.to_k.bias",
            "attn1.to_v.weight",
            "attn1.to_v.bias",
        )
    }
    assert not {"proj_out.weight", "patch_embedding.weight"} & {
        tensor.name for tensor in graph.initializer
    }


def test_a_causal_profile_has_chunks(export_once: Export, tmp_path: Path) -> None:
    from anyflow_deploy.cli.options import parse_options
    from anyflow_deploy.cli.profile_bundle import ProfileOptions, profile
    from anyflow_deploy.profiling.record import Profile

    causal = export_once(CAUSAL)
    assert_operations_match_graph(causal)
    flags = (
        "--threads 1 --steps 1,2 --shapes 64x64x29 --seconds 0.2 --skip ceilings --json"
        f" {tmp_path}/p.json"
    )
    words = f"{causal.path} {flags} --html {tmp_path}/p.html".split()
    assert profile(parse_options(ProfileOptions, words)) == 0
    read = Profile.model_validate_json((tmp_path / "p.json").read_text())
    (point,) = read.points
    assert (
        sum(point.chunks[0].frames) == point.frames == 29 and point.chunks[0].cached_tokens[0] == 0
    )
    for chunks, clip in zip(point.chunks, point.clips, strict=True):
        assert (
            chunks.first.count == clip.latency.count
            and chunks.later is not None
            and chunks.remember is not None
        )
        ratio = sum(chunks.by_index) / clip.latency.median
        assert 0.1 < ratio < 10, (
            "medians of a few runs on a busy machine: this sees a wrong unit or a chunk left out"
        )
    assert (
        read.layers[0].graph == "chunk"
        and "Time of each chunk" in (tmp_path / "p.html").read_text()
    )
