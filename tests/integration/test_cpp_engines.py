"""The C++ library with real backends: built, installed and used as docs/how-to/cpp.md says, against
the authors' own results.

The library is built without optimization here, since compiling is what takes the time; the packages
it runs are AOTInductor's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anyflow_deploy import Bundle, Schedule, load_bundle, load_engine, noise, sample, stream
from anyflow_deploy.cli.build import BuildOptions
from anyflow_deploy.cli.generate import GenerateOptions
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.engines.engine_folder import EngineFolder
from anyflow_deploy.engines.metrics import difference
from tests.conftest import CAUSAL, SMALL, Export, causal_golden
from tests.cpp_build import (
    SOURCE,
    Conformance,
    build_targets,
    configure,
    find_compiler,
    find_tool,
    run,
)

FLOAT32 = 1e-5
ROOT = SOURCE.parent.parent
PAGE = (ROOT / "docs" / "how-to" / "cpp.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]
NOT_HERE = ("pip ", "anyflow-", "python ", "make ", "build/examples/stream")
"""What the page has besides CMake: installing, which CI does; our own commands and tools, which
other tests run; and the causal example, which needs an engine that takes minutes to build: see the
slow test."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout, in which the page's commands are run."""
    folder = tmp_path_factory.mktemp("embedded")
    (folder / "engines").symlink_to(ROOT / "engines")
    return folder


def typed(place: Path, command: str) -> str:
    """Run a line of the page; what it said."""
    tools = [
        str(Path(sys.executable).parent),
        str(Path(find_tool("cmake")).parent),
        str(Path(find_tool("ninja")).parent),
        os.environ["PATH"],
    ]
    more = {
        "PATH": os.pathsep.join(tools),
        "CMAKE_BUILD_TYPE": "Debug",
        "CXXFLAGS": "-O0",
        "CMAKE_GENERATOR": "Ninja",
    }
    return run("bash", "-c", command, cwd=place, env={**os.environ, **more}).stdout


@pytest.fixture(scope="module")
def library(place: Path) -> Path:
    """The library, built and installed by the page's own commands; the build's folder."""
    find_compiler()
    elsewhere = ("examples", "RTX")  # the latter: test_cpp_tensorrt_rtx.py
    build = [
        line
        for line in COMMANDS
        if line.startswith("cmake") and not any(word in line for word in elsewhere)
    ]
    said = [typed(place, line) for line in build]
    assert "AOTINDUCTOR is built" in said[0]
    assert (
        "TENSORRT is built" in said[0]
        or "TENSORRT is left out: TensorRT (10.3 or later) or the CUDA toolkit was not found"
        in said[0]
    )
    configure(place / "build" / "cpp", "-DANYFLOW_TESTS=ON")
    return build_targets(place / "build" / "cpp", "conformance")


@pytest.fixture(scope="module")
def examples(library: Path, place: Path) -> Path:
    """The examples, a project of its own that finds the installed package; the build's folder."""
    for line in COMMANDS:
        if line.startswith("cmake") and "examples" in line:
            typed(place, line)
    return place / "build" / "examples"


@pytest.fixture(scope="module")
def ask(library: Path) -> Iterator[Conformance]:
    program = Conformance(library / "tests" / "conformance")
    yield program
    program.close()


@pytest.fixture(scope="module")
def golden_question(small_bundle: Export, build_aotinductor: Any) -> dict[str, Any]:
    bundle = small_bundle()
    return {
        "bundle": str(bundle.path),
        "skip_hashes": True,
        "backend": "aotinductor",
        "engine": str(build_aotinductor(bundle).path),
    }


@pytest.fixture(scope="module")
def oracle() -> dict[str, Any]:
    return load_file(SMALL / "golden.safetensors")


def as_json(array: Any) -> dict[str, Any]:
    return {
        "shape": list(array.shape),
        "data": [float(x) for x in np.asarray(array, np.float32).ravel()],
    }


def apart(values: list[float], expected: Any) -> float:
    return difference(np.asarray(values, np.float32).reshape(expected.shape), expected).relative_l2


@pytest.mark.parametrize("suffix", ["", "_per_frame"])
def test_golden_velocities(
    ask: Conformance, golden_question: dict[str, Any], oracle: dict[str, Any], suffix: str
) -> None:
    t, r = (
        [float(x) for x in oracle[f"{name}{suffix}"].ravel()] for name in ("timestep", "r_timestep")
    )
    answer = ask(
        "velocity",
        **golden_question,
        noise=as_json(oracle["latents"]),
        text=as_json(oracle["text"]),
        t=t,
        r=r,
    )
    assert apart(answer["latents"], oracle[f"velocity{suffix}"]) < FLOAT32


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 13])
def test_golden_samples(
    ask: Conformance, golden_question: dict[str, Any], oracle: dict[str, Any], steps: int
) -> None:
    schedule = {"kind": "uniform", "steps": steps, "shift": 5}
    answer = ask(
        "sample",
        **golden_question,
        noise=as_json(oracle["latents"]),
        text=as_json(oracle["text"]),
        schedule=schedule,
    )
    assert apart(answer["runs"][0]["latents"], oracle[f"sample_{steps}"]) < FLOAT32


def test_the_same_bits_as_pythons_engine(
    ask: Conformance, golden_question: dict[str, Any], small_bundle: Export, build_aotinductor: Any
) -> None:
    """One package, two languages, and a shape that no golden vector has."""
    z = noise((2, 3, 4, 6, 10), 8)
    text = noise((2, 7, 32), 9)
    bundle = small_bundle()
    engine = load_engine(bundle, "aotinductor", engine=build_aotinductor(bundle).path, threads=1)
    answer = ask(
        "sample",
        **golden_question,
        threads=1,
        noise=as_json(z),
        text=as_json(text),
        schedule={"kind": "uniform", "steps": 3, "shift": 5},
    )
    assert (
        answer["runs"][0]["latents"]
        == as_json(sample(engine, z, text, Schedule.uniform(3)))["data"]
    )


def test_threads_share_an_engine(
    ask: Conformance, golden_question: dict[str, Any], small_bundle: Export, build_aotinductor: Any
) -> None:
    text = noise((1, 3, 32), 1)
    shape = (1, 2, 4, 4, 6)
    seeds = [5, 6, 7]
    engine = load_engine(
        small_bundle(), "aotinductor", engine=build_aotinductor(small_bundle()).path
    )
    answer = ask("together", **golden_question, text=as_json(text), shape=shape, seeds=seeds)
    for seed, made in zip(seeds, answer["made"], strict=True):
        assert apart(made, sample(engine, noise(shape, seed), text, Schedule.uniform(4))) < FLOAT32


def test_a_deadline_on_the_real_engine(
    ask: Conformance, golden_question: dict[str, Any], oracle: dict[str, Any]
) -> None:
    """The clock stands still, so there is time for all steps that are allowed."""
    more = {
        "noise": as_json(oracle["latents"]),
        "text": as_json(oracle["text"]),
        "deadline": {"seconds": 1, "most": 4},
    }
    answer = ask("sample", **golden_question, **more)["runs"][0]
    assert (
        answer["outcomes"][0][:2] == [4, True]
        and apart(answer["latents"], oracle["sample_4"]) < FLOAT32
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"engine": "nowhere"}, "there is no engine 'nowhere'"),
        ({"engine": None}, "has no aotinductor engine yet. Make one on this machine"),
        ({"provider": "cuda"}, "runs on the CPU in this library"),
        ({"backend": "onnxruntime"}, "built without a backend 'onnxruntime'"),
    ],
)
def test_what_is_refused(
    ask: Conformance, golden_question: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    answer = ask("description", **{**golden_question, **change})
    assert answer["code"] in (2, 4) and words in answer["error"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"versions": {"torch": "2.12.0", "processor instructions": "x"}}, "was built with "),
        ({"bundle": "0" * 64}, "was built from bundle 000000000000"),
        ({"device": {"kind": "cpu", "name": "sparc64"}}, "was built for sparc64, and this is"),
        ({"backend": "tensorrt"}, "is an engine of backend tensorrt"),
        ({"schema": 2}, "engine schema 2; this version reads 1"),
        ({"seconds": "long"}, "damaged at 'seconds'"),
    ],
)
def test_engines_from_elsewhere(
    ask: Conformance,
    golden_question: dict[str, Any],
    tmp_path: Path,
    change: dict[str, Any],
    words: str,
) -> None:
    folder = Path(shutil.copytree(golden_question["engine"], tmp_path / "engine"))
    record = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps({**record, **change}))
    assert words in ask("description", **{**golden_question, "engine": str(folder)})["error"]


def test_a_package_that_was_changed_is_not_opened(
    ask: Conformance, golden_question: dict[str, Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(golden_question["engine"], tmp_path / "engine"))
    package = folder / "transition.pt2"
    content = bytearray(package.read_bytes())
    content[1000] ^= 1
    package.write_bytes(content)
    assert (
        "was changed: its SHA-256 is"
        in ask("description", **{**golden_question, "engine": str(folder)})["error"]
    )


def small_video(bundle: Bundle, engine: EngineFolder, folder: Path) -> Path:
    """A bundle whose own video is small, with its engine inside."""
    shutil.copytree(bundle.path, folder, ignore=shutil.ignore_patterns("engines"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["video"] |= {"frames": 9, "height": 64, "width": 64, "text_tokens": 8}
    text = json.dumps(manifest)
    (folder / "manifest.json").write_text(text)
    inside = Path(shutil.copytree(engine.path, folder / "engines" / "aotinductor-cpu"))
    record = json.loads((inside / "engine.json").read_text())
    (inside / "engine.json").write_text(
        json.dumps({**record, "bundle": hashlib.sha256(text.encode()).hexdigest()})
    )
    return folder


def test_the_page(
    examples: Path, place: Path, small_bundle: Export, build_aotinductor: Any
) -> None:
    """The commands of docs/how-to/cpp.md that use what its others built."""
    bundle = load_bundle(
        small_video(small_bundle(), build_aotinductor(small_bundle()), place / "my-bundle")
    )
    text = noise((1, 8, 32), 1)
    save_file({"prompt_embeds": text}, place / "fox.safetensors")
    said = {
        line: typed(place, line) for line in COMMANDS if not line.startswith((*NOT_HERE, "cmake"))
    }
    assert len(said) == 4
    z = noise((1, 3, 4, 8, 8), 0)
    engine = load_engine(bundle, "aotinductor")
    for name in ("latents", "minimal"):
        expected = sample(engine, z, text, Schedule.uniform(4))
        assert (
            difference(load_file(place / f"{name}.safetensors")["latents"], expected).relative_l2
            < FLOAT32
        )
    assert np.isfinite(load_file(place / "in-time.safetensors")["latents"]).all()
    outcome = next(s for line, s in said.items() if "--deadline" in line)
    assert re.search(r"\d+ steps in [\d.e-]+ s of 1\.5 s", outcome)
    last = json.loads(next(s for line, s in said.items() if "bench" in line).splitlines()[-1])
    assert (
        last["rounds"] == 20
        and 0 < last["min"] <= last["median"] <= last["max"]
        and last["bundle"] == bundle.digest
    )


def test_only_the_c_interface_is_exported(library: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("there is no nm here (apt install binutils)")
    symbols = run("nm", "-D", "--defined-only", library / "libanyflow.so").stdout.splitlines()
    functions = {line.split()[-1] for line in symbols if " T " in line}
    declared = set(
        re.findall(r"\b(anyflow_\w+)\(", (SOURCE / "include" / "anyflow" / "anyflow.h").read_text())
    ) - {"anyflow_init"}
    assert functions == declared


def test_our_own_commands_on_the_page() -> None:
    """They are run by other tests; here, that they are understood."""
    words = {
        shlex.split(line)[0]: shlex.split(line)[1:]
        for line in COMMANDS
        if line.startswith("anyflow-")
    }
    assert set(words) == {"anyflow-build", "anyflow-generate"}
    parse_options(BuildOptions, words["anyflow-build"])
    parse_options(GenerateOptions, words["anyflow-generate"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: generate"),
        (["my-bundle", "--step", "4"], "--step was not understood"),
        (["my-bundle", "--steps", "many"], "--steps takes numbers"),
        (["nowhere", "--steps", "4"], "nowhere is not a bundle"),
        (
            ["my-bundle", "--steps", "4", "--deadline", "2", "--embeds", "fox.safetensors"],
            "allowed is one of them",
        ),
    ],
)
def test_an_example_says_what_is_wrong(
    examples: Path, place: Path, words: list[str], message: str
) -> None:
    if not (place / "my-bundle").exists():
        pytest.skip("test_the_page makes the bundle that this one reads")
    done = subprocess.run(
        [examples / "generate", *words], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and message in done.stderr


@pytest.mark.slow
def test_causal_streams(
    examples: Path, place: Path, export_once: Export, build_aotinductor: Any
) -> None:
    """The authors' results through the example `stream`, its own noise as Python's, and a
    window."""
    oracle, bundle = causal_golden(), export_once(CAUSAL)
    folder = place / "my-causal"
    shutil.copytree(bundle.path, folder, ignore=shutil.ignore_patterns("engines"))
    shutil.copytree(build_aotinductor(bundle).path, folder / "engines" / "aotinductor-cpu")
    text = oracle["text"]
    save_file({"prompt_embeds": text}, place / "words.safetensors")
    save_file({"latents": oracle["latents"]}, place / "noise.safetensors")
    example = [str(examples / "stream"), "my-causal", "--embeds", "words.safetensors"]
    for steps in (1, 2, 4, 8):
        run(
            *example,
            "--noise",
            "noise.safetensors",
            "--steps",
            steps,
            "--output",
            "made.safetensors",
            cwd=place,
        )
        assert (
            difference(
                load_file(place / "made.safetensors")["latents"], oracle[f"sample_{steps}"]
            ).relative_l2
            < FLOAT32
        )
    save_file({"latents": oracle["context"]}, place / "context.safetensors")
    given = ["--context", "context.safetensors", "--noise", "noise.safetensors", "--steps", 4]
    run(*example, *given, "--output", "made.safetensors", cwd=place)
    assert (
        difference(
            load_file(place / "made.safetensors")["latents"], oracle["sample_from_context_4"]
        ).relative_l2
        < FLOAT32
    )
    frames, rows, columns = 9, 8, 12
    chunks = [2, 1, 2, 1, 2, 1]
    options = [
        "--chunks",
        ",".join(map(str, chunks)),
        "--window",
        1,
        "--latents",
        f"{frames},{rows},{columns}",
        "--seed",
        3,
        "--steps",
        2,
    ]
    said = run(*example, *options, "--output", "window.safetensors", cwd=place).stdout
    assert len(said.splitlines()) == len(chunks)
    engine = load_engine(bundle, "aotinductor", engine=build_aotinductor(bundle).path)
    made = list(
        stream(
            engine,
            noise((1, frames, 4, rows, columns), 3),
            text,
            Schedule.uniform(2),
            chunks,
            window=1,
        )
    )
    whole = np.concatenate([chunk.latents for chunk in made], axis=1)
    assert (
        difference(load_file(place / "window.safetensors")["latents"], whole).relative_l2 < FLOAT32
    )
