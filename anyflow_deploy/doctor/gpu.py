"""Probe the GPU and its driver: through NVML, nvidia-smi, or cuda-python.

A Jetson has only cuda-python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from anyflow_deploy.doctor.probe import FAULT, MISSING, WORKS, ProbeResult
from anyflow_deploy.doctor.subprocess_probe import run_command, run_python

_NVML = """
import pynvml as nv
text = lambda value: value.decode() if isinstance(value, bytes) else value
nv.nvmlInit()
cuda = nv.nvmlSystemGetCudaDriverVersion()
facts["driver"] = text(nv.nvmlSystemGetDriverVersion())
facts["cuda"] = f"{cuda // 1000}.{cuda % 1000 // 10}"
facts["gpus"] = []
for index in range(nv.nvmlDeviceGetCount()):
    gpu = nv.nvmlDeviceGetHandleByIndex(index)
    memory = nv.nvmlDeviceGetMemoryInfo(gpu)
    capability = list(nv.nvmlDeviceGetCudaComputeCapability(gpu))
    facts["gpus"].append({
        "name": text(nv.nvmlDeviceGetName(gpu)), "compute_capability": capability,
        "total_bytes": int(memory.total), "free_bytes": int(memory.free),
    })
"""

_SMI = (
    "nvidia-smi",
    "--query-gpu=name,compute_cap,memory.total,memory.free,driver_version",
    "--format=csv,noheader,nounits",
)

_CUDA = """
from cuda.bindings import runtime
def value(answer):
    if int(answer[0]):
        raise RuntimeError(f"CUDA says {answer[0].name}")
    return answer[1] if len(answer) == 2 else answer[1:]
cuda = value(runtime.cudaDriverGetVersion()) if hasattr(runtime, "cudaDriverGetVersion") else 0
facts["driver"], facts["cuda"] = "", f"{cuda // 1000}.{cuda % 1000 // 10}"
facts["gpus"] = []
for index in range(value(runtime.cudaGetDeviceCount())):
    gpu = value(runtime.cudaGetDeviceProperties(index))
    value((runtime.cudaSetDevice(index)[0], 0))
    free, total = value(runtime.cudaMemGetInfo())
    facts["gpus"].append({
        "name": gpu.name.decode(), "compute_capability": [gpu.major, gpu.minor],
        "total_bytes": int(total), "free_bytes": int(free),
    })
"""

GpuFacts = dict[str, Any]


def probe_gpu(
    readers: Sequence[Callable[[], GpuFacts | None]] | None = None, root: Path = Path("/")
) -> ProbeResult:
    """Probe all GPUs: compute capability, memory, driver, and the driver's CUDA version."""
    for read in (read_nvml, read_nvidia_smi, read_cuda_python) if readers is None else readers:
        facts = read()
        if facts is not None and facts["gpus"]:
            return ProbeResult(WORKS, _describe_gpus(facts), facts=facts)
    on_bus = [path for path in root.glob("sys/bus/pci/devices/*") if _is_nvidia_gpu(path)]
    if on_bus or (root / "proc/driver/nvidia/version").is_file():
        where = (
            f"an NVIDIA GPU is in the machine ({on_bus[0].name})"
            if on_bus
            else "NVIDIA's kernel module is loaded"
        )
        return ProbeResult(
            FAULT,
            f"{where}, and its driver does not answer",
            "install or repair NVIDIA's driver; then: nvidia-smi",
        )
    return ProbeResult(
        MISSING,
        "no NVIDIA GPU, or none that this container may see",
        "in a container: docker run --gpus all …",
    )


def read_nvml() -> GpuFacts | None:
    """Read the GPUs through nvidia-ml-py; None where it is missing or no driver answers."""
    return run_python(_NVML).facts or None


def read_nvidia_smi() -> GpuFacts | None:
    """Read the GPUs from nvidia-smi; None where it is missing, or on a Jetson.

    On a Jetson it does not know the memory.
    """
    text = run_command(_SMI)
    return None if text is None else facts_from_smi(text, run_command(["nvidia-smi"]) or "")


def facts_from_smi(rows: str, banner: str) -> GpuFacts | None:
    """Parse nvidia-smi's table; None where a cell is missing."""
    gpus, driver = [], ""
    for line in filter(None, map(str.strip, rows.splitlines())):
        cells = [cell.strip() for cell in line.split(",")]
        try:
            name, capability, total, free, driver = cells
            major, minor = map(int, capability.split("."))
            sizes = {"total_bytes": int(total) << 20, "free_bytes": int(free) << 20}
        except ValueError:
            return None
        gpus.append({"name": name, "compute_capability": [major, minor], **sizes})
    _, separator, rest = banner.partition("CUDA Version:")
    return {
        "driver": driver,
        "cuda": rest.split()[0] if separator and rest.split() else "",
        "gpus": gpus,
    }


def read_cuda_python() -> GpuFacts | None:
    """Read the GPUs through cuda-python; None where it is missing or fails."""
    return run_python(_CUDA).facts or None


def _describe_gpus(facts: GpuFacts) -> str:
    gpus = [
        f"{gpu['name']} (compute capability {'.'.join(map(str, gpu['compute_capability']))}, "
        f"{gpu['total_bytes'] / 1e9:.1f} GB, {gpu['free_bytes'] / 1e9:.1f} GB free)"
        for gpu in facts["gpus"]
    ]
    driver = f"driver {facts['driver']}" if facts["driver"] else "driver of unknown version"
    return f"{'; '.join(gpus)}; {driver}, CUDA {facts['cuda'] or 'unknown'}"


def _is_nvidia_gpu(device: Path) -> bool:
    try:
        vendor = (device / "vendor").read_text().strip()
        kind = (device / "class").read_text().strip()
    except OSError:
        return False
    return vendor == "0x10de" and kind.startswith("0x03")
