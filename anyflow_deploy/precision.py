"""The precisions that a model can run in; a precision is one value.

`fp32`, `fp16` and `bf16` name the type in which the large matrix products and attention run. Three
things stay float32 in every precision, because they are cheap and everything depends on them: the
border (latents in and out, the Euler step), the residual stream with its norms and modulation, and
the time path (timesteps near 1000 are not representable in bf16). So "fp16" means "the per-token
linear layers, the text projection and attention are fp16".

`int8` and `fp8` multiply the linear layers of the blocks in eight bits; everything that the other
precisions would compute in their type stays in a *base* precision, one of the other three.
docs/how-to/quantization.md explains them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from anyflow_deploy.dtypes import SAFETENSORS
from anyflow_deploy.errors import AnyFlowError, suggestion


@dataclass(frozen=True)
class Precision:
    """One row of the precision table.

    Attributes:
        name: what the user types.
        tensor_type: the name of the type in a safetensors header.
        quantized: whether it is eight bits with scales, over a base precision.
    """

    name: str
    tensor_type: str
    quantized: bool = False

    @property
    def bytes(self) -> int:
        """Bytes per weight."""
        return SAFETENSORS[self.tensor_type].bytes


PRECISIONS = {
    row.name: row
    for row in (
        Precision("fp32", "F32"),
        Precision("fp16", "F16"),
        Precision("bf16", "BF16"),
        Precision("int8", "I8", quantized=True),
        Precision("fp8", "F8_E4M3", quantized=True),
    )
}

EIGHT_BIT = tuple(name for name, row in PRECISIONS.items() if row.quantized)

BASES = tuple(name for name, row in PRECISIONS.items() if not row.quantized)
"""Precisions in which the rest of a quantized model may be computed."""


Attention = Literal["high", "fp8"]
"""Type of the products in attention: the base ("high"), or eight bits."""

ATTENTIONS: tuple[str, ...] = get_args(Attention)


def get_precision(name: str) -> Precision:
    """Return the row of a name.

    Raises:
        AnyFlowError: for an unknown name, with the nearest known one.
    """
    if name not in PRECISIONS:
        raise AnyFlowError(
            f"unknown precision {name!r}: this version exports"
            f" {', '.join(PRECISIONS)}.{suggestion(name, PRECISIONS)}"
        )
    return PRECISIONS[name]


@dataclass(frozen=True)
class PrecisionSpec:
    """How a model is computed; the values are checked when it is made.

    `resolve_precision` fills in what a user left out.

    Attributes:
        precision: row of the table: what the large matrix products run in.
        base: the precision of everything that is not quantized; `precision` where nothing is.
        attention: "high", in the base, or "fp8": also the products in attention, at fp8 only.
        smooth: whether SmoothQuant moves outliers from activations into weights, at int8 only.

    Raises:
        AnyFlowError: an unknown name, or values that do not go together.
    """

    precision: str
    base: str
    attention: Attention = "high"
    smooth: bool = False

    def __post_init__(self) -> None:
        row = get_precision(self.precision)
        if not row.quantized and self.base != self.precision:
            raise AnyFlowError(
                f"base is {self.base!r}, but {self.precision} is not quantized and has no other."
                " Leave --base out."
            )
        if self.base not in BASES:
            near = suggestion(self.base, BASES)
            raise AnyFlowError(f"base is {self.base!r}; allowed are {', '.join(BASES)}.{near}")
        if self.attention not in ATTENTIONS:
            names = " and ".join(ATTENTIONS)
            raise AnyFlowError(f"attention is {self.attention!r}; allowed are {names}.")
        if self.attention == "fp8" and not row.quantized:
            raise AnyFlowError(
                f"precision {self.precision} quantizes nothing, so attention fp8 would have no"
                " effect. Leave it out."
            )
        if self.attention == "fp8" and self.precision != "fp8":
            raise AnyFlowError(
                f"attention is fp8 at precision {self.precision}; it goes with precision fp8 only."
            )
        if self.smooth and self.precision != "int8":
            raise AnyFlowError(f"SmoothQuant is for int8; {self.precision} is never smoothed.")

    @property
    def quantized(self) -> bool:
        """Whether anything is multiplied in eight bits."""
        return get_precision(self.precision).quantized


def resolve_precision(
    precision: str, base: str | None, target: str, attention: str = "high", smooth: bool = True
) -> PrecisionSpec:
    """Fill in what a user left out of a precision.

    Args:
        precision: row of the table.
        base: precision of the rest; None: fp32 for a CPU, which computes it fastest, fp16 for GPUs.
        target: row of the target table.
        attention: "high" or "fp8".
        smooth: whether to use SmoothQuant, at int8.

    Raises:
        AnyFlowError: an unknown name, or values that do not go together.
    """
    if base is None:
        is_quantized = get_precision(precision).quantized
        base = precision if not is_quantized else "fp32" if target == "cpu" else "fp16"
    return PrecisionSpec(
        precision, base, cast(Attention, attention), smooth and precision == "int8"
    )
