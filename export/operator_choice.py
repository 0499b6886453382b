"""Which opset a graph is written in, and whether attention is one operator in it.

Attention can be written in two ways that compute the same: as `Attention`, an operator of ONNX
since opset 23, or as primitive ones (MatMul, Softmax, MatMul). TensorRT's parser turns the first
into its own `IAttention`: one fused kernel, or the build fails. The second has to be recognised as
attention by its compiler, and whether it was is only seen in the built engine. `Attention` is read
from TensorRT 10.14 on, RMSNormalization, which opset 23 has as well, from 10.15 on, and both by
TensorRT for RTX. The backend for ONNX Runtime replaces either by its own kernel; AOTInductor and
torch-tensorrt do not start from ONNX. So the choice is about TensorRT, and about those who open the
file themselves. See docs/explanation/attention.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from anyflow_deploy.errors import AnyFlowError, suggestion
from anyflow_deploy.precision import PrecisionSpec
from anyflow_deploy.targets import get_target

AttentionOp = Literal["attention", "primitive"]
"""`Attention`, or MatMul, Softmax and MatMul."""

ATTENTION_OPS: tuple[str, ...] = ("auto", *get_args(AttentionOp))
"""What a user can ask for."""

PRIMITIVE_OPSET = 20
"""The newest opset that TensorRT 10.3 (JetPack 6) parses: attention and RMS norm are spelled
out."""

FUSED_OPSET = 23
"""Has `Attention` and `RMSNormalization`, which TensorRT reads from 10.14 and 10.15 on."""

OPSETS = (PRIMITIVE_OPSET, FUSED_OPSET)

_NO_KERNEL = "TensorRT has no fused kernel for fp32, and builds Attention with nothing else"
"""Seen with TensorRT for RTX 1.7.1; `tests/integration/test_attention_op.py` tells when it
changes."""

_NO_PLACE = (
    "fp8 attention rounds between its two products, where the operator Attention has no room"
)


@dataclass(frozen=True)
class OperatorChoice:
    """How a graph is written.

    Attributes:
        opset: one of `OPSETS`; RMS norm is one operator in the newer.
        attention_op: how attention is written.
        reason: why that was chosen, in a few words, for the user.
    """

    opset: int
    attention_op: AttentionOp
    reason: str


def choose_operators(
    attention_op: str, opset: int | None, target: str, spec: PrecisionSpec
) -> OperatorChoice:
    """Decide what a user left open.

    Args:
        attention_op: one of `ATTENTION_OPS`. "auto" is "attention" where the opset has it; where
            the opset is open as well, the target decides (`Target.takes_attention`). It is
            "primitive" for FP8 attention, and for fp32 on a GPU.
        opset: one of `OPSETS`, or None: the oldest that has what was chosen.
        target: row of the target table.
        spec: the precision.

    Raises:
        AnyFlowError: an unknown name, or choices that do not go together.
    """
    _check_names(attention_op, opset)
    if attention_op == "attention":
        if spec.attention == "fp8":
            raise AnyFlowError(
                f"attention-op is attention, and {_NO_PLACE}. Choose --attention-op primitive, or"
                " --attention high."
            )
        if opset == PRIMITIVE_OPSET:
            raise AnyFlowError(
                f"attention-op is attention, an operator of opset {FUSED_OPSET}, and opset is"
                f" {opset}. Leave --opset out, or choose --attention-op primitive."
            )
        return OperatorChoice(FUSED_OPSET, "attention", "as asked for")
    if attention_op == "primitive":
        return OperatorChoice(opset or PRIMITIVE_OPSET, "primitive", "as asked for")
    if spec.attention == "fp8":
        return OperatorChoice(opset or PRIMITIVE_OPSET, "primitive", _NO_PLACE)
    if get_target(target).compute_capability is not None and spec.base == "fp32":
        return OperatorChoice(opset or PRIMITIVE_OPSET, "primitive", _NO_KERNEL)
    if opset is not None:
        word: AttentionOp = "attention" if opset == FUSED_OPSET else "primitive"
        return OperatorChoice(opset, word, f"what opset {opset} has")
    if get_target(target).takes_attention:
        return OperatorChoice(FUSED_OPSET, "attention", f"TensorRT for {target} reads it")
    return OperatorChoice(PRIMITIVE_OPSET, "primitive", f"every runtime for {target} reads it")


def _check_names(attention_op: str, opset: int | None) -> None:
    if attention_op not in ATTENTION_OPS:
        raise AnyFlowError(
            f"attention-op is {attention_op!r}; allowed are"
            f" {', '.join(ATTENTION_OPS)}.{suggestion(attention_op, ATTENTION_OPS)}"
        )
    if opset is not None and opset not in OPSETS:
        raise AnyFlowError(f"opset is {opset}; allowed are {' and '.join(map(str, OPSETS))}.")
