"""The C++ library's core against Python: the same questions to both, and the same answers, to the
last bit where numbers are.

Built once without torch, under the address and undefined-behaviour sanitizers, with a backend of
the tests' own (tests/fakes/toy_backend.py is the same backend in numpy).
tests/integration/test_cpp_engines.py runs the real backends.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyflow_deploy import (
    AnyFlowError,
    Bundle,
    Deadline,
    Schedule,
    __version__,
    load_bundle,
    noise,
    sample,
    stream,
)
from anyflow_deploy.engines.deadline import DeadlineResult, StepTimer
from anyflow_deploy.engines.kv_cache import cache_plan
from anyflow_deploy.engines.torch_common.device import instruction_sets
from anyflow_deploy.errors import BackendError, BundleError, ShapeError
from tests.cpp_build import (
    KINDS,
    Conformance,
    build_targets,
    configure,
    fuzz_corpus,
    run,
    sample_manifest,
    sanitizers_work,
)
from tests.fakes.toy_backend import ToyEngine, ToyState

MANY = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="session")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build without torch and, where the compiler can, with sanitizers. ANYFLOW_CPP_BUILD names
    one that is there already."""
    if "ANYFLOW_CPP_BUILD" in os.environ:
        return Path(os.environ["ANYFLOW_CPP_BUILD"])
    folder = tmp_path_factory.mktemp("cpp") / "core"
    sanitize = "address,undefined" if sanitizers_work() else ""
    said = configure(
        folder,
        "-DANYFLOW_AOTINDUCTOR=OFF",
        "-DANYFLOW_TENSORRT=OFF",
        "-DANYFLOW_OPENSSL=OFF",
        "-DANYFLOW_TESTS=ON",
        "-DANYFLOW_EXAMPLES=OFF",
        f"-DANYFLOW_SANITIZE={sanitize}",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS_DEBUG=-O0 -g1 -Werror",
    )
    assert "AOTINDUCTOR is switched off" in said
    return build_targets(folder)


@pytest.fixture(scope="session")
def ask(core: Path) -> Iterator[Conformance]:
    program = Conformance(core / "tests" / "conformance")
    yield program
    program.close()


def written(folder: Path, manifest: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "weights.bin").write_bytes(b"some weight")
    (folder / "manifest.json").write_text(
        manifest if isinstance(manifest, str) else json.dumps(manifest, indent=1)
    )
    return folder


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """A bundle of each kind, without graphs to run."""
    folder = tmp_path_factory.mktemp("bundles")
    return {kind: load_bundle(written(folder / kind, sample_manifest(kind))) for kind in KINDS}


CODES = ((BundleError, 2), (ShapeError, 3), (BackendError, 4), (AnyFlowError, 1))
"""Python's errors, and the `anyflow_code` that says the same."""


def python(work: Callable[[], Any]) -> dict[str, Any]:
    """What Python answers, an error being an answer, too."""
    try:
        return {"value": work()}
    except AnyFlowError as error:
        code = next(code for kind, code in CODES if isinstance(error, kind))
        return {"error": str(error), "code": code}


def same(cpp: dict[str, Any], key: str, work: Callable[[], Any]) -> None:
    """C++ and Python agree: on the value, or on the kind of refusal. Each has words of its own for
    it."""
    expected = python(work)
    if "error" in expected:
        assert cpp.get("code") == expected["code"], (expected, cpp)
        assert cpp["error"]
    else:
        assert "error" not in cpp, cpp
        assert cpp[key] == expected["value"]


def as_json(array: Any) -> dict[str, Any]:
    return {
        "shape": list(array.shape),
        "data": [float(x) for x in np.asarray(array, np.float32).ravel()],
    }


# Schedules.

times = st.floats(-10, 1100, allow_nan=False) | st.sampled_from([0.0, 1000.0, 500.0, 1e-5, 2.5])


@MANY
@given(
    steps=st.integers(-2, 1002), shift=st.floats(0.01, 20) | st.sampled_from([1.0, 5.0, 0.0, -1.0])
)
def test_uniform_schedules(ask: Conformance, steps: int, shift: float) -> None:
    answer = ask("schedule", kind="uniform", steps=steps, shift=shift)
    same(answer, "timesteps", lambda: list(Schedule.uniform(steps, shift).timesteps))


@MANY
@given(
    values=st.lists(times, max_size=6)
    | st.lists(times, max_size=6, unique=True).map(lambda v: sorted(v, reverse=True))
)
def test_schedules_of_ones_own(ask: Conformance, values: list[float]) -> None:
    same(
        ask("schedule", kind="timesteps", values=values),
        "timesteps",
        lambda: list(Schedule.from_timesteps(values).timesteps),
    )
    sigmas = [value / 1000 for value in values]
    answer = ask("schedule", kind="sigmas", values=sigmas, shift=3.0)
    same(answer, "timesteps", lambda: list(Schedule.from_sigmas(sigmas, 3.0).timesteps))


# Samples, under schedules and deadlines.


def toy(bundle: Bundle, costs: list[float]) -> ToyEngine:
    return ToyEngine(bundle.manifest.architecture, bundle.manifest.shape_ranges, ToyState(costs))


def seen(steps: list[Any]) -> Callable[[Any], None]:
    return lambda step: steps.append(
        [step.index, step.steps, step.t, step.r, float(step.read().flat[0])]
    )


LATENTS = noise((1, 2, 4, 4, 4), 3)
TEXT = noise((1, 3, 32), 4)


@MANY
@given(steps=st.integers(1, 30), shift=st.floats(0.2, 12))
def test_samples_are_the_same_bits(
    ask: Conformance, bundles: dict[str, Bundle], steps: int, shift: float
) -> None:
    bundle, mine = bundles["bidirectional"], []
    how = {"kind": "uniform", "steps": steps, "shift": shift}
    got = ask(
        "sample", bundle=str(bundle.path), noise=as_json(LATENTS), text=as_json(TEXT), schedule=how
    )["runs"][0]
    clean = sample(toy(bundle, []), LATENTS, TEXT, Schedule.uniform(steps, shift), seen(mine))
    assert got["latents"] == as_json(clean)["data"] and got["steps"] == mine


@MANY
@given(
    seconds=st.floats(0.05, 5),
    costs=st.lists(st.floats(0.01, 0.6), min_size=1, max_size=5),
    max_steps=st.integers(1, 12),
    shift=st.floats(0.5, 8),
    enough_after=st.none() | st.integers(0, 6),
)
def test_deadlines_decide_the_same(
    ask: Conformance,
    bundles: dict[str, Bundle],
    seconds: float,
    costs: list[float],
    max_steps: int,
    shift: float,
    enough_after: int | None,
) -> None:
    bundle = bundles["bidirectional"]
    wish = {"seconds": seconds, "most": max_steps, "shift": shift, "enough_after": enough_after}
    got = ask(
        "sample",
        bundle=str(bundle.path),
        noise=as_json(LATENTS),
        text=as_json(TEXT),
        deadline=wish,
        costs=costs,
        runs=3,
    )
    engine, step_timer = toy(bundle, costs), StepTimer()
    for again in got["runs"]:
        mine: list[Any] = []
        outcomes: list[DeadlineResult] = []
        asked = itertools.count()
        deadline = Deadline(
            seconds,
            shift,
            max_steps,
            step_timer,
            clock=lambda: engine.state.now,
            on_end=outcomes.append,
            should_stop=lambda asked=asked: (
                enough_after is not None and next(asked) >= enough_after
            ),
        )
        clean = sample(engine, LATENTS, TEXT, deadline, seen(mine))
        assert again["latents"] == as_json(clean)["data"] and again["steps"] == mine
        assert again["outcomes"] == [
            [o.steps, o.probe_step, o.seconds, o.deadline] for o in outcomes
        ]


def test_an_abort_and_a_callback_that_throws(ask: Conformance, bundles: dict[str, Bundle]) -> None:
    more = {
        "noise": as_json(LATENTS),
        "text": as_json(TEXT),
        "schedule": {"kind": "uniform", "steps": 5, "shift": 5},
    }
    answer = ask("sample", bundle=str(bundles["bidirectional"].path), abort_after=2, **more)
    assert answer["code"] == 5 and "aborted by the caller" in answer["error"]
    answer = ask("sample", bundle=str(bundles["bidirectional"].path), throw_after=1, **more)
    assert answer == {"thrown": "thrown by a callback"}, (
        "through C, and out of the call that it was made in"
    )


@pytest.mark.parametrize(
    ("latents", "text"),
    [
        ((1, 2, 4, 3, 4), (1, 3, 32)),
        ((2, 2, 4, 4, 4), (1, 3, 32)),
        ((1, 2, 5, 4, 4), (1, 3, 32)),
        ((1, 2, 4, 4, 4), (1, 3, 31)),
        ((1, 2, 4, 4, 4000), (1, 3, 32)),
        ((1, 0, 4, 4, 4), (1, 3, 32)),
        ((1, 2, 4, 4, 4), (1, 0, 32)),
    ],
)
def test_shapes_are_refused_in_the_same_words(
    ask: Conformance, bundles: dict[str, Bundle], latents: tuple[int, ...], text: tuple[int, ...]
) -> None:
    z = np.zeros(latents, np.float32)
    words = np.zeros(text, np.float32)
    bundle = bundles["bidirectional"]
    answer = ask(
        "velocity", bundle=str(bundle.path), noise=as_json(z), text=as_json(words), t=[5], r=[1]
    )
    same(answer, "latents", lambda: toy(bundle, []).start(z, words))
    assert "error" in answer


@pytest.mark.parametrize(
    ("t", "r"),
    [([5.0], [6.0]), ([1001.0], [0.0]), ([5.0], [-1.0]), ([500.0, 400.0], [300.0, 450.0])],
)
def test_times_are_refused_in_the_same_words(
    ask: Conformance, bundles: dict[str, Bundle], t: list[float], r: list[float]
) -> None:
    bundle = bundles["bidirectional"]
    answer = ask(
        "velocity", bundle=str(bundle.path), noise=as_json(LATENTS), text=as_json(TEXT), t=t, r=r
    )
    same(
        answer,
        "latents",
        lambda: toy(bundle, []).start(LATENTS, TEXT).velocity(np.array([t]), np.array([r])),
    )
    assert "error" in answer


# Causal streams.

plans = st.lists(st.integers(1, 4), min_size=1, max_size=12)


@MANY
@given(
    chunks=plans,
    window=st.none() | st.integers(1, 4),
    context=st.integers(0, 3),
    deadline=st.booleans(),
    data=st.data(),
)
def test_streams_walk_the_same_way(
    ask: Conformance,
    bundles: dict[str, Bundle],
    chunks: list[int],
    window: int | None,
    context: int,
    deadline: bool,
    data: Any,
) -> None:
    bundle, costs = bundles["causal"], [0.1, 0.3, 0.2]
    z = noise((1, sum(chunks), 4, 8, 4 + 4 * data.draw(st.integers(0, 2))), 5)
    clean = noise(z.shape, 6)[:, : sum(chunks[:context])] if context else None
    how: dict[str, Any] = {"schedule": {"kind": "uniform", "steps": 2, "shift": 5}}
    engine = toy(bundle, costs)
    outcomes: list[DeadlineResult] = []
    course: Any = Schedule.uniform(2)
    if deadline:
        how = {"deadline": {"seconds": 0.9}}
        course = Deadline(0.9, clock=lambda: engine.state.now, on_end=outcomes.append)
    got = ask(
        "stream",
        bundle=str(bundle.path),
        noise=as_json(z),
        text=as_json(TEXT),
        chunks=chunks,
        window=window,
        costs=costs,
        context=None if clean is None else as_json(clean),
        **how,
    )
    mine: list[Any] = []
    made = list(stream(engine, z, TEXT, course, chunks, clean, window, seen(mine)))
    assert [(c["index"], c["first_frame"], c["given"]) for c in got["chunks"]] == [
        (c.index, c.first_frame, c.given) for c in made
    ]
    assert [c["latents"] for c in got["chunks"]] == [as_json(c.latents)["data"] for c in made]
    assert got["steps"] == mine and got["calls"] == engine.state.calls
    assert got["outcomes"] == [[o.steps, o.probe_step, o.seconds, o.deadline] for o in outcomes]


@MANY
@given(
    chunks=plans,
    window=st.none() | st.integers(-1, 4),
    height=st.integers(1, 24),
    width=st.integers(1, 24),
)
def test_caches_are_planned_the_same(
    ask: Conformance,
    bundles: dict[str, Bundle],
    chunks: list[int],
    window: int | None,
    height: int,
    width: int,
) -> None:
    bundle = bundles["causal"]
    answer = ask(
        "plan",
        bundle=str(bundle.path),
        chunks=chunks,
        window=window,
        height=height,
        width=width,
        text=33,
    )
    try:
        plan = cache_plan(bundle.manifest.architecture, chunks, height, width, window or None, 33)
    except AnyFlowError:
        assert "error" in answer
        return
    expected = {
        "frames": plan.frames,
        "capacity": plan.capacity,
        "bytes": plan.bytes(2),
        "encoded_tokens": plan.encoded_tokens,
    }
    assert answer == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chunks": [2, 2]}, r"has 4 latent frames and latents have 5"),
        ({"chunks": [0, 5]}, "positive whole numbers"),
        ({"window": -1}, "window is -1"),
        ({"text": as_json(np.zeros((2, 3, 32)))}, "one video at a time"),
        ({"noise": as_json(np.zeros((1, 5, 4, 7, 8)))}, "multiples of 2"),
        ({"chunks": [3, 2], "context": as_json(np.zeros((1, 2, 4, 8, 8)))}, "where a chunk ends"),
        ({"chunks": [5000]}, "rotary table"),
        ({"noise": as_json(np.zeros((1, 5, 3, 8, 8)))}, "3 channels"),
    ],
)
def test_what_a_stream_refuses(
    ask: Conformance, bundles: dict[str, Bundle], change: dict[str, Any], words: str
) -> None:
    given_: dict[str, Any] = {
        "noise": as_json(np.zeros((1, 5, 4, 8, 8))),
        "text": as_json(TEXT),
        "chunks": [1, 2, 2],
    }
    answer = ask("stream", bundle=str(bundles["causal"].path), **{**given_, **change})
    assert re.search(words, answer["error"]), answer


def test_the_wrong_kind_of_model(ask: Conformance, bundles: dict[str, Bundle]) -> None:
    more = {"noise": as_json(LATENTS), "text": as_json(TEXT)}
    assert "open a stream" in ask("sample", bundle=str(bundles["causal"].path), **more)["error"]
    assert (
        "use anyflow_sample"
        in ask("stream", bundle=str(bundles["bidirectional"].path), **more)["error"]
    )


# Noise, hashes, the processor.


@pytest.mark.parametrize("seed", [0, 1, 7, 2**32, 2**64 - 1])
def test_noise_is_the_same_bits(ask: Conformance, seed: int) -> None:
    assert ask("noise", seed=seed, count=20_000)["values"] == [
        float(x) for x in noise((20_000,), seed)
    ]


@pytest.mark.parametrize("length", [0, 1, 55, 56, 63, 64, 65, 119, 120, 127, 128, 1000, 100_001])
def test_hashes(ask: Conformance, length: int) -> None:
    text = ("The quick brown fox. " * (length // 21 + 1))[:length]
    assert ask("hash", text=text)["text"] == hashlib.sha256(text.encode()).hexdigest()


def test_the_processor_is_named_as_in_engine_json(ask: Conformance, tmp_path: Path) -> None:
    import platform

    for flags in ("fpu sse2 avx512f hypervisor ssse3 pni bf16x", "fma f16c", ""):
        (tmp_path / "cpuinfo").write_text(f"model name : X\nflags\t\t: {flags}\n")
        answer = ask("instructions", level="AVX512", cpuinfo=str(tmp_path / "cpuinfo"))
        assert answer["text"] == instruction_sets("AVX512", tmp_path / "cpuinfo") or not flags
    answer = ask("instructions", level="AVX2", cpuinfo="/proc/cpuinfo")
    assert answer == {"text": instruction_sets("AVX2"), "machine": platform.machine()}


# Manifests: accepted and refused alike.


def variants(value: Any) -> Iterator[Any]:
    """Copies of a document with one thing changed, everywhere."""
    if isinstance(value, dict):
        yield {**value, "unknown": 1}
        for key, item in value.items():
            yield {k: v for k, v in value.items() if k != key}
            yield from ({**value, key: changed} for changed in variants(item))
    elif isinstance(value, list):
        yield []
        for index, item in enumerate(value):
            yield from (
                [*value[:index], changed, *value[index + 1 :]] for changed in variants(item)
            )
    yield from (
        other
        for other in (None, True, 0, -1, 3, 2.5, "x", [], {}, [1, 2, 3])
        if other != value or type(other) is not type(value)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_manifests_are_accepted_and_refused_alike(
    ask: Conformance, tmp_path: Path, kind: str
) -> None:
    """Every key left out, every value of another type or size, to both readers; a causal one's
    graphs are as the other's."""
    accepted = refused = 0
    bundle = written(tmp_path / "bundle", sample_manifest(kind))
    whole = sample_manifest(kind)
    fixed = {"graphs"} if kind == "causal" else set()
    for part in variants({key: value for key, value in whole.items() if key not in fixed}):
        manifest = (
            {**part, **{key: whole[key] for key in fixed}} if isinstance(part, dict) else part
        )
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        answer = ask("bundle", bundle=str(bundle))
        expected = python(lambda: load_bundle(bundle)).get("error", "")
        assert bool(expected) == ("error" in answer), (manifest, expected, answer)
        accepted = accepted + (not expected)
        refused = refused + bool(expected)
        place = re.search(r"is damaged at '([^']*)'", expected)
        if place and not place[1].startswith(("ranges", "graphs", "schema")):
            assert f"at '{place[1]}'" in answer["error"], (expected, answer)
    assert refused > 500 and accepted > 20


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no JSON object with a 'schema'"),
        ("[1]", "no JSON object"),
        ("{}", "no JSON object"),
        ("[" * 100_000, "no JSON object"),
        ('{"schema": 2}', "manifest schema 2; this version reads 1. Update"),
        ('{"schema": 0}', "schema 0; this version reads 1. Export again"),
        ('{"schema": "1"}', "schema '1'; this version"),
        ('{"schema": 1}', "damaged at 'kind'"),
    ],
)
def test_what_is_no_manifest(ask: Conformance, tmp_path: Path, text: str, words: str) -> None:
    answer = ask("bundle", bundle=str(written(tmp_path / "bundle", text)))
    assert words in answer["error"]
    with pytest.raises(AnyFlowError, match=re.escape(words)):
        load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/hostname",
        "a\\b",
        "link",
        "",
        "a\0b",
        "x" * 5000,
        "missing",
        "folder",
        "loop",
    ],
)
def test_files_outside_the_folder(ask: Conformance, tmp_path: Path, name: str) -> None:
    manifest = sample_manifest("bidirectional")
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    bundle = written(tmp_path / "bundle", manifest)
    (tmp_path / "outside").write_text("x")
    (bundle / "link").symlink_to(tmp_path / "outside")
    (bundle / "loop").symlink_to(bundle / "loop")
    (bundle / "folder").mkdir()
    answer = ask("bundle", bundle=str(bundle))
    with pytest.raises(AnyFlowError) as refused:
        load_bundle(bundle)
    leaves = "leaves the bundle's folder"
    assert answer["code"] == 2 and (leaves in answer["error"]) == (leaves in str(refused.value))


def test_changed_files(ask: Conformance, tmp_path: Path) -> None:
    bundle = written(tmp_path / "bundle", sample_manifest("bidirectional"))
    for content in (b"some Weight", b"some weight and more"):
        (bundle / "weights.bin").write_bytes(content)
        same(ask("bundle", bundle=str(bundle)), "kind", lambda: load_bundle(bundle))
    (bundle / "weights.bin").write_bytes(b"some Weight")
    assert (
        ask("bundle", bundle=str(bundle), skip_hashes=True)["digest"]
        == load_bundle(bundle, verify=False).digest
    )
    shutil.rmtree(bundle)
    same(ask("bundle", bundle=str(bundle)), "kind", lambda: load_bundle(bundle))


def test_what_a_bundle_says(ask: Conformance, bundles: dict[str, Bundle]) -> None:
    for kind, bundle in bundles.items():
        answer = ask("bundle", bundle=str(bundle.path))
        m = bundle.manifest
        assert (answer["kind"], answer["digest"], answer["shift"]) == (
            kind,
            bundle.digest,
            m.schedule.shift,
        )
        assert answer["size"] == [3, 8, 12] and answer["channels"] == m.architecture.in_channels
        ranges = {
            axis: [r.minimum, -1 if r.maximum is None else r.maximum, r.multiple]
            for axis, r in m.ranges.items()
        }
        assert answer["ranges"] == ranges


# What is compiled as C, the fuzzers, and the two languages' versions.


def test_the_header_in_c(core: Path, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    said = run(
        core / "tests" / "c_api", bundles["bidirectional"].path, bundles["causal"].path, tmp_path
    )
    assert said.stdout.endswith("0 failures\n")


@pytest.mark.parametrize("target", ["manifest", "engine", "safetensors"])
def test_fuzzers(core: Path, tmp_path: Path, target: str) -> None:
    """A short run from a fixed seed; `make fuzz-cpp` is the long one."""
    paths = []
    for number, document in enumerate(fuzz_corpus()[target]):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(document))
    said = run(core / "tests" / f"fuzz_{target}", 4000, 1, *paths)
    assert said.stdout == "4000 inputs\n"


def test_the_header_has_the_version_of_the_python_package(core: Path) -> None:
    header = (core / "include" / "anyflow" / "version.h").read_text()
    numbers = re.findall(r"#define ANYFLOW_VERSION_\w+ (\d+)", header)
    assert ".".join(numbers) == __version__
    assert f'#define ANYFLOW_VERSION "{__version__}"' in header


def test_without_a_compiler_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import cpp_build

    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"no C\+\+ compiler here: apt install g\+\+"):
        cpp_build.find_compiler()


def test_sanitizers_would_complain(tmp_path: Path) -> None:
    """The flags that the tests are built with do end a program that reads past its memory."""
    if not sanitizers_work():
        pytest.skip("this compiler has no sanitizers")
    (tmp_path / "bad.cpp").write_text(
        "#include <vector>\nint main(int n, char**) { std::vector<int> v(1); return"
        " v.data()[n]; }\n"
    )
    run(
        "c++",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        tmp_path / "bad.cpp",
        "-o",
        tmp_path / "bad",
    )
    done = subprocess.run([tmp_path / "bad"], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
