"""Probe the packages that compute: import each one and let it do a small piece of work."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable

from anyflow_deploy.doctor.probe import FAULT, MISSING, WORKS, ProbeResult
from anyflow_deploy.doctor.subprocess_probe import probe_import, run_python
from anyflow_deploy.engines.registry import BACKENDS

CPU, GPU = (BACKENDS["onnxruntime"].install_command(provider) for provider in ("cpu", "cuda"))
TENSORRT = BACKENDS["tensorrt"].install_command("cuda")
TENSORRT_RTX = BACKENDS["tensorrt-rtx"].install_command("cuda")
EXPORT = "pip install 'anyflow-deploy[export]'"

_NUMPY = """
import numpy
assert float((numpy.eye(3) @ numpy.ones(3)).sum()) == 3
facts["detail"] = numpy.__version__
"""

_ORT = """
import onnxruntime
from onnx import TensorProto, helper
value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])
add = helper.make_node("Add", ["a", "a"], ["b"])
graph = helper.make_graph([add], "probe", [value("a")], [value("b")])
opset = helper.make_opsetid("", 20)
model = helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()
def run_on(provider):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=[provider], enable_fallback=0)
    if session.get_providers()[0] != provider:
        raise RuntimeError(
            f"{provider} did not start: the CUDA or cuDNN it was built for is not there"
        )
    import numpy
    assert session.run(None, {"a": numpy.ones(1, numpy.float32)})[0][0] == 2
"""

_ORT_CPU = f"""{_ORT}
run_on("CPUExecutionProvider")
facts["providers"] = onnxruntime.get_available_providers()
names = [name.removesuffix("ExecutionProvider") for name in facts["providers"]]
facts["detail"] = f"{{onnxruntime.__version__}}, providers {{' '.join(names)}}"
"""

_ORT_CUDA = f"""{_ORT}
if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
    facts["detail"] = ""
else:
    run_on("CUDAExecutionProvider")
    facts["detail"] = f"{{onnxruntime.__version__}}, runs on the GPU"
"""

_INT8 = """
import numpy, onnxruntime
from anyflow_deploy.engines.onnxruntime.int8 import is_exact
for weights in ("int8", "uint8"):
    facts[weights] = is_exact(onnxruntime, getattr(numpy, weights))
"""

_TORCH = """
import torch
assert float((torch.eye(3) @ torch.ones(3)).sum()) == 3
facts["cuda_build"], facts["cuda"] = torch.version.cuda, torch.cuda.is_available()
build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
facts["detail"] = f"{torch.__version__}, {build}"
if facts["cuda"]:
    major, minor = torch.cuda.get_device_capability()
    assert float((torch.eye(3, device="cuda") @ torch.ones(3, device="cuda")).sum()) == 3
    facts["detail"] += ", runs on the GPU"
elif torch.version.cuda:
    facts["detail"] += ", sees no GPU"
"""

_TENSORRT = """
import tensorrt
facts["version"] = tensorrt.__version__
builder = tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.ERROR))
if not builder:
    raise RuntimeError(
        f"{tensorrt.__version__} can be imported, but cannot make a builder:"
        " no GPU, or a driver too old for it"
    )
facts["detail"] = f"{tensorrt.__version__}, makes a builder"
"""

_TENSORRT_RTX = """
import tensorrt_rtx
facts["version"] = tensorrt_rtx.__version__
if not tensorrt_rtx.Builder(tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)):
    raise RuntimeError(f"{tensorrt_rtx.__version__} can be imported, and gives no builder")
facts["detail"] = f"{tensorrt_rtx.__version__}, gives a builder (builds need no GPU)"
"""

_CUDA_PYTHON = """
import importlib.metadata
from cuda.bindings import runtime
facts["detail"] = importlib.metadata.version("cuda-bindings")
status, count = runtime.cudaGetDeviceCount()
facts["gpus"] = 0 if int(status) else int(count)
facts["detail"] += f", sees {facts['gpus']} GPUs"
"""


def probe_numpy() -> ProbeResult:
    """Probe numpy: multiply matrices."""
    return probe_import("numpy", _NUMPY, "pip install numpy")


def probe_onnxruntime(providers: Iterable[str] | None = None) -> ProbeResult:
    """Probe ONNX Runtime: run a graph on the CPU.

    Only one of the packages that install it may be there.
    """
    names = distributions_of("onnxruntime") if providers is None else sorted(providers)
    if len(names) > 1:
        both = " and ".join(names)
        keep = GPU if "onnxruntime-gpu" in names else CPU
        remedy = f"pip uninstall -y {' '.join(names)} && {keep}"
        return ProbeResult(
            FAULT, f"{both} are both installed, and each overwrote files of the other", remedy
        )
    result = probe_import("onnxruntime", _ORT_CPU, GPU if "onnxruntime-gpu" in names else CPU)
    return (
        ProbeResult(result.state, f"{result.detail} ({names[0]})", result.remedy, result.facts)
        if names and result.works
        else result
    )


def probe_onnxruntime_cuda() -> ProbeResult:
    """Probe ONNX Runtime's CUDA provider: run a graph on the GPU."""
    remedy = (
        "pip uninstall -y onnxruntime && pip install 'anyflow-deploy[gpu]'"
        " 'onnxruntime-gpu[cuda,cudnn]'"
    )
    result = probe_import("onnxruntime", _ORT_CUDA, GPU)
    if result.state == FAULT:
        return ProbeResult(FAULT, result.detail, "pip install 'onnxruntime-gpu[cuda,cudnn]'")
    if not result.works or not result.detail:
        return ProbeResult(
            MISSING, result.detail or "this ONNX Runtime was built without CUDA", remedy
        )
    return result


def probe_int8_on_cpu() -> ProbeResult:
    """Probe whether 8-bit products are exact, and with which weights.

    `engines/onnxruntime/int8.py` explains why they may not be.
    """
    answer = run_python(_INT8)
    return ProbeResult(FAULT, answer.error, CPU) if answer.error else judge_int8(**answer.facts)


def judge_int8(int8: bool, uint8: bool) -> ProbeResult:
    """Judge what the processor's products mean for int8 bundles.

    Args:
        int8: whether uint8 x int8 is exact.
        uint8: whether uint8 x uint8 is.
    """
    if int8:
        return ProbeResult(WORKS, "a sum of 64 products came out exact")
    if uint8:
        return ProbeResult(
            WORKS,
            "exact with unsigned weights, which the engine uses here (u8 x s8 overflows: no VNNI)",
        )
    return ProbeResult(
        FAULT,
        "its products overflow, with unsigned weights too",
        "use fp32 or fp16 on this processor",
    )


def probe_torch() -> ProbeResult:
    """Probe PyTorch: multiply matrices, on the GPU too if it can."""
    return probe_import("torch", _TORCH, EXPORT)


def probe_tensorrt() -> ProbeResult:
    """Probe TensorRT: import it and make a builder."""
    return probe_import("tensorrt", _TENSORRT, TENSORRT)


def probe_tensorrt_rtx() -> ProbeResult:
    """TensorRT for RTX loads and gives a builder, on a machine without a GPU, too."""
    return probe_import("tensorrt_rtx", _TENSORRT_RTX, TENSORRT_RTX)


def probe_cuda_python() -> ProbeResult:
    """Probe cuda-python: import its bindings and count GPUs."""
    return probe_import("cuda", _CUDA_PYTHON, "pip install cuda-python")


def probe_torch_tensorrt() -> ProbeResult:
    """Probe torch-tensorrt: import it."""
    return probe_import(
        "torch_tensorrt",
        "import torch_tensorrt\nfacts['detail'] = torch_tensorrt.__version__",
        "pip install torch-tensorrt (on a machine with a GPU, in the version of your torch)",
    )


def probe_modelopt() -> ProbeResult:
    """Probe ModelOpt: import it."""
    code = "import modelopt, modelopt.torch.quantization\nfacts['detail'] = modelopt.__version__"
    return probe_import("modelopt", code, "pip install 'anyflow-deploy[quantize]'")


def probe_export_packages() -> ProbeResult:
    """Probe whether the packages of `[export]` are installed, without importing them."""
    names = packages_of_extra("export")
    missing = [name for name in names if _version(name) is None]
    if missing or not names:
        return ProbeResult(
            MISSING, f"not installed: {', '.join(missing) or 'anyflow-deploy itself'}", EXPORT
        )
    main_packages = ("diffusers", "transformers", "onnxscript", "av")
    return ProbeResult(WORKS, ", ".join(f"{name} {_version(name)}" for name in main_packages))


def packages_of_extra(name: str) -> list[str]:
    """Return the packages that an extra of anyflow-deploy names."""
    try:
        rows = importlib.metadata.requires("anyflow-deploy") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    requirements = [row for row in rows if re.search(rf"extra == ['\"]{name}['\"]", row)]
    return [re.split(r"[ ><=!~;\[]", row, maxsplit=1)[0] for row in requirements]


def distributions_of(module: str) -> list[str]:
    """Return the installed packages that have a module, in alphabetical order.

    onnxruntime and onnxruntime-gpu have the same one.
    """
    owners = importlib.metadata.packages_distributions().get(module, [])
    return sorted({name.lower().replace("_", "-") for name in owners})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
