"""torch-tensorrt as far as it goes without a GPU: every call through a stand-in, whose signatures
the real package has to have where it is installed, and what is refused."""

from __future__ import annotations

import ast
import dataclasses
import importlib.machinery
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from anyflow_deploy import BackendError, load_engine
from anyflow_deploy.bundle.manifest import Quantization
from anyflow_deploy.engines.build import build_engine
from anyflow_deploy.engines.torch_common import device
from anyflow_deploy.engines.torch_tensorrt import build, engine
from anyflow_deploy.engines.torch_tensorrt.build import TorchTensorRTSettings, input_profile
from anyflow_deploy.progress import NullProgress
from tests.conftest import Export

REAL = importlib.util.find_spec("torch_tensorrt")
SOURCE = os.environ.get("ANYFLOW_TORCH_TENSORRT") or (
    Path(REAL.origin).parent if REAL and REAL.origin else None
)
"""The package's folder: of the one installed, or of one that was only unpacked."""


class StandIn(ModuleType):
    """Records calls, and writes a file where a package would be."""

    __version__ = "2.14.0"

    def __init__(self) -> None:
        super().__init__("torch_tensorrt")
        self.__spec__ = importlib.machinery.ModuleSpec("torch_tensorrt", None)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.dynamo = SimpleNamespace(compile=self._compile)

    def Input(self, **how: Any) -> SimpleNamespace:  # noqa: N802 - torch_tensorrt's name
        self.calls.append(("Input", (), how))
        return SimpleNamespace(**how)

    def _compile(self, *args: Any, **how: Any) -> torch.nn.Module:
        self.calls.append(("dynamo.compile", args, how))
        module = torch.nn.Module()
        module.add_module("_run_on_acc_0", torch.nn.Identity())
        return module

    def save(self, *args: Any, **how: Any) -> None:
        self.calls.append(("save", args, how))
        Path(args[1]).write_bytes(b"package")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """torch-tensorrt and a GPU, pretended; tensors stay on the CPU."""
    trt = StandIn()
    monkeypatch.setitem(sys.modules, "torch_tensorrt", trt)
    monkeypatch.setitem(
        sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0", __spec__=trt.__spec__)
    )
    gpu = device.DeviceRecord(kind="cuda", name="NVIDIA One", compute_capability="9.0")
    for module in (build, engine):
        monkeypatch.setattr(
            module, "import_cuda_torch" if module is build else "import_torch", lambda *_: torch
        )
    monkeypatch.setattr(build, "describe_device", lambda *_: gpu)
    monkeypatch.setattr(build, "torch_device", lambda *_: "cpu")
    return trt


def test_a_build_calls_what_it_should(
    stand_in: StandIn, small_bundle: Export, tmp_path: Path
) -> None:
    bundle = small_bundle()
    folder = build_engine(bundle, "torch-tensorrt", TorchTensorRTSettings(), tmp_path / "engine")
    names = [name for name, _, _ in stand_in.calls]
    assert names == ["Input"] * 4 + ["dynamo.compile", "save"]
    assert [how["name"] for _, _, how in stand_in.calls[:4]] == ["latents", "t", "r", "text"]
    (_, (program,), compile_how), (_, (_, path), save_how) = stand_in.calls[4:]
    assert isinstance(program, torch.export.ExportedProgram) and path.endswith("transition.pt2")
    assert (
        save_how["output_format"] == "aot_inductor"
        and len(save_how["dynamic_shapes"]) == len(save_how["arg_inputs"]) == 4
    )
    for given, example in zip(compile_how["arg_inputs"], save_how["arg_inputs"], strict=True):
        shapes = given.min_shape, tuple(example.shape), given.max_shape
        assert all(low <= size <= high for low, size, high in zip(*shapes, strict=True))
    record = folder.record
    assert record.achieved == {"transition": "1 TensorRT engines, 0 pieces left to torch"}
    assert record.versions["TensorRT"] == "11.4.0" and record.versions["torch-tensorrt"] == "2.14.0"
    assert record.ranges["batch"].maximum == 1 and record.profiles["transition"][
        "shapes"
    ].keys() == {"latents", "t", "r", "text"}
    assert (
        list(input_profile(bundle)["latents"][2])
        == record.profiles["transition"]["shapes"]["latents"][2]
    )


def test_a_build_that_fails_leaves_nothing(
    stand_in: StandIn, small_bundle: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("engine build failed")

    monkeypatch.setattr(stand_in, "save", fail)
    with pytest.raises(
        BackendError, match=r"torch-tensorrt cannot build .*\(RuntimeError\): engine build failed"
    ):
        build_engine(
            small_bundle(),
            "torch-tensorrt",
            TorchTensorRTSettings(),
            tmp_path / "engine",
            progress=NullProgress(),
        )
    assert not list(tmp_path.iterdir())


def test_the_real_package_takes_these_calls(
    stand_in: StandIn, small_bundle: Export, tmp_path: Path
) -> None:
    """Read from its source, since importing it needs CUDA."""
    if SOURCE is None:
        pytest.skip("torch-tensorrt is not installed")
    folder = Path(SOURCE)
    build_engine(small_bundle(), "torch-tensorrt", TorchTensorRTSettings(), tmp_path / "engine")
    places = {"dynamo.compile": ("dynamo/_compiler.py", "compile"), "save": ("_compile.py", "save")}
    for name, arguments, how in stand_in.calls[4:]:
        file, function = places[name]
        found = signature_in(folder / file, function)
        found.bind(*arguments, **how)
        assert set(how) <= set(found.parameters), (
            f"{name} would swallow a misspelt option in **kwargs"
        )
    text = (folder / "_Input.py").read_text()
    assert all(f'"{option}"' in text or f"'{option}'" in text for option in stand_in.calls[0][2])
    assert '"aot_inductor"' in (folder / "_compile.py").read_text()


def signature_in(file: Path, function: str) -> inspect.Signature:
    """A function's signature by its source; defaults are left out."""
    tree = ast.parse(file.read_text())
    node = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    kinds, given = inspect.Parameter, node.args
    parameters = [kinds(a.arg, kinds.POSITIONAL_OR_KEYWORD) for a in given.args]
    for index in range(1, len(given.defaults) + 1):
        parameters[-index] = parameters[-index].replace(default=None)
    if given.vararg is not None:
        parameters.append(kinds(given.vararg.arg, kinds.VAR_POSITIONAL))
    parameters += [kinds(a.arg, kinds.KEYWORD_ONLY, default=None) for a in given.kwonlyargs]
    if given.kwarg is not None:
        parameters.append(kinds(given.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters)


def test_what_is_refused(small_bundle: Export) -> None:
    bundle = small_bundle()
    with pytest.raises(
        BackendError,
        match=r"NVIDIA GPUs only; provider is 'cpu'\. Give cuda, or backend aotinductor",
    ):
        build_engine(bundle, "torch-tensorrt", TorchTensorRTSettings(provider="cpu"))
    with pytest.raises(BackendError, match="NVIDIA GPUs only"):
        load_engine(bundle, "torch-tensorrt", "cpu")
    rounding = Quantization(base="fp16", smooth=False, attention="high", weights="")
    for change, message in (
        ({"kind": "causal"}, "is causal, and torch-tensorrt takes no empty cache"),
        (
            {"precision": "fp8", "quantization": rounding},
            "is fp8, and this backend takes fp32, fp16 and bf16",
        ),
    ):
        changed = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update=change))
        with pytest.raises(BackendError, match=message):
            TorchTensorRTSettings().check(changed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the absence of a GPU")
def test_no_gpu(small_bundle: Export) -> None:
    with pytest.raises(BackendError, match="finds no GPU"):
        build_engine(small_bundle(), "torch-tensorrt", TorchTensorRTSettings())


@pytest.mark.skipif(REAL is not None, reason="tests the absence of torch-tensorrt")
def test_missing(small_bundle: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "import_cuda_torch", lambda *_: torch)
    with pytest.raises(
        BackendError,
        match=r"torch-tensorrt cannot be imported .*pip install 'anyflow-deploy\[torch-tensorrt\]'",
    ):
        build_engine(small_bundle(), "torch-tensorrt", TorchTensorRTSettings())
