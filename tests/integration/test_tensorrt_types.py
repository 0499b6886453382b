"""Our calls of TensorRT and TensorRT for RTX, held by mypy against the real bindings of four
releases; and the stand-in, which is made of them.

The stubs are made once and kept in .cache (tools/tensorrt_stubs.py): that needs the package index,
gcc and pybind11-stubgen.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from anyflow_deploy import BackendError
from tests.fakes.tensorrt import (
    ALL_RELEASES,
    RTX,
    RTX_MODULES,
    TENSORRT_MODULES,
    FakeTensorRT,
    stubs_or_skip,
)
from tools import tensorrt_stubs

ROOT = Path(__file__).parents[2]
ENGINES = ROOT / "anyflow_deploy" / "engines"

CONFIG = """
[mypy]
strict = true
explicit_package_bases = true
follow_imports = silent
disable_error_code = unused-ignore
[mypy-tensorrt.*]
ignore_errors = true
[mypy-cuda.*,onnx.*,onnxruntime.*,safetensors.*]
ignore_missing_imports = true
"""

WRONG = """
from anyflow_deploy.engines.tensorrt.api import trt
def wrong(
    engine: trt.ICudaEngine, config: trt.IBuilderConfig, context: trt.IExecutionContext
) -> None:
    trt.Bilder  # in none
    config.set_flag(trt.BuilderFlag.FP16)  # gone in 11
    engine.device_memory_size  # gone in 11
    engine.get_aliased_input_tensor("x")  # not yet in 10.3
    context.set_tensor_address("x", "y")  # in none
    config.progress_monitor = 3  # in none
"""
WRONG_IN = {"11.4": ("in none", "gone in 11"), "10.3": ("in none", "not yet in 10.3")}
WRONG_IN[RTX] = WRONG_IN["11.4"]


@pytest.mark.parametrize("release", ALL_RELEASES)
def test_our_calls_exist_in_every_release(release: str, tmp_path: Path) -> None:
    """Strictly, and with a file that is wrong, so that a check that sees nothing would be seen.

    What both libraries run is held against all; what only one has, against that.
    """
    stubs = stubs_or_skip(release)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    wrong = tmp_path / "wrong.py"
    wrong.write_text(WRONG)
    files = [ENGINES / "tensorrt" / f"{name.replace('.', '/')}.py" for name in TENSORRT_MODULES]
    if release == RTX:
        files = [file for file in files if file.stem != "builder_config"]
        files += [ENGINES / "tensorrt_rtx" / f"{name}.py" for name in RTX_MODULES]
    # one cache for all releases: only what sees tensorrt is read again
    kept = [
        "--cache-dir",
        str(ROOT / ".cache" / "mypy-tensorrt"),
        "--config-file",
        str(tmp_path / "mypy.ini"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *kept, "--no-error-summary", *map(str, files), str(wrong)],
        env={**os.environ, "MYPYPATH": f"{stubs}:{ROOT}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    ours = [line for line in errors if "wrong.py" not in line]
    assert not ours and not done.stderr, "\n".join([*ours, done.stderr])
    lines = {int(found[1]) for line in errors if (found := re.search(r"wrong\.py:(\d+):", line))}
    marks = WRONG_IN.get(release, ("in none",))
    expected = {i for i, line in enumerate(WRONG.split("\n"), 1) if line.endswith(marks)}
    assert lines == expected


@pytest.mark.parametrize(
    ("package", "checked"),
    [("tensorrt", {*TENSORRT_MODULES} - {"api", "cuda"}), ("tensorrt_rtx", {*RTX_MODULES})],
)
def test_every_module_that_calls_tensorrt_is_checked(package: str, checked: set[str]) -> None:
    ours = (
        r"^from anyflow_deploy\.engines\.tensorrt\.(api|cuda|engine|execution|plan|profiler|run) "
    )
    folder = ENGINES / package
    callers = {
        ".".join(path.relative_to(folder).with_suffix("").parts)
        for path in folder.rglob("*.py")
        if re.search(ours, path.read_text(), re.M)
    }
    assert callers == checked


@pytest.mark.parametrize("fake_tensorrt", ALL_RELEASES, indirect=True)
def test_the_stand_in_has_what_the_release_has(fake_tensorrt: FakeTensorRT) -> None:
    trt = fake_tensorrt.trt
    eleven = fake_tensorrt.release in ("11.4", RTX)
    assert hasattr(trt.BuilderFlag, "FP16") is not eleven
    assert hasattr(trt.ICudaEngine, "device_memory_size") is not eleven
    assert hasattr(trt.ICudaEngine, "get_engine_stat") is (fake_tensorrt.release != "10.3")
    for name in ("Bilder", "IAlgorithm" if eleven else "IRuntimeConfig2"):
        with pytest.raises(AttributeError):
            getattr(trt, name)
    builder = trt.Builder(trt.Logger())
    with pytest.raises(TypeError, match="incompatible function arguments"):
        builder.create_network(1, 2)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        builder.create_network(flag=1)
    with pytest.raises(AttributeError, match="cannot|can be set"):
        builder.max_workspace_size = 1
    with pytest.raises(TypeError, match="No constructor defined"):
        trt.ICudaEngine()


def test_a_subclass_that_forgets_its_base_is_found(fake_tensorrt: FakeTensorRT) -> None:
    class Forgetful(fake_tensorrt.trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match="must be called when overriding"):
        fake_tensorrt.trt.Builder(Forgetful())


@pytest.mark.parametrize("missing", ["tensorrt", "cuda.bindings"])
def test_what_is_missing_says_how_to_install_it(
    fake_tensorrt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        BackendError, match=r"cannot be imported .*pip install 'anyflow-deploy\[tensorrt\]'"
    ):
        import anyflow_deploy.engines.tensorrt.engine  # noqa: F401


def test_stubs_that_cannot_be_made_say_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_stubs, "CACHE", tmp_path)
    monkeypatch.setitem(tensorrt_stubs.RELEASES, "0.1", ("anyflow-deploy-no-such-package", "0.1"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(tensorrt_stubs.StubsError, match="needs the package index"):
        tensorrt_stubs.stubs("0.1")
    assert not list(tmp_path.iterdir())


def test_what_the_cleaner_mends() -> None:
    head = 'class A:\n    """Text."""\n    x: bool\n'
    source = (
        head
        + '    def f(self, in: int = 1, b: ...) -> bool:\n        """\n        More.\n        """\n'
    )
    cleaned = tensorrt_stubs.clean_stubs(source)
    assert "x: builtins.bool" in cleaned
    assert "def f(self, in_: int=..., b: typing.Any=...) -> builtins.bool:" in cleaned
    assert "Text" not in cleaned and "More" not in cleaned
    with pytest.raises(tensorrt_stubs.StubsError, match="wrote a line that is not Python"):
        tensorrt_stubs.clean_stubs("class :")
