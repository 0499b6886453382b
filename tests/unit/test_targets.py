"""The table of devices: complete, dense, and honest about what does not run."""

from __future__ import annotations

import shlex

import pytest

from anyflow_deploy.cli.fit import FitOptions
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.errors import AnyFlowError, BackendError
from anyflow_deploy.memory.estimate import FIT_PRECISIONS
from anyflow_deploy.precision import PRECISIONS
from anyflow_deploy.targets import TARGETS, Target, check_precision, get_target

GPUS = [row for row in TARGETS.values() if row.compute_capability is not None]


@pytest.mark.parametrize("row", GPUS, ids=lambda row: row.name)
def test_every_gpu_has_all_its_numbers(row: Target) -> None:
    assert row.memory is not None and row.bandwidth is not None
    assert 0 < row.system_memory < row.memory < 200e9
    assert f"{row.memory // 10**9}GB" in row.device
    assert row.source and row.tensorrt
    assert set(row.precisions) | {"tf32"} == set(row.tflops)


@pytest.mark.parametrize("row", GPUS, ids=lambda row: row.name)
def test_throughput_is_dense_and_grows_as_types_shrink(row: Target) -> None:
    t = row.tflops
    assert t["fp32"] <= t["tf32"] < t["fp16"] == t["bf16"] < t["int8"]
    assert t["tf32"] / t["fp16"] == pytest.approx(0.5, rel=0.03)
    assert 1.9 < t.get("fp8", 2 * t["fp16"]) / t["fp16"] < 2.1


def test_eight_bit_floats_came_with_compute_capability_8_9() -> None:
    for row in GPUS:
        assert row.compute_capability is not None
        assert ("fp8" in row.precisions) == (row.compute_capability >= (8, 9))
        assert "int8" in row.precisions


def test_every_known_precision_runs_somewhere() -> None:
    assert {name for row in TARGETS.values() for name in row.precisions} == set(FIT_PRECISIONS)
    assert set(PRECISIONS) <= set(FIT_PRECISIONS)


@pytest.mark.parametrize("name", ["orin", "a100"])
def test_fp8_is_refused_with_int8_offered(name: str) -> None:
    with pytest.raises(
        BackendError,
        match=(
            rf"^fp8 does not run on target '{name}' .*no FP8.*Choose --precision int8, or a target"
        ),
    ):
        check_precision(get_target(name), "fp8")


def test_fp8_on_orin_is_refused_on_the_command_line() -> None:
    with pytest.raises(
        AnyFlowError, match="Choose --precision int8, or a target that runs fp8: cpu, thor, l4,"
    ):
        parse_options(FitOptions, shlex.split("--model 14b --precision fp8 --target orin"))


def test_bf16_on_the_cpu_is_refused_with_the_reason() -> None:
    with pytest.raises(
        BackendError,
        match=r"\(ONNX Runtime's CPU provider has no bf16 matrix product\).*fp32 or fp16",
    ):
        check_precision(get_target("cpu"), "bf16")


@pytest.mark.parametrize("row", TARGETS.values(), ids=lambda row: row.name)
def test_what_a_target_runs_is_not_refused(row: Target) -> None:
    for precision in row.precisions:
        check_precision(row, precision)


def test_an_unknown_target_is_answered_with_the_nearest() -> None:
    with pytest.raises(AnyFlowError, match="Did you mean 'orin'"):
        get_target("orinn")
