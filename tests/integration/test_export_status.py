"""The exit status of `anyflow-export` speaks of the bundle: 0 where it is good or cannot be checked
here, 1 where it is wrong."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from anyflow_deploy import BackendError, Bundle, load_bundle, load_engine
from anyflow_deploy.cli import export as command
from anyflow_deploy.cli.export import ExportOptions
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.engines import validation
from anyflow_deploy.errors import UnavailableError
from tests.conftest import SMALL, Export
from tests.json_reference import documented_fields


def check_document(document: dict[str, Any], status: int, bundle: Bundle, said: str) -> None:
    """What --json prints is what was said."""
    assert set(document) == documented_fields("anyflow-export")
    assert (document["bundle"], document["digest"]) == (str(bundle.path), bundle.digest)
    assert document["bytes"] == sum(record.bytes for record in bundle.manifest.files.values())
    check = document["check"]
    if check["passed"] is None:
        assert "not checked" in said and check["command"] in said and check["report"] is None
    else:
        assert (check["passed"], check["reason"]) == (status == 0, None)
        assert Path(check["report"]).is_file()


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Exports the small model with flags; returns the exit status, the bundle and what was said, in
    one line."""

    def export(flags: str) -> tuple[int, Bundle, str]:
        bundle = tmp_path / "bundle"
        words = shlex.split(f"--checkpoint {SMALL} --output {bundle} {flags}")
        status = command.export(parse_options(ExportOptions, [*words, "--json"]))
        captured = capsys.readouterr()
        said = " ".join(captured.err.split())
        written = load_bundle(bundle, verify=True)
        check_document(json.loads(captured.out), status, written, said)
        return status, written, said

    return export


def test_a_precision_that_the_cpu_lacks_is_not_checked(run: Any) -> None:
    status, bundle, said = run("--precision bf16 --target h100")
    assert status == 0 and "not checked (bf16 does not run on this machine's CPU" in said
    assert "".join(f"anyflow-validate {bundle.path} --provider cuda".split()) in "".join(
        said.split()
    )


def test_without_a_runtime_nothing_is_checked(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status, bundle, said = run("")
    assert status == 0 and "not checked (ONNX Runtime cannot be imported" in said
    assert "".join(f"check them with: anyflow-validate {bundle.path}".split()) in "".join(
        said.split()
    )


def bf16_product() -> bytes:
    """A valid graph that the CPU provider has no kernel for."""
    info = onnx.helper.make_tensor_value_info
    kind = onnx.TensorProto.BFLOAT16
    node = onnx.helper.make_node("MatMul", ["a", "a"], ["y"])
    graph = onnx.helper.make_graph(
        [node], "g", [info("a", kind, [2, 2])], [info("y", kind, [2, 2])]
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    return bytes(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()
    )


def test_a_runtime_without_a_kernel_checks_nothing(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime's own answer to such a graph, from whichever graph of the bundle."""
    genuine = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda graph, *a, **k: genuine(bf16_product(), *a, **k)
    )
    status, _, said = run("")
    assert status == 0 and "not checked (ONNX Runtime could not open" in said
    assert "--providercuda" in "".join(said.split())


def test_a_check_that_fails_is_an_error(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        validation.THRESHOLDS, "fp32", validation.Threshold(0.0, 0.0, "nothing is that close")
    )
    status, _, said = run("")
    assert status == 1 and "NOT VALID" in said and "not checked" not in said


def test_numbers_that_are_wrong_are_an_error(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = validation.validate

    def broken(candidate: Any, *rest: Any) -> Any:
        weights = candidate._sessions["transition"]
        run_binding = weights.run_with_iobinding

        def doubled(binding: Any) -> None:
            run_binding(binding)
            (output,) = binding.get_outputs()
            output.update_inplace(np.ascontiguousarray(2 * output.numpy()))

        monkeypatch.setattr(weights, "run_with_iobinding", doubled)
        return genuine(candidate, *rest)

    monkeypatch.setattr(validation, "validate", broken)
    status, _, said = run("")
    assert status == 1 and "NOT VALID" in said


def test_a_graph_that_the_runtime_refuses_is_an_error(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda graph, *a, **k: genuine(b"no graph", *a, **k)
    )
    with pytest.raises(BackendError, match="could not open") as caught:
        run("")
    assert not isinstance(caught.value, UnavailableError)


def test_what_is_unavailable_is_said_by_the_engine(small_bundle: Export) -> None:
    with pytest.raises(UnavailableError, match="no bf16 matrix product") as caught:
        load_engine(small_bundle("bf16", target="h100"))
    assert caught.value.flags == "--provider cuda"
