"""The rule table against a real parser and builder of NVIDIA's: TensorRT for RTX, where its wheel
exists.

Every model of `tests/lint_cases.py` is parsed and, where the parser takes it, built for compute
capability 12.0. Where the library takes what a rule refuses, `TAKEN` says so;
docs/reference/lint.md tells why.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto as T

from anyflow_deploy import BackendError, Bundle
from anyflow_deploy.cli.inspect_bundle import InspectOptions, inspect
from anyflow_deploy.engines.tensorrt.lint import real_parser
from tests.lint_cases import CASES, GOOD

RTX = pytest.importorskip(
    "tensorrt_rtx", reason="TensorRT for RTX is not installed (it is for Linux on x86-64)"
)

TAKEN = {
    "type: quantized product",
    "uint8",
    "double",
    "opset",
    "opset of tomorrow",
    "old opset",
    "computed slice axes",
    "squeeze",
    "loop",
    "unnamed axis",
    "no zero point",
    "computed scale",
    "no axis",
    "channels of activations",
    "odd INT4",
}
"""Models that a rule refuses for every version it knows, or the newest, and that RTX builds."""

OLD_ONLY = {
    "too new: Attention",
    "too new: RMSNormalization",
    "type: FP8 constant",
    "attention: three axes",
    "computed bias",
    "FP4",
}
"""Models that only old versions refuse."""

REFUSED_ALL_THE_SAME = {
    "type: FP8 constant",
    "too new: Attention",
    "too new: RotaryEmbedding",
    "GOOD attention",
}
"""Models that the newest table takes and RTX does not."""


class Messages(RTX.ILogger):  # type: ignore[name-defined, misc]
    """Keeps quiet."""

    def __init__(self) -> None:
        RTX.ILogger.__init__(self)

    def log(self, severity: Any, msg: str) -> None:
        """Take a message."""


@pytest.fixture(scope="module")
def builder() -> Any:
    return RTX.Builder(Messages())


def with_typed_outputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """The parser wants the type of every output; the cases leave it to ONNX."""
    typed = onnx.ModelProto()
    typed.CopyFrom(model)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    for output, known in zip(typed.graph.output, inferred.graph.output, strict=True):
        element = known.type.tensor_type.elem_type
        output.type.tensor_type.elem_type = element or T.FLOAT
    return typed


def is_taken(builder: Any, model: onnx.ModelProto, folder: Path) -> bool:
    """Whether a model is parsed and built for 12.0."""
    path = folder / "model.onnx"
    path.write_bytes(with_typed_outputs(model).SerializeToString())
    flag = 1 << int(RTX.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flag)
    parser = RTX.OnnxParser(network, Messages())
    if not parser.parse_from_file(str(path)):
        return False
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(RTX.ComputeCapability.SM120, 0)
    profile = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        shape = [4 if length < 0 else length for length in tensor.shape]
        if tensor.is_shape_tensor:
            values = [1] * max(1, *shape) if shape else [1]
            profile.set_shape_input(tensor.name, values, values, values)
        if -1 in tensor.shape:
            profile.set_shape(tensor.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config) is not None


@pytest.mark.parametrize("name", CASES)
def test_a_rule_and_the_real_parser_agree(name: str, builder: Any, tmp_path: Path) -> None:
    refused_by_rule = name not in TAKEN | OLD_ONLY or name in REFUSED_ALL_THE_SAME
    assert is_taken(builder, CASES[name].model, tmp_path) is not refused_by_rule


@pytest.mark.parametrize("name", GOOD)
def test_the_real_parser_takes_good_models(name: str, builder: Any, tmp_path: Path) -> None:
    taken = f"GOOD {name}" not in REFUSED_ALL_THE_SAME
    assert is_taken(builder, GOOD[name], tmp_path) is taken


def test_the_lint_asks_the_installed_parser(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(InspectOptions(bundle=tiny_bundle.path, lint=True)) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"the parser of TensorRT for RTX {RTX.__version__} accepts" in text


def test_the_parser_answers_in_its_own_words(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    path = folder / "transition.onnx"
    model = onnx.load(str(path), load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "Gemm").op_type = "Unique"
    path.write_bytes(model.SerializeToString())
    answer = real_parser.parse_graphs([path], "tensorrt-rtx")
    assert answer.problems[0].operator == "Unique" and answer.problems[0].node


def test_a_parser_that_crashes_is_an_error(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_parser, "_PROGRAM", "faulthandler._sigsegv")
    with pytest.raises(BackendError, match="the parser of TensorRT for RTX could not be asked"):
        real_parser.parse_graphs([tiny_bundle.path / "transition.onnx"], "tensorrt-rtx")
