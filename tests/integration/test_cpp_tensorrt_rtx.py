"""The C++ library against the real TensorRT for RTX, which links no driver and so can be loaded
anywhere: found and linked by CMake, asked for its version, handed a plan that its own builder has
just made. On a machine without a GPU that ends in an error that names the driver, not in a crash.

It takes the wheel of TensorRT for RTX (the dev extra has it where it exists), a C++ compiler and
NVIDIA's headers, which no wheel has: `make test-cpp-tensorrt` fetches them and runs this file. In
`make test` these tests are skipped without headers, or with a driver, and say so. What CMake says
where something is missing is tested everywhere.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.cpp_build import SOURCE, build_targets, configure, find_compiler, find_tool
from tests.fakes.cpp_tensorrt import (
    NO_HEADERS,
    are_of_rtx,
    find_headers,
    header_folders,
    version_of,
    write_bundle,
    write_engine,
)
from tools import tensorrt_headers

SHARED = ("-DANYFLOW_AOTINDUCTOR=OFF", "-DANYFLOW_OPENSSL=OFF")
BUILD_PLAN = """
import sys
import tensorrt_rtx_bindings as trt

logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
latents = network.add_input("latents", trt.float32, (-1, 4))
velocity = network.add_activation(latents, trt.ActivationType.RELU).get_output(0)
velocity.name = "velocity"
network.mark_output(velocity)
config = builder.create_builder_config()
profile = builder.create_optimization_profile()
profile.set_shape("latents", (1, 4), (2, 4), (3, 4))
config.add_optimization_profile(profile)
plan = bytes(builder.build_serialized_network(network, config))
open(sys.argv[1], "wb").write(plan)
print(trt.__version__)
"""


def real_headers() -> tuple[Path, Path]:
    """The folders of headers that fit (of TensorRT for RTX, or of TensorRT 11), and of CUDA's with
    its runtime library beside them."""
    trt, *cuda = find_headers("rtx-1.6", "11.1") or [None]
    if trt is None or not cuda or not list((cuda[0].parent / "lib").glob("libcudart.so.*")):
        pytest.skip(NO_HEADERS.format("TensorRT for RTX with a CUDA runtime beside them"))
    version = version_of(trt)
    if not are_of_rtx(trt) and not version.startswith("11."):
        pytest.skip(
            f"the headers of TensorRT {version} do not fit; those of 11 do, and RTX's own:"
            " make test-cpp-tensorrt fetches both, and runs these tests on each"
        )
    return trt, cuda[0]


@pytest.fixture(scope="module")
def real_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library on the real one: its program `open_engine`."""
    if find_spec("tensorrt_rtx_libs") is None or find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("TensorRT for RTX is not installed: pip install tensorrt-rtx-cu12 (x86-64)")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("this machine has an NVIDIA driver; the tests are about machines without")
    trt, cuda = real_headers()
    find_compiler()
    folder = tmp_path_factory.mktemp("rtx")
    toolkit = folder / "toolkit"
    for place in ("include", "lib64"):
        (toolkit / place).mkdir(parents=True)
    for header in cuda.iterdir():
        (toolkit / "include" / header.name).symlink_to(header)
    runtime = next((cuda.parent / "lib").glob("libcudart.so.*"))
    for name in (runtime.name, "libcudart.so"):
        (toolkit / "lib64" / name).symlink_to(runtime)
    (toolkit / "version.json").write_text('{"cuda": {"version": "12.9.0"}}')
    said = configure(
        folder / "library",
        "-DANYFLOW_TENSORRT_RTX=ON",
        f"-DANYFLOW_TENSORRT_RTX_INCLUDE={trt}",
        f"-DCUDAToolkit_ROOT={toolkit}",
        *SHARED,
        "-DANYFLOW_TESTS=ON",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS_DEBUG=-O0 -Werror",
    )
    assert "TENSORRT_RTX is built" in said and "TENSORRT is switched off" in said
    return build_targets(folder / "library", "open_engine") / "tests" / "open_engine"


@pytest.fixture(scope="module")
def real_plan(real_build: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    """A plan of the real builder, and its version."""
    path = tmp_path_factory.mktemp("plan") / "small.plan"
    words = [sys.executable, "-c", BUILD_PLAN, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return path.read_bytes(), done.stdout.split()[-1]


def open_engines(program: Path, *words: str) -> list[str]:
    """What the program says, line by line: the library first."""
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout.splitlines()


def test_the_real_library_names_the_driver(
    real_build: Path, real_plan: tuple[bytes, str], tmp_path: Path
) -> None:
    """The backend's own code hands it a plan: its refusal comes back as an error of ours. So does
    what it says of a plan that is cut, or is none."""
    plan, version = real_plan
    for name, content in (("whole", plan), ("cut", plan[:1000]), ("text", b"no plan"), ("no", b"")):
        (tmp_path / f"{name}.plan").write_bytes(content)
    paths = [str(tmp_path / f"{name}.plan") for name in ("whole", "cut", "text", "no")]
    first, *answers = open_engines(real_build, "plan", *paths)
    assert first == f"tensorrt-rtx {'.'.join(version.split('.')[:3])}"
    assert len(answers) == 4
    for path, answer in zip(paths, answers, strict=True):
        assert answer.startswith(f"4 TensorRT for RTX {first.split()[1]} cannot open {path}: ")
    assert "the NVIDIA driver of this machine is missing or too old for it" in answers[0]
    assert "cudaError 35" in answers[0] and "Install or update the driver" in answers[0]


def test_a_bundle_is_refused_without_a_driver(
    real_build: Path, real_plan: tuple[bytes, str], tmp_path: Path
) -> None:
    """Through the public header, as an application does it, and with the real CUDA runtime. What
    can be said without a GPU is said without one: an engine of TensorRT is refused as that."""
    plan, version = real_plan
    bundle = write_bundle(tmp_path / "b", "bidirectional")
    mine = {
        "backend": "tensorrt-rtx",
        "versions": {"tensorrt_rtx": version},
        "device": {"kind": "cuda", "name": "any", "compute_capability": None},
    }
    write_engine(bundle, version, "rtx", record=mine, content={"transition": plan})
    theirs = {"backend": "tensorrt", "versions": {"tensorrt": "10.3.0"}}
    write_engine(bundle, "10.3.0", "other", record=theirs)
    answers = open_engines(real_build, "bundle", str(bundle.path), "", "tensorrt-rtx", "tensorrt")
    for answer in answers[1:3]:
        assert answer.startswith(
            "4 no NVIDIA driver was found on this machine (libcuda.so.1), and TensorRT for RTX 1."
        )
    assert answers[3].startswith("4 this library was built without a backend 'tensorrt'")


@pytest.mark.parametrize("need", [real_headers, header_folders])
def test_a_skip_names_the_command_that_runs_it(
    need: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("ANYFLOW_TENSORRT_HEADERS", raising=False)
    monkeypatch.setattr(tensorrt_headers, "CACHE", tmp_path)
    with pytest.raises(pytest.skip.Exception, match=r"no headers of .*make test-cpp-tensorrt"):
        need()


# What CMake says.


def configure_error(folder: Path, *settings: str) -> str:
    """The one error of a configuration that cannot be, its line breaks as spaces."""
    find_compiler()
    tools = (f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}", f"-DANYFLOW_PYTHON={sys.executable}")
    words = [find_tool("cmake"), "-S", SOURCE, "-B", folder, "-G", "Ninja", *tools, *SHARED]
    done = subprocess.run(
        [str(word) for word in (*words, *settings)], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0, done.stdout
    return " ".join(done.stderr.split())


def test_one_library_has_one_of_both(tmp_path: Path) -> None:
    said = configure_error(tmp_path, "-DANYFLOW_TENSORRT=ON", "-DANYFLOW_TENSORRT_RTX=ON")
    assert "one library can have one of them" in said and "Build two libraries" in said


def version_header(**numbers: int) -> str:
    return "".join(f"#define {name} {number} //!< a number\n" for name, number in numbers.items())


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (
            version_header(NV_TENSORRT_MAJOR=10, NV_TENSORRT_MINOR=3, NV_TENSORRT_PATCH=0),
            "are those of TensorRT 10.3, whose interface is another",
        ),
        (
            version_header(TRT_MAJOR_ENTERPRISE=10, TRT_MINOR_ENTERPRISE=16),
            "are those of TensorRT 10.16, whose interface is another",
        ),
        (
            version_header(TRT_MAJOR_RTX=1, TRT_MINOR_RTX=4),
            "are those of TensorRT for RTX 1.4, whose interface is another",
        ),
        (None, "NvInferRuntime.h was not found; the wheel has no headers"),
    ],
)
def test_headers_that_do_not_fit(tmp_path: Path, header: str | None, words: str) -> None:
    """Compiled with them a program crashes at its first call, since the library compares no
    versions; so CMake does. It names all that is missing at once, and where it is to be had."""
    headers = tmp_path / "headers"
    headers.mkdir()
    if header is not None:
        (headers / "NvInferRuntime.h").write_text("")
        (headers / "NvInferVersion.h").write_text(header)
    system = "/usr/local/include;/usr/include;/usr/include/x86_64-linux-gnu"
    said = configure_error(
        tmp_path / "build",
        "-DANYFLOW_TENSORRT_RTX=ON",
        f"-DTensorRT_RTX_ROOT={tmp_path / 'nowhere'}",
        f"-DCMAKE_IGNORE_PATH={system}",
        *([f"-DANYFLOW_TENSORRT_RTX_INCLUDE={headers}"] if header is not None else []),
    )
    assert "TENSORRT_RTX was asked for and cannot be built" in said
    assert words in said and "developer.nvidia.com/tensorrt-rtx" in said
    assert "github.com/NVIDIA/TensorRT" in said
