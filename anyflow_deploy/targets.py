"""The devices a bundle can be made for, one row each.

`--target` names one. A row says which precisions its runtime executes, so that `--precision bf16
--target cpu` is refused before any work instead of failing, or silently computing in another type,
on the device; how much memory it has, so that `anyflow-fit` can say what fits; and how fast it is
on paper, which is what measurements are compared with.

Every number is of one product, named in `device`, and comes from the document named in `source`.
Throughputs are *dense*: data sheets like to print the number with 2:4 sparsity, which is twice as
large and which no AnyFlow model can use. Products of 16-bit and 8-bit floats are counted with
float32 accumulation, as compilers build them; GeForce cards are twice as fast with 16-bit
accumulation, and the data-centre and Jetson rows make no difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from anyflow_deploy.errors import AnyFlowError, BackendError, suggestion

GB = 10**9
"""Bytes of memory as sold. Drivers report 0.5 to 7 per cent more, so this is on the safe side."""


@dataclass(frozen=True)
class Target:
    """One device, in one variant.

    Attributes:
        name: what `--target` takes.
        device: name of the product, and the variant that the numbers are of.
        compute_capability: NVIDIA's (major, minor); None for the CPU.
        precisions: names that its runtime executes, the best first. The export may know fewer.
        memory: bytes, as sold; None where it is a property of the machine (the CPU).
        system_memory: bytes of it that the operating system and driver keep; our estimate, not a
            published number.
        bandwidth: bytes per second between memory and processor; None for the CPU.
        tflops: dense 10^12 operations per second by type; "tf32" is what float32 products may be
            allowed to use.
        tensorrt: versions of TensorRT that run on it, in words; empty where none does.
        source: title of the document the numbers are from.
    """

    name: str
    device: str
    compute_capability: tuple[int, int] | None
    precisions: tuple[str, ...]
    memory: int | None = None
    system_memory: int = 0
    bandwidth: float | None = None
    tflops: Mapping[str, float] = field(default_factory=dict)
    tensorrt: str = ""
    source: str = ""

    @property
    def takes_attention(self) -> bool:
        """Whether ONNX's `Attention` can be counted on: TensorRT reads it from 10.14 on. JetPack
        settles the version of a Jetson, from 10.3 (Orin) and 10.13 (Thor) on; elsewhere a current
        one is a pip install away, and TensorRT for RTX reads it, too."""
        return bool(self.tensorrt) and "JetPack" not in self.tensorrt


_CPU = ("fp32", "fp16", "int8", "fp8")
_AMPERE = ("fp32", "fp16", "bf16", "int8")
"""No FP8: its units came with compute capability 8.9."""
_GPU = ("fp32", "fp16", "bf16", "int8", "fp8")

_DESKTOP, _JETSON = GB, 6 * GB
"""Memory of CUDA and the driver; on a Jetson, Linux is in the same memory, too."""

_SMALL_JETSON = 5 * GB // 2
"""The same on a Jetson with 8 or 16 GB: CUDA, and a Linux without a desktop."""


def _throughputs(
    fp32: float, tf32: float, half: float, int8: float, fp8: float | None = None
) -> dict[str, float]:
    """Return throughputs by type; fp16 and bf16 are equal on all of these devices."""
    rows = {"fp32": fp32, "tf32": tf32, "fp16": half, "bf16": half, "int8": int8}
    return rows if fp8 is None else {**rows, "fp8": fp8}


TARGETS = {
    row.name: row
    for row in (
        # fp8 on a CPU is arithmetic in float32 on values rounded to FP8: right numbers, no speed.
        Target(
            "cpu", "any CPU through ONNX Runtime (fp8 emulated)", None, _CPU, source="this machine"
        ),
        # 5.3 TFLOPS float32 and 170 sparse INT8 TOPS of the GPU, without the DLAs; FP16 is half of
        # INT8, TF32 a quarter.
        Target(
            "orin", "Jetson AGX Orin 64GB", (8, 7), _AMPERE, 64 * GB, _JETSON, 204.8e9,
            _throughputs(5.3, 21.3, 42.5, 85.0),
            "10.3 (JetPack 6.1 and 6.2), from 11.4.1 on JetPack 7.2.2",
            "Jetson AGX Orin Series Technical Brief v1.2",
        ),
        # The same units, half as many: 32 at 918 MHz. (The data sheet's 100 TOPS are sparse, with
        # the DLAs.)
        Target(
            "orin-nx", "Jetson Orin NX 16GB", (8, 7), _AMPERE, 16 * GB, _SMALL_JETSON, 102.4e9,
            _throughputs(1.9, 7.5, 15.0, 30.1),
            "10.3 (JetPack 6.1 and 6.2), from 11.4.1 on JetPack 7.2.2",
            "Jetson Orin NX Series Modules Data Sheet",
        ),
        # 32 at 1020 MHz, in its MAXN_SUPER mode (JetPack 6.2); without it 625 MHz and 68 GB/s.
        Target(
            "orin-nano", "Jetson Orin Nano Super 8GB", (8, 7), _AMPERE, 8 * GB, _SMALL_JETSON,
            102.4e9, _throughputs(2.1, 8.4, 16.7, 33.4),
            "10.3 (JetPack 6.1 and 6.2), from 11.4.1 on JetPack 7.2.2",
            "Jetson Orin Nano Super Developer Kit Datasheet",
        ),
        # 1035 dense FP4 TFLOPS at 1.57 GHz; each wider type is half as fast. Float32: 2560 cores,
        # two operations a clock.
        Target(
            "thor", "Jetson AGX Thor (T5000) 128GB", (11, 0), _GPU, 128 * GB, _JETSON, 273e9,
            _throughputs(8.0, 129.0, 258.0, 517.0, 517.0),
            "10.13 and later 10.x (JetPack 7), from 11.4.1 on JetPack 7.2.2",
            "Jetson Thor Series Modules Data Sheet",
        ),
        Target(
            "l4", "NVIDIA L4 24GB", (8, 9), _GPU, 24 * GB, _DESKTOP, 300e9,
            _throughputs(30.3, 60.0, 121.0, 242.5, 242.5), "10.3 to 11",
            "NVIDIA L4 Tensor Core GPU Datasheet",
        ),
        Target(
            "rtx3090", "GeForce RTX 3090 24GB", (8, 6), _AMPERE, 24 * GB, _DESKTOP, 936e9,
            _throughputs(35.6, 35.6, 71.0, 284.0), "10.3 to 11",
            "NVIDIA Ampere GA102 GPU Architecture v2.0, appendix A",
        ),
        # 28 of that chip's units at 1.78 GHz: 12.7 TFLOPS float32, by the card's product page; the
        # other types in the proportions of the RTX 3090.
        Target(
            "rtx3060", "GeForce RTX 3060 12GB", (8, 6), _AMPERE, 12 * GB, _DESKTOP, 360e9,
            _throughputs(12.7, 12.7, 25.5, 101.9), "10.3 to 11",
            "GeForce RTX 3060 specifications, with the rates per unit of the GA102 document",
        ),
        # 46 of the RTX 4090's units at 2.475 GHz; the types in its proportions.
        Target(
            "rtx4070", "GeForce RTX 4070 12GB", (8, 9), _GPU, 12 * GB, _DESKTOP, 504e9,
            _throughputs(29.1, 29.1, 58.3, 233.2, 116.6), "10.3 to 11",
            "GeForce RTX 4070 specifications, with the rates per unit of the Ada document",
        ),
        Target(
            "rtx4090", "GeForce RTX 4090 24GB", (8, 9), _GPU, 24 * GB, _DESKTOP, 1008e9,
            _throughputs(82.6, 82.6, 165.2, 660.6, 330.3), "10.3 to 11",
            "NVIDIA Ada GPU Architecture v2.01, appendix A",
        ),
        Target(
            "rtx5090", "GeForce RTX 5090 32GB", (12, 0), _GPU, 32 * GB, _DESKTOP, 1792e9,
            _throughputs(104.8, 104.8, 209.5, 838.0, 419.0), "10.8 to 11",
            "NVIDIA RTX Blackwell GPU Architecture, appendix A",
        ),
        # 48 of the RTX 5090's units at 2.512 GHz; the types in its proportions.
        Target(
            "rtx5070", "GeForce RTX 5070 12GB", (12, 0), _GPU, 12 * GB, _DESKTOP, 672e9,
            _throughputs(30.9, 30.9, 61.7, 246.9, 123.5), "10.8 to 11",
            "GeForce RTX 5070 specifications, with the rates per unit of the Blackwell document",
        ),
        # 31 TFLOPS float32 and 1000 sparse FP4; each wider type is half as fast. Whether float32
        # accumulation halves that again, as on GeForce cards, is not published. The memory is the
        # processor's, as on a Jetson.
        Target(
            "gb10", "NVIDIA GB10 (DGX Spark) 128GB", (12, 1), _GPU, 128 * GB, _JETSON, 273e9,
            _throughputs(31.0, 62.0, 125.0, 250.0, 250.0), "10.13 to 11",
            "NVIDIA DGX Spark hardware overview, and its GB10 talk at Hot Chips 2025",
        ),
        Target(
            "a100", "NVIDIA A100 SXM 80GB", (8, 0), _AMPERE, 80 * GB, _DESKTOP, 2039e9,
            _throughputs(19.5, 156.0, 312.0, 624.0), "10.3 to 11",
            "NVIDIA A100 Tensor Core GPU Datasheet",
        ),
        Target(
            "h100", "NVIDIA H100 SXM 80GB", (9, 0), _GPU, 80 * GB, _DESKTOP, 3350e9,
            _throughputs(67.0, 494.7, 989.4, 1978.9, 1978.9), "10.3 to 11",
            "NVIDIA H100 Tensor Core GPU Datasheet",
        ),
        Target(
            "h200", "NVIDIA H200 SXM 141GB", (9, 0), _GPU, 141 * GB, _DESKTOP, 4800e9,
            _throughputs(67.0, 494.7, 989.4, 1978.9, 1978.9), "10.3 to 11",
            "NVIDIA H200 Tensor Core GPU Datasheet",
        ),
        # The chip carries 192 GB; the HGX and DGX systems that are sold give 180 of it.
        Target(
            "b200", "NVIDIA B200 (HGX, 1000 W) 180GB", (10, 0), _GPU, 180 * GB, _DESKTOP, 8000e9,
            _throughputs(80.0, 1100.0, 2250.0, 4500.0, 4500.0), "10.8 to 11",
            "NVIDIA Blackwell Architecture Technical Brief",
        ),
    )
}  # fmt: skip

CPU_HAS_NO_BF16 = "ONNX Runtime's CPU provider has no bf16 matrix product"

_NO_FP8 = "its tensor cores have no FP8; INT8 takes the same memory and runs"


def get_target(name: str) -> Target:
    """Return the row of a name.

    Raises:
        AnyFlowError: for an unknown name, with the nearest known one.
    """
    if name not in TARGETS:
        raise AnyFlowError(
            f"unknown target {name!r}: known are {', '.join(TARGETS)}.{suggestion(name, TARGETS)}"
        )
    return TARGETS[name]


def check_precision(target: Target, precision: str) -> None:
    """Refuse a precision the target cannot run.

    Raises:
        BackendError: with the reason, the precisions it does run, and the targets that run this
            one.
    """
    if precision in target.precisions:
        return
    names = [row.name for row in TARGETS.values() if precision in row.precisions]
    choices = ["int8"] if precision == "fp8" else list(target.precisions)
    raise BackendError(
        f"{precision} does not run on target {target.name!r}{_reason(target, precision)}. Choose"
        f" --precision {' or '.join(choices)}, or a target that runs {precision}:"
        f" {', '.join(names) or 'none does'}."
    )


def _reason(target: Target, precision: str) -> str:
    """Return the reason in brackets, where there is a short one."""
    if target.name == "cpu" and precision == "bf16":
        return f" ({CPU_HAS_NO_BF16})"
    return f" ({target.device}: {_NO_FP8})" if precision == "fp8" else ""
