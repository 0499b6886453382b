"""Where a compiled torch package runs: the device, the versions, and the processor's instructions.

The only backends of `engines/` that use torch are those whose runtime it is, and they import it
here, when an engine is loaded. A package is native code: made for one kind of GPU, for one release
of torch, and (since compilers are told to use all that the processor has) for its instructions. All
three are recorded by the builder and compared before anything is loaded: an instruction that the
processor lacks ends the process without a message.
"""

from __future__ import annotations

import hashlib
import platform
import re
from pathlib import Path
from typing import Any

from anyflow_deploy.engines.engine_folder import DeviceRecord
from anyflow_deploy.engines.registry import BACKENDS
from anyflow_deploy.errors import BackendError

_INSTRUCTIONS = re.compile(
    r"sse|ssse|pni$|avx|fma$|f16c$|bmi|abm$|popcnt$|movbe$|gfni$|vaes$|vpclmul|amx|adx$|clwb$|cldemote$|"
    r"asimd|sve|sme|fp16|fphp|bf16|i8mm|atomics$|dcpop$|fcma$|jscvt$|lrcpc"
)
"""Names in /proc/cpuinfo of instructions that a compiler may use. The kernel lists many other
flags, which change with its version."""

INSTALL_COMMAND = BACKENDS["aotinductor"].install_command("cpu")


def import_torch(provider: str, index: int) -> Any:
    """Import torch, and check that it has the device.

    Raises:
        BackendError: torch is missing, or has no such device.
    """
    try:
        import torch
    except ImportError as error:
        raise BackendError(
            f"PyTorch cannot be imported ({error}); it is this backend's runtime. Run:"
            f" {INSTALL_COMMAND}"
        ) from None
    if provider == "cuda":
        if not torch.cuda.is_available():
            build = (
                f"was built for CUDA {torch.version.cuda}"
                if torch.version.cuda
                else "was built without CUDA"
            )
            raise BackendError(
                f"provider is 'cuda', and PyTorch {torch.__version__} finds no GPU (it {build}). "
                "Install the driver and a PyTorch with CUDA, or use provider 'cpu'."
            )
        if index >= torch.cuda.device_count():
            raise BackendError(
                f"device is {index}; this machine has {torch.cuda.device_count()} GPUs, counted"
                " from 0."
            )
    return torch


def torch_device(provider: str, index: int) -> str:
    """Return torch's name of the device."""
    return f"cuda:{index}" if provider == "cuda" else "cpu"


def describe_device(torch: Any, provider: str, index: int) -> DeviceRecord:
    """Return the record of this machine's device, for engine.json."""
    if provider == "cuda":
        major, minor = torch.cuda.get_device_capability(index)
        return DeviceRecord(
            kind="cuda",
            name=torch.cuda.get_device_name(index),
            compute_capability=f"{major}.{minor}",
        )
    return DeviceRecord(kind="cpu", name=platform.machine())


def runtime_versions(torch: Any, provider: str) -> dict[str, str]:
    """Return the versions that have to be the same when a package is loaded.

    The GPU's packages hold code for the processor, too.
    """
    versions = {
        "torch": str(torch.__version__),
        "processor instructions": instruction_sets(torch.backends.cpu.get_cpu_capability()),
    }
    return {**versions, "CUDA": str(torch.version.cuda)} if provider == "cuda" else versions


def instruction_sets(level: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's instruction sets as one string.

    It holds torch's name of the widest, how many there are, and their hash.

    Args:
        level: as torch calls it: "AVX512", "AVX2", "DEFAULT", …
        cpuinfo: the kernel's list. Where there is none (not Linux), the processor's name is hashed.
    """
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    flags = next(
        (line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))),
        [],
    )
    relevant_flags = sorted(flag for flag in flags if _INSTRUCTIONS.match(flag)) or [
        platform.processor() or platform.machine()
    ]
    digest = hashlib.sha256(" ".join(relevant_flags).encode()).hexdigest()
    return f"{level} ({len(relevant_flags)}, {digest[:8]})"
