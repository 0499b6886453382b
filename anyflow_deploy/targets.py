"""The devices a bundle can be made for, one row each.

`--target` names one; the row says which precisions its runtime can execute, so that `--precision bf16 --target cpu` is
refused before any work instead of failing, or silently computing in another type, on the device. Compute capabilities
are NVIDIA's published ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from anyflow_deploy.errors import AnyFlowError, BackendError, suggestion


@dataclass(frozen=True)
class Target:
    """One device, or one family of devices.

    Attributes:
        name: what `--target` takes.
        device: what it is called in a shop.
        compute_capability: NVIDIA's (major, minor); None for the CPU.
        precisions: names from the precision table that it runs.
    """

    name: str
    device: str
    compute_capability: tuple[int, int] | None
    precisions: tuple[str, ...]


_INT8_GPU = ("fp32", "fp16", "bf16", "int8")
_GPU = (*_INT8_GPU, "fp8")

TARGETS = {
    row.name: row
    for row in (
        Target("cpu", "any CPU through ONNX Runtime", None, ("fp32", "fp16", "int8", "fp8")),
        Target("orin", "Jetson AGX Orin", (8, 7), _INT8_GPU),
        Target("thor", "Jetson Thor", (11, 0), _GPU),
        Target("l4", "NVIDIA L4", (8, 9), _GPU),
        Target("rtx4090", "GeForce RTX 4090", (8, 9), _GPU),
        Target("rtx5090", "GeForce RTX 5090", (12, 0), _GPU),
        Target("a100", "NVIDIA A100", (8, 0), _INT8_GPU),
        Target("h100", "NVIDIA H100", (9, 0), _GPU),
        Target("h200", "NVIDIA H200", (9, 0), _GPU),
        Target("b200", "NVIDIA B200", (10, 0), _GPU),
    )
}

CPU_HAS_NO_BF16 = "ONNX Runtime's CPU provider has no bf16 matrix product"


def get_target(name: str) -> Target:
    """The row called `name`.

    Raises:
        AnyFlowError: for an unknown name, with the nearest known one.
    """
    if name not in TARGETS:
        raise AnyFlowError(f"unknown target {name!r}: known are {', '.join(TARGETS)}.{suggestion(name, TARGETS)}")
    return TARGETS[name]


def check_precision(target: Target, precision: str) -> None:
    """Refuse a precision the target cannot run.

    Raises:
        BackendError: with the reason, the precisions it does run, and the targets that run this one.
    """
    if precision in target.precisions:
        return
    able = [row.name for row in TARGETS.values() if precision in row.precisions]
    reason = f" ({CPU_HAS_NO_BF16})" if target.name == "cpu" and precision == "bf16" else ""
    raise BackendError(
        f"{precision} does not run on target {target.name!r}{reason}. "
        f"Choose --precision {' or '.join(target.precisions)}, or a target that runs {precision}: {', '.join(able)}."
    )
