"""The C++ library's TensorRT backend, run where there is neither TensorRT nor a GPU: against
NVIDIA's headers, on a machine that is acted (engines/cpp/tests/fakes), which ends the process where
TensorRT or CUDA would do something undefined.

Everything is compared with Python's own sampler and cache on the same arithmetic in numpy
(tests/fakes/cpp_tensorrt.py), to the last bit. The library is built by its own CMake with
-DTensorRT_ROOT and -DCUDAToolkit_ROOT, under the address sanitizer.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyflow_deploy import Bundle, Schedule, noise, sample, stream
from anyflow_deploy.engines.deadline import Deadline
from tests.cpp_build import Conformance
from tests.fakes.cpp_tensorrt import (
    BACKEND,
    RTX,
    VERSION_KEY,
    FakePlanEngine,
    FakeTensorRTBuild,
    plan_text,
    write_bundle,
    write_engine,
)

Z, TEXT = noise((1, 2, 4, 4, 6), 3), noise((1, 3, 32), 4)
UNIFORM = {"kind": "uniform", "steps": 3, "shift": 5}
LIVING = (
    *("runtimes", "engines", "contexts", "configurations"),
    *("streams", "graphs", "allocations"),
)
not_rtx = pytest.mark.skipif(RTX, reason="the headers here are those of TensorRT for RTX")
rtx = pytest.mark.skipif(not RTX, reason="the headers here are TensorRT's, not those of RTX")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> FakeTensorRTBuild:
    """Built once; in the folder that ANYFLOW_CPP_MACHINE names, where only what changed is built
    again, and with the sanitizers that ANYFLOW_CPP_SANITIZE names (as in "thread")."""
    folder = os.environ.get("ANYFLOW_CPP_MACHINE") or tmp_path_factory.mktemp("machine")
    return FakeTensorRTBuild(Path(folder), os.environ.get("ANYFLOW_CPP_SANITIZE"))


@pytest.fixture
def ask(machine: FakeTensorRTBuild) -> Iterator[Conformance]:
    program = Conformance(machine.program)
    yield program
    program.close()


def other(machine: FakeTensorRTBuild, **settings: Any) -> Conformance:
    """The program on a machine with other settings; see engines/cpp/tests/fakes/machine.hpp."""
    words = ",".join(f"{key}={value}" for key, value in settings.items())
    return Conformance(machine.program, ANYFLOW_STANDIN=words)


@pytest.fixture(scope="module")
def wan(machine: FakeTensorRTBuild, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bidirectional bundle with an engine."""
    bundle = write_bundle(tmp_path_factory.mktemp("bundles") / "wan", "bidirectional")
    write_engine(bundle, machine.version)
    return bundle


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def far(
    machine: FakeTensorRTBuild,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Bundle:
    """A causal one; its tokens are no multiples of 256 bytes, so that some places are aligned and
    some are not."""
    bundle = write_bundle(tmp_path_factory.mktemp("bundles") / "far", "causal", request.param)
    write_engine(bundle, machine.version)
    return bundle


def as_json(array: Any) -> dict[str, Any]:
    return {
        "shape": list(array.shape),
        "data": [float(x) for x in np.asarray(array, np.float32).ravel()],
    }


def asked(bundle: Bundle, z: Any = Z, text: Any = TEXT, **more: Any) -> dict[str, Any]:
    return {
        "bundle": str(bundle.path),
        "backend": BACKEND,
        "noise": as_json(z),
        "text": as_json(text),
        **more,
    }


def nothing_left(ask: Conformance) -> dict[str, Any]:
    """Everything that was made on the machine was released; what it counted."""
    report = ask("report")
    assert not any(report[name] for name in LIVING), report
    return report


# Samples.


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_samples(ask: Conformance, wan: Bundle, steps: int, cuda_graphs: bool) -> None:
    """Twelve steps come back to the same addresses often enough to be captured."""
    before = ask("report")["launched"]
    how = {"kind": "uniform", "steps": steps, "shift": 5}
    answer = ask("sample", **asked(wan, schedule=how, cuda_graphs=cuda_graphs))
    assert (
        answer["runs"][0]["latents"]
        == as_json(sample(FakePlanEngine(wan), Z, TEXT, Schedule.uniform(steps)))["data"]
    )
    report = nothing_left(ask)
    launched = report["launched"] - before
    assert launched == (6 if cuda_graphs and steps == 12 and not RTX else 0), (
        "of each of two directions: two runs, a warm-up, then graphs"
    )
    assert (report["own_graphs"] > 0) == (RTX and cuda_graphs), "RTX captures its graphs itself"


def test_velocities_and_times_of_each_frame(ask: Conformance, wan: Bundle) -> None:
    t, r = [900.0, 500.0], [400.0, 500.0]
    answer = ask("velocity", **asked(wan, t=t, r=r))
    assert (
        answer["latents"] == as_json(FakePlanEngine(wan).start(Z, TEXT).velocity([t], [r]))["data"]
    )


def test_a_lane_is_kept_for_the_same_shapes_and_let_go_for_others(
    ask: Conformance, wan: Bundle
) -> None:
    small = noise((1, 2, 4, 4, 4), 1)
    large = noise((2, 3, 4, 8, 12), 2)
    text = noise((1, 3, 32), 4)
    answer = ask(
        "samples",
        bundle=str(wan.path),
        backend=BACKEND,
        text=as_json(text),
        steps=4,
        noises=[as_json(z) for z in (small,) * 6],
    )
    expected = as_json(sample(FakePlanEngine(wan), small, text, Schedule.uniform(4)))["data"]
    assert answer["made"] == [expected] * 6
    made = answer["reports"]
    assert (
        made[-1]["allocated"] == made[0]["allocated"]
        and made[-1]["streams_made"] == made[0]["streams_made"]
    )
    assert RTX or made[-1]["launched"] > made[0]["launched"], (
        "the same addresses come back, and their graphs with them"
    )
    larger = noise((1, 4, 4, 12, 12), 2)
    answer = ask(
        "samples",
        bundle=str(wan.path),
        backend=BACKEND,
        text=as_json(text),
        noises=[as_json(z) for z in (larger, small)],
    )
    assert (
        answer["reports"][1]["bytes"] < answer["reports"][0]["bytes"]
        and answer["reports"][1]["streams"] == 1
    )
    nothing_left(ask)
    assert large.shape  # of another batch: text of one prompt does not fit, see the refusals


def test_deadlines(ask: Conformance, wan: Bundle) -> None:
    """A clock that stands still leaves time for all steps; `enough` ends with one jump."""
    answer = ask("sample", **asked(wan, deadline={"seconds": 1, "most": 4}))["runs"][0]
    assert answer["outcomes"][0][:2] == [4, True]
    deadline = Deadline(1.0, max_steps=4, clock=lambda: 0.0)
    assert answer["latents"] == as_json(sample(FakePlanEngine(wan), Z, TEXT, deadline))["data"]
    answer = ask("sample", **asked(wan, deadline={"seconds": 1, "most": 9, "enough_after": 0}))[
        "runs"
    ][0]
    assert answer["outcomes"][0][:2] == [1, False] and len(answer["steps"]) == 1


def test_aborts_and_callbacks_that_throw(ask: Conformance, wan: Bundle) -> None:
    for after in (0, 1, 2):
        answer = ask("sample", **asked(wan, schedule=UNIFORM, abort_after=after))
        assert answer["code"] == 5
    assert ask("sample", **asked(wan, schedule=UNIFORM, throw_after=1)) == {
        "thrown": "thrown by a callback"
    }
    nothing_left(ask)


def test_threads_share_an_engine(ask: Conformance, wan: Bundle) -> None:
    shape, seeds = (1, 2, 4, 4, 6), list(range(8))
    answer = ask(
        "together",
        bundle=str(wan.path),
        backend=BACKEND,
        text=as_json(TEXT),
        shape=shape,
        seeds=seeds,
    )
    for seed, made in zip(seeds, answer["made"], strict=True):
        assert (
            made
            == as_json(sample(FakePlanEngine(wan), noise(shape, seed), TEXT, Schedule.uniform(4)))[
                "data"
            ]
        )
    nothing_left(ask)


def test_runs_take_turns_and_outlive_the_engines_handle(
    machine: FakeTensorRTBuild, wan: Bundle
) -> None:
    """On the second of two GPUs: a thread that steps a run starts on the first."""
    ask = other(machine, devices=2)
    times = [1000.0, 700.0, 400.0, 100.0, 0.0]
    zs = (Z, noise((1, 3, 4, 4, 8), 5))
    answer = ask(
        "interleaved",
        bundle=str(wan.path),
        backend=BACKEND,
        device=1,
        times=times,
        text=as_json(TEXT),
        noises=[as_json(z) for z in zs],
    )
    for key, z, count in (("first", zs[0], 4), ("second", zs[1], 2)):
        mine = FakePlanEngine(wan).start(z, TEXT)
        for t, r in itertools.pairwise(times[: count + 1]):
            mine.step(t, r)
        assert answer[key] == as_json(mine.read())["data"]
    ask.close()


def test_two_engines_at_once(
    ask: Conformance, machine: FakeTensorRTBuild, wan: Bundle, tmp_path: Path
) -> None:
    """TensorRT's logger outlives whichever is closed first, and a refusal tells of its own plan
    only."""
    broken = write_engine(
        write_bundle(tmp_path / "b", "bidirectional"),
        machine.version,
        content={"transition": b"standin-plan\nversion 9\n"},
    )
    record = json.loads((broken / "engine.json").read_text())
    (broken / "engine.json").write_text(json.dumps({**record, "bundle": wan.digest}))
    made = ask("two engines", **asked(wan, broken=str(broken)))["made"]
    assert (
        made[0]
        == made[1]
        == as_json(sample(FakePlanEngine(wan), Z, TEXT, Schedule.uniform(4)))["data"]
    )
    assert "the plan ends too early" in made[2] and "anyflow-build" in made[2]
    nothing_left(ask)


# Streams.

CHUNKS = [1, 2, 1, 3, 2, 1, 2]


def streamed(
    bundle: Bundle,
    z: Any,
    chunks: list[int],
    window: int | None = None,
    steps: int = 2,
    **more: Any,
) -> list[Any]:
    made = stream(
        FakePlanEngine(bundle), z, TEXT, Schedule.uniform(steps), chunks, window=window, **more
    )
    return [as_json(chunk.latents)["data"] for chunk in made]


@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize("size", [(4, 4), (6, 8)])
def test_streams(ask: Conformance, far: Bundle, window: int | None, size: tuple[int, int]) -> None:
    z = noise((1, sum(CHUNKS), 4, *size), 5)
    answer = ask(
        "stream",
        **asked(
            far,
            z,
            chunks=CHUNKS,
            window=window,
            schedule={"kind": "uniform", "steps": 2, "shift": 5},
        ),
    )
    assert "chunks" in answer, answer
    assert [chunk["latents"] for chunk in answer["chunks"]] == streamed(far, z, CHUNKS, window)
    nothing_left(ask)


def test_a_stream_from_context_under_a_deadline(ask: Conformance, far: Bundle) -> None:
    chunks = [1, 2, 2]
    z = noise((1, 5, 4, 4, 8), 5)
    given = noise((1, 3, 4, 4, 8), 6)
    answer = ask(
        "stream",
        **asked(far, z, chunks=chunks, context=as_json(given), deadline={"seconds": 1, "most": 3}),
    )
    made = stream(
        FakePlanEngine(far), z, TEXT, Deadline(1.0, max_steps=3, clock=lambda: 0.0), chunks, given
    )
    assert [chunk["latents"] for chunk in answer["chunks"]] == [
        as_json(chunk.latents)["data"] for chunk in made
    ]


@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_chunk_that_was_broken_off_is_begun_anew(
    ask: Conformance, far: Bundle, after: int
) -> None:
    """Also late enough that its transitions were captured."""
    z, chunks = noise((1, 6, 4, 4, 4), 5), [1, 2, 1, 2]
    answer = ask("streams", **asked(far, z, chunks=chunks, abort_after=after, steps=9))
    assert answer["faults"] == [""] and answer["streams"][0] == streamed(far, z, chunks, steps=9)
    nothing_left(ask)


def test_streams_of_several_threads(ask: Conformance, far: Bundle) -> None:
    z = noise((1, sum(CHUNKS), 4, 4, 8), 5)
    answer = ask("streams", **asked(far, z, chunks=CHUNKS, window=1, count=4, threads_each=True))
    assert answer["faults"] == [""] * 4 and answer["streams"] == [streamed(far, z, CHUNKS, 1)] * 4
    nothing_left(ask)


def test_the_next_stream_finds_what_the_last_one_made(ask: Conformance, far: Bundle) -> None:
    z, chunks = noise((1, 4, 4, 4, 8), 5), [1, 2, 1]
    answer = ask("streams", **asked(far, z, chunks=chunks, count=3, steps=6))
    assert answer["streams"] == [streamed(far, z, chunks, steps=6)] * 3
    first, *_, last = answer["reports"]
    assert last["allocated"] == first["allocated"] and last["streams_made"] == first["streams_made"]
    assert RTX or last["launched"] > first["launched"]


# What is refused.


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"content": b"an ELF file"}, "cannot open"),
        ({"content": b""}, "cannot open"),
        ({"cut": True}, "the plan ends too early"),
        ({"lines": ["host text"]}, "tensor text in host memory"),
        ({"lines": ["output more float32 1 -1"]}, "7 tensors"),
        ({"swap": ("input t float32", "output t float32")}, "another tensor t"),
        (
            {"swap": ("latents float32 -1 -1 4", "latents float32 -1 -1 8")},
            "another tensor latents, of shape -1x-1x8x-1x-1",
        ),
        ({"swap": ("velocity float32", "velocity float16")}, "another tensor velocity"),
        ({"swap": ("input r ", "input s ")}, "another tensor r"),
        ({"lines": ["profile"]}, "2 profiles where engine.json lists 1"),
        ({"lines": ["weights 99999999999"]}, "does not fit into the GPU's memory"),
    ],
)
def test_plans_that_are_not_ours(
    ask: Conformance, machine: FakeTensorRTBuild, tmp_path: Path, how: dict[str, Any], words: str
) -> None:
    bundle = write_bundle(tmp_path / "b", "bidirectional")
    text = plan_text(bundle, "transition", machine.version, *how.get("lines", ()))
    text = text.replace(*how["swap"]) if "swap" in how else text
    content = how.get("content", text.encode()[: len(text) // 2] if "cut" in how else text.encode())
    write_engine(bundle, machine.version, content={"transition": content})
    answer = ask("sample", **asked(bundle))
    assert (
        answer["code"] in (4, 6) and words in answer["error"] and "transition" in answer["error"]
    ), answer
    assert ("99999" in str(how)) == (answer["code"] == 6)
    nothing_left(ask)


@pytest.mark.parametrize(
    ("record", "settings", "words"),
    [
        (
            {"versions": {VERSION_KEY: "10.1.0"}},
            {},
            f"was built with {VERSION_KEY} 10.1.0, and here is {VERSION_KEY} ",
        ),
        ({"versions": {}}, {}, f"was built with {VERSION_KEY} unknown"),
        (
            {"device": {"kind": "cuda", "name": "NVIDIA Stand-in", "compute_capability": "8.6"}},
            {},
            "(compute capability 8.6)",
        ),
        pytest.param(
            {"device": {"kind": "cuda", "name": "NVIDIA H100", "compute_capability": "9.0"}},
            {},
            "was built for NVIDIA H100",
            marks=not_rtx,
        ),
        ({}, {"strip": True}, "--strip"),
        ({"profiles": {}}, {}, "was built without 'transition'"),
        ({"profiles": {"chunk": {"p": {}}}}, {}, "which the bundle lacks"),
        ({"bundle": "0" * 64}, {}, "was built from bundle 000000000000"),
    ],
)
def test_engines_from_elsewhere(
    ask: Conformance,
    machine: FakeTensorRTBuild,
    tmp_path: Path,
    record: dict[str, Any],
    settings: dict[str, Any],
    words: str,
) -> None:
    bundle = write_bundle(tmp_path / "b", "bidirectional")
    write_engine(bundle, machine.version, record=record, settings=settings)
    answer = ask("sample", **asked(bundle))
    assert answer["code"] in (2, 4) and words in answer["error"], answer
    nothing_left(ask)


def test_a_plan_that_was_changed_is_not_opened(
    ask: Conformance, machine: FakeTensorRTBuild, tmp_path: Path
) -> None:
    bundle = write_bundle(tmp_path / "b", "bidirectional")
    plan = write_engine(bundle, machine.version) / "transition.plan"
    plan.write_bytes(plan.read_bytes().replace(b"patch 2", b"patch 4"))
    assert "was changed: its SHA-256 is" in ask("sample", **asked(bundle))["error"]
    plan.write_bytes(plan.read_bytes().replace(b"end", b"???"))
    assert (
        "the plan ends too early"
        in ask("sample", **asked(bundle, skip_engine_hashes=True))["error"]
    )


@not_rtx
@pytest.mark.parametrize(
    ("record", "settings", "fits"),
    [
        ("8.6", "ampere+", True),
        ("7.5", None, False),
        ("9.0", "same-capability", True),
        ("8.6", "same-capability", False),
    ],
)
def test_compatible_hardware(
    ask: Conformance,
    machine: FakeTensorRTBuild,
    tmp_path: Path,
    record: str,
    settings: str | None,
    fits: bool,
) -> None:
    bundle = write_bundle(tmp_path / "b", "bidirectional")
    device = {"kind": "cuda", "name": "another", "compute_capability": record}
    write_engine(
        bundle,
        machine.version,
        record={"device": device},
        settings={"hardware_compatible": settings} if settings else {},
    )
    assert ("runs" in ask("sample", **asked(bundle, schedule=UNIFORM))) == fits


@rtx
@pytest.mark.parametrize(
    ("built", "here", "fits"),
    [
        ("8.9", "8.9", True),
        ("8.6", "8.9", False),
        *((None, here, True) for here in ("8.0", "8.6", "8.9", "12.0", "12.1", "13.0")),
        *((None, here, False) for here in ("7.5", "8.7", "9.0", "10.0", "11.0")),
    ],
)
def test_gpus_of_an_rtx_engine(
    machine: FakeTensorRTBuild, tmp_path: Path, built: str | None, here: str, fits: bool
) -> None:
    """One that was built for a compute capability runs on every GPU of it, whatever its name; one
    that was built for none in particular runs on those that NVIDIA names."""
    bundle = write_bundle(tmp_path / "b", "bidirectional")
    name = "NVIDIA GeForce RTX 3090" if built else "any"
    device = {"kind": "cuda", "name": name, "compute_capability": built}
    plan = {"transition": [f"capability {built or 'any'}"]}
    write_engine(bundle, machine.version, lines=plan, record={"device": device})
    ask = other(machine, capability=here)
    answer = ask("sample", **asked(bundle, schedule=UNIFORM))
    if fits:
        assert (
            answer["runs"][0]["latents"]
            == as_json(sample(FakePlanEngine(bundle), Z, TEXT, Schedule.uniform(3)))["data"]
        )
    else:
        words = (
            f"built for NVIDIA GeForce RTX 3090 (compute capability {built}), and this is"
            f" NVIDIA Stand-in (compute capability {here})"
            if built
            else f"NVIDIA Stand-in has compute capability {here}; TensorRT for RTX opens engines on"
        )
        assert answer["code"] == 4 and words in answer["error"], answer
    nothing_left(ask)
    ask.close()


@rtx
def test_a_library_that_is_too_old(machine: FakeTensorRTBuild, tmp_path: Path) -> None:
    """Its classes have other functions in other places: RTX itself would not notice."""
    bundle = write_bundle(tmp_path / "b", "bidirectional")
    write_engine(bundle, "1.4.0")
    ask = other(machine, version="1.4.0")
    answer = ask("sample", **asked(bundle))
    assert answer["code"] == 4 and "TensorRT for RTX 1.4.0 is loaded" in answer["error"]
    ask.close()


def test_engines_of_the_other_library(
    ask: Conformance, machine: FakeTensorRTBuild, tmp_path: Path
) -> None:
    """TensorRT does not open what TensorRT for RTX built, nor the other way round."""
    bundle = write_bundle(tmp_path / "b", "bidirectional")
    theirs = "tensorrt" if RTX else "tensorrt-rtx"
    folder = write_engine(bundle, machine.version, record={"backend": theirs})
    for question, words in (
        ({"backend": theirs}, f"this library was built without a backend '{theirs}'"),
        ({"backend": BACKEND}, f"has no {BACKEND} engine yet"),
        ({"backend": BACKEND, "engine": folder.name}, f"an engine of backend {theirs}, and"),
        ({"backend": ""}, f"({BACKEND}, toy): it has engines of {theirs}"),
    ):
        answer = ask("sample", **{**asked(bundle), **question})
        assert answer["code"] == 4 and words in answer["error"], answer


def test_compatible_versions(ask: Conformance, machine: FakeTensorRTBuild, tmp_path: Path) -> None:
    """Of the same major release and not newer, and only where the build was asked for it."""
    major = machine.version.split(".")[0]
    for name, version, runs in (
        ("older", f"{major}.0.0", True),
        ("newer", f"{major}.99.0", False),
        ("last", "9.3.0", False),
    ):
        bundle = write_bundle(tmp_path / name, "bidirectional")
        how = {
            "lines": {"transition": ["version_compatible"]},
            "settings": {"version_compatible": True},
        }
        write_engine(bundle, version, **how)
        assert ("runs" in ask("sample", **asked(bundle, schedule=UNIFORM))) == runs


def test_shapes_outside_every_profile(
    ask: Conformance, machine: FakeTensorRTBuild, tmp_path: Path
) -> None:
    bundle = write_bundle(tmp_path / "b", "bidirectional")
    write_engine(
        bundle,
        machine.version,
        profiles=[{"height": (4, 4)}, {"height": (8, 12), "frames": (2, 2)}],
    )
    for shape, fits in (
        ((1, 2, 4, 4, 6), True),
        ((1, 2, 4, 12, 6), True),
        ((1, 2, 4, 6, 6), False),
        ((1, 3, 4, 8, 6), False),
    ):
        z = noise(shape, 1)
        answer = ask("sample", **asked(bundle, z, schedule=UNIFORM))
        if fits:
            assert (
                answer["runs"][0]["latents"]
                == as_json(sample(FakePlanEngine(bundle), z, TEXT, Schedule.uniform(3)))["data"]
            )
        else:
            assert (
                answer["code"] == 3
                and "the nearest is latents 1x" in answer["error"]
                and "--shapes" in answer["error"]
            )
    noises = [as_json(noise((1, 2, 4, height, 6), 1)) for height in (4, 12, 4)]
    answer = ask(
        "samples", bundle=str(bundle.path), backend=BACKEND, text=as_json(TEXT), noises=noises
    )
    assert answer["made"][0] == answer["made"][2] != answer["made"][1], (
        "one context, and two profiles in turn"
    )


def test_what_a_stream_cannot_do_is_said_before_it_begins(
    ask: Conformance, machine: FakeTensorRTBuild, tmp_path: Path
) -> None:
    """Also where only its ninth chunk would need a longer cache than any profile has."""
    z, chunks = noise((1, 9, 4, 4, 4), 5), [1] * 9
    for name, how, words in (
        ("without", {"graphs": ["text", "chunk"]}, "was built without 'compress'"),
        ("short", {"profiles": [{"past": (0, 13)}]}, "no profile of this engine's 'c"),
        ("text", {"profiles": [{"text": (4, 9)}]}, "no profile of this engine's 'text'"),
    ):
        bundle = write_bundle(tmp_path / name, "causal")
        write_engine(bundle, machine.version, **how)
        answer = ask("stream", **asked(bundle, z, chunks=chunks, schedule=UNIFORM, throw_after=0))
        assert answer["code"] == 3 and words in answer["error"], answer
        assert (
            ask("stream", **asked(bundle, z[:, :1], chunks=[1], schedule=UNIFORM)).get("chunks")
            or name == "text"
        )


# What fails on the way.


def test_memory_runs_out_at_every_place(
    machine: FakeTensorRTBuild, far: Bundle, wan: Bundle
) -> None:
    """Whatever does not fit, nothing is left and the words are ours."""
    z, chunks = noise((1, 4, 4, 4, 8), 5), [1, 2, 1]
    question = asked(far, z, chunks=chunks, schedule={"kind": "uniform", "steps": 5, "shift": 5})
    enough = Conformance(machine.program)
    assert "chunks" in enough("stream", **question)
    most = enough("report")["most_bytes"]
    enough.close()
    for memory in range(1000, most, max(most // 25, 1)):
        ask = other(machine, memory=memory)
        answer = ask("stream", **question)
        assert answer["code"] == 6 and (
            "MB left" in answer["error"] or "GPU's memory" in answer["error"]
        ), answer
        nothing_left(ask)
        ask.close()
    ask = other(machine, memory=most)
    assert "chunks" in ask("stream", **question)
    ask.close()


def test_a_lane_without_room_is_still_a_lane(machine: FakeTensorRTBuild, wan: Bundle) -> None:
    """Where a run had buffers and no room for its activations, the next one of the same shapes
    begins as it should."""
    z = noise((1, 2, 4, 8, 8), 1)
    question = {
        "bundle": str(wan.path),
        "backend": BACKEND,
        "text": as_json(TEXT),
        "noises": [as_json(z)] * 3,
    }
    right = as_json(sample(FakePlanEngine(wan), z, TEXT, Schedule.uniform(2)))["data"]
    seen = set()
    for memory in range(2000, 22_000, 500):
        ask = other(machine, memory=memory)
        answer = ask("samples", **question)
        codes = {
            made.get("code") if isinstance(made, dict) else made == right
            for made in answer.get("made", [{"code": 6}])
        }
        assert codes in ({6}, {True})
        seen |= codes
        nothing_left(ask)
        ask.close()
    assert seen == {6, True}


def test_a_stream_that_found_no_room_is_asked_again(
    machine: FakeTensorRTBuild, far: Bundle
) -> None:
    z, seen = noise((1, 4, 4, 4, 8), 5), set()
    right = streamed(far, z, [1, 2, 1])
    for memory in range(50_000, 350_000, 12_000):
        ask = other(machine, memory=memory)
        answer = ask("streams", **asked(far, z, chunks=[1, 2, 1]))
        made = answer["streams"] == [right]
        assert made or "MB left" in answer["faults"][0], answer
        seen.add(made)
        nothing_left(ask)
        ask.close()
    assert seen == {True, False}


def test_memory_that_runs_out_for_one_sample_is_there_for_the_next(
    machine: FakeTensorRTBuild, wan: Bundle
) -> None:
    small = noise((1, 1, 4, 4, 4), 1)
    large = noise((1, 4, 4, 12, 12), 1)
    ask = other(machine, memory=40_000)
    noises = [as_json(z) for z in (small, large, small)]
    made = ask("samples", bundle=str(wan.path), backend=BACKEND, text=as_json(TEXT), noises=noises)[
        "made"
    ]
    assert (
        made[1]["code"] == 6
        and made[0]
        == made[2]
        == as_json(sample(FakePlanEngine(wan), small, TEXT, Schedule.uniform(2)))["data"]
    )
    ask.close()


@pytest.mark.parametrize("settings", [{"capture_fails": 1}, {"instantiate_fails": 1}])
def test_graphs_that_cannot_be_captured_are_done_without(
    machine: FakeTensorRTBuild, wan: Bundle, settings: dict[str, int]
) -> None:
    ask = other(machine, **settings)
    answer = ask("sample", **asked(wan, schedule={"kind": "uniform", "steps": 12, "shift": 5}))
    assert (
        answer["runs"][0]["latents"]
        == as_json(sample(FakePlanEngine(wan), Z, TEXT, Schedule.uniform(12)))["data"]
    )
    assert nothing_left(ask)["launched"] == 0
    ask.close()


def test_weights_are_streamed(ask: Conformance, machine: FakeTensorRTBuild, tmp_path: Path) -> None:
    """Such a run cannot be captured, and is not."""
    bundle = write_bundle(tmp_path / "b", "bidirectional")
    write_engine(
        bundle,
        machine.version,
        lines={"transition": ["weight_streaming"]},
        settings={"weight_streaming": True},
    )
    before = ask("report")["launched"]
    answer = ask("sample", **asked(bundle, schedule={"kind": "uniform", "steps": 12, "shift": 5}))
    assert (
        answer["runs"][0]["latents"]
        == as_json(sample(FakePlanEngine(bundle), Z, TEXT, Schedule.uniform(12)))["data"]
    )
    assert ask("report")["launched"] == before


@pytest.mark.parametrize("fails", range(1, 9))
def test_a_run_that_tensorrt_refuses(
    ask: Conformance, machine: FakeTensorRTBuild, tmp_path: Path, fails: int
) -> None:
    """In the general context, in a warm-up, in a capture: the error is TensorRT's own, and the next
    sample is right."""
    bundle = write_bundle(tmp_path / "b", "bidirectional")
    write_engine(bundle, machine.version, lines={"transition": [f"fails {fails}"]})
    answer = ask(
        "samples",
        bundle=str(bundle.path),
        backend=BACKEND,
        text=as_json(TEXT),
        steps=8,
        noises=[as_json(Z)] * 3,
    )
    right = as_json(sample(FakePlanEngine(bundle), Z, TEXT, Schedule.uniform(8)))["data"]
    wrong = [made for made in answer["made"] if made != right]
    assert len(wrong) == (0 if fails >= 7 and not RTX else 1), (
        "one that fails while it is captured is done without a graph"
    )
    assert all(made["code"] == 4 and "an illegal memory access" in made["error"] for made in wrong)
    nothing_left(ask)


def test_a_stream_that_tensorrt_refuses(
    ask: Conformance, machine: FakeTensorRTBuild, tmp_path: Path
) -> None:
    for fails in range(1, 8):
        bundle = write_bundle(tmp_path / str(fails), "causal")
        write_engine(bundle, machine.version, lines={"chunk": [f"fails {fails}"]})
        answer = ask(
            "stream", **asked(bundle, noise((1, 3, 4, 4, 4), 5), chunks=[1] * 3, schedule=UNIFORM)
        )
        assert answer["code"] == 4 and "'chunk' could not run" in answer["error"]
        nothing_left(ask)


def test_contexts_that_cannot_be_made(machine: FakeTensorRTBuild, wan: Bundle) -> None:
    for contexts in (0,) if RTX else (0, 1):  # RTX captures in the one that runs all
        ask = other(machine, contexts=contexts)
        answer = ask("sample", **asked(wan, schedule={"kind": "uniform", "steps": 12, "shift": 5}))
        assert (
            answer["code"] == 4
            and "could not make an execution context: there is no memory" in answer["error"]
        )
        nothing_left(ask)
        ask.close()


@pytest.mark.parametrize("at", [1, 2, 4, 6])
def test_a_gpu_that_is_lost(machine: FakeTensorRTBuild, far: Bundle, at: int) -> None:
    """As after a bad address: every call fails from then on. An error each time, and nothing hangs
    or crashes."""
    ask = other(machine, lost_at=at)
    question = asked(far, noise((1, 4, 4, 4, 8), 5), chunks=[1, 2, 1], schedule=UNIFORM)
    for _ in range(2):
        answer = ask("stream", **question)
        assert answer["code"] == 4 and "cudaErrorIllegalAddress" in answer["error"], answer
    ask.close()


@pytest.mark.parametrize(
    ("settings", "more", "words"),
    [
        ({"devices": 0}, {}, "no NVIDIA driver was found on this machine (libcuda.so.1)"),
        ({"devices": 0, "driver": 11040}, {}, "the NVIDIA driver of this machine is for CUDA 11.4"),
        ({"devices": 2}, {"device": 2}, "there is no CUDA device 2: this machine has 2"),
        ({"version": "9.3.0"}, {}, f"and here is {VERSION_KEY} 9.3.0"),
        ({"capability": "8.9"}, {}, "and this is NVIDIA Stand-in (compute capability 8.9)"),
        ({}, {"provider": "cpu"}, "Choose provider 'cuda'"),
    ],
)
def test_machines_that_it_does_not_run_on(
    machine: FakeTensorRTBuild,
    wan: Bundle,
    settings: dict[str, Any],
    more: dict[str, Any],
    words: str,
) -> None:
    ask = other(machine, **settings)
    answer = ask("sample", **asked(wan, **more))
    assert answer["code"] == 4 and words in answer["error"], answer
    nothing_left(ask)
    ask.close()


def test_a_library_of_another_major_release(machine: FakeTensorRTBuild, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", "bidirectional")
    write_engine(bundle, "9.3.0")
    ask = other(machine, version="9.3.0")
    answer = ask("sample", **asked(bundle))
    assert (
        answer["code"] == 4
        and (
            "TensorRT for RTX 9.3.0 is loaded, and this library was compiled for 1.5 or a later 1.x"
            if RTX
            else "could not start its runtime: the program was compiled for another TensorRT"
        )
        in answer["error"]
    )
    ask.close()


def test_the_stand_in_notices(machine: FakeTensorRTBuild) -> None:
    """The rules themselves, each broken by a program of a few lines: a check that never fails
    checks nothing."""
    program = machine.misuse_test
    offences = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    assert len(offences) > 15
    for offence in offences:
        done = subprocess.run([program, offence], capture_output=True, text=True, check=False)
        assert done.returncode and "stand-in: " in done.stderr, (offence, done.stderr[-2000:])
