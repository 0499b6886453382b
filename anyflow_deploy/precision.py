"""Precision is one value.

`fp32`, `fp16` and `bf16` name the type in which the large matrix products and attention run. Three things stay float32
in every precision, because they are cheap and everything depends on them: the border (latents in and out, the Euler
step), the residual stream with its norms and modulation, and the time path (timesteps near 1000 are not representable
in bf16). So "fp16" means "the per-token linear layers, the text projection and attention are fp16".

`int8` and `fp8` multiply the linear layers of the blocks in eight bits; everything that the other precisions would
compute in their type stays in a *base* precision, one of the other three. See docs/how-to/quantization.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from anyflow_deploy.errors import AnyFlowError, suggestion


@dataclass(frozen=True)
class Precision:
    """One row of the precision table.

    Attributes:
        name: what the user types.
        tensor_type: the name of the type in a safetensors header.
        bytes: bytes per weight.
        quantized: eight bits with scales, over a base precision.
    """

    name: str
    tensor_type: str
    bytes: int
    quantized: bool = False


PRECISIONS = {
    row.name: row
    for row in (
        Precision("fp32", "F32", 4),
        Precision("fp16", "F16", 2),
        Precision("bf16", "BF16", 2),
        Precision("int8", "I8", 1, quantized=True),
        Precision("fp8", "F8_E4M3", 1, quantized=True),
    )
}

EIGHT_BIT = tuple(name for name, row in PRECISIONS.items() if row.quantized)

BASES = tuple(name for name, row in PRECISIONS.items() if not row.quantized)
"""What the rest of a quantized model may be computed in."""


def get_precision(name: str) -> Precision:
    """The row called `name`.

    Raises:
        AnyFlowError: for an unknown name, with the nearest known one.
    """
    if name not in PRECISIONS:
        raise AnyFlowError(
            f"unknown precision {name!r}: this version exports {', '.join(PRECISIONS)}.{suggestion(name, PRECISIONS)}"
        )
    return PRECISIONS[name]


def base_precision(precision: str, base: str | None, target: str) -> str:
    """The precision of everything that is not quantized: what tracing needs to know.

    Args:
        precision: row of the table.
        base: what the user asked for; None: fp32 for a CPU, which computes it fastest, fp16 for GPUs.
        target: row of the target table.

    Raises:
        AnyFlowError: an unknown base, or one for a precision that needs none.
    """
    if not get_precision(precision).quantized:
        if base not in (None, precision):
            raise AnyFlowError(f"base is {base!r}, but {precision} is not quantized and has no other. Leave --base out.")
        return precision
    if base is None:
        return "fp32" if target == "cpu" else "fp16"
    if base not in BASES:
        raise AnyFlowError(f"base is {base!r}; allowed are {', '.join(BASES)}.{suggestion(base, BASES)}")
    return base
