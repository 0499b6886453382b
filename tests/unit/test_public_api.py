"""The public interface: what `anyflow_deploy` exports, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import anyflow_deploy

PROMISED = {
    "AdaptiveSteps",
    "AnyFlowError",
    "Deadline",
    "MODELS",
    "Schedule",
    "TARGETS",
    "VideoPipeline",
    "build_engine",
    "export_bundle",
    "load_bundle",
    "load_engine",
    "noise",
    "sample",
    "stream",
    "validate",
}
HEAVY = ("av", "diffusers", "numpy", "onnxruntime", "pydantic", "torch", "transformers")


@pytest.mark.parametrize("name", sorted(anyflow_deploy.__all__))
def test_every_name_is_there_and_documented(name: str) -> None:
    value = getattr(anyflow_deploy, name)
    assert name in dir(anyflow_deploy)
    assert name.isupper() or value.__doc__


def test_the_promised_names_are_public() -> None:
    assert set(anyflow_deploy.__all__) >= PROMISED
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = anyflow_deploy.nothing


def test_the_errors_are_all_public() -> None:
    from anyflow_deploy import errors

    defined = {name for name in vars(errors) if name.endswith("Error")}
    assert defined <= set(anyflow_deploy.__all__)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, anyflow_deploy; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_pipeline_class_needs_neither_torch_nor_a_runtime() -> None:
    heavy = ("av", "diffusers", "onnxruntime", "torch", "transformers")
    code = (
        "import sys; from anyflow_deploy import VideoPipeline, load_engine, sample; "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
