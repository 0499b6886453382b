"""A precision is complete and consistent once it is made."""

from __future__ import annotations

import pytest

from anyflow_deploy import AnyFlowError
from anyflow_deploy.precision import PrecisionSpec, resolve_precision


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("fp16", None, "cpu"), PrecisionSpec("fp16", "fp16")),
        (("int8", None, "cpu"), PrecisionSpec("int8", "fp32", smooth=True)),
        (("int8", None, "h100", "high", False), PrecisionSpec("int8", "fp16")),
        (("fp8", "bf16", "h100", "fp8"), PrecisionSpec("fp8", "bf16", "fp8")),
    ],
)
def test_what_is_left_open_is_filled_in(given: tuple[str, ...], expected: PrecisionSpec) -> None:
    assert resolve_precision(*given) == expected
    assert expected.quantized == (given[0] in ("int8", "fp8"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("fp9", "fp9"), "unknown precision 'fp9'.*Did you mean 'fp8'"),
        (("fp16", "fp32"), "base is 'fp32', but fp16 is not quantized and has no other"),
        (("int8", "fp8"), "base is 'fp8'; allowed are fp32, fp16, bf16"),
        (("fp8", "fp16", "int8"), "attention is 'int8'; allowed are high and fp8"),
        (
            ("fp16", "fp16", "fp8"),
            "precision fp16 quantizes nothing, so attention fp8 would have no effect",
        ),
        (
            ("int8", "fp16", "fp8"),
            "attention is fp8 at precision int8; it goes with precision fp8 only",
        ),
        (("fp8", "fp16", "high", True), "SmoothQuant is for int8; fp8 is never smoothed"),
    ],
)
def test_what_does_not_go_together_is_refused(given: tuple[str, ...], message: str) -> None:
    with pytest.raises(AnyFlowError, match=message):
        PrecisionSpec(*given)  # type: ignore[arg-type]
