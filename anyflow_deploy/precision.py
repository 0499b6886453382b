"""Precision is one value.

`fp32`, `fp16` and `bf16` name the type in which the large matrix products and attention run. Three things stay float32
in every precision, because they are cheap and everything depends on them: the border (latents in and out, the Euler
step), the residual stream with its norms and modulation, and the time path (timesteps near 1000 are not representable
in bf16). So "fp16" means "the per-token linear layers, the text projection and attention are fp16".
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
    """

    name: str
    tensor_type: str
    bytes: int


PRECISIONS = {
    row.name: row
    for row in (
        Precision("fp32", "F32", 4),
        Precision("fp16", "F16", 2),
        Precision("bf16", "BF16", 2),
    )
}


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
