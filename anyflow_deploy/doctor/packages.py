"""The packages that compute: what is installed, and whether it can be imported and does a small piece of work."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable

from anyflow_deploy.doctor.probe import FAULT, MISSING, WORKS, Finding
from anyflow_deploy.doctor.subprocess_probe import asked, imported

CPU, GPU = "pip install 'anyflow-deploy[cpu]'", "pip install 'anyflow-deploy[gpu]'"
EXPORT, TENSORRT = "pip install 'anyflow-deploy[export]'", "pip install 'anyflow-deploy[tensorrt]'"

_NUMPY = """
import numpy
assert float((numpy.eye(3) @ numpy.ones(3)).sum()) == 3
found["detail"] = numpy.__version__
"""

_ORT = """
import onnxruntime
from onnx import TensorProto, helper
value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])
graph = helper.make_graph([helper.make_node("Add", ["a", "a"], ["b"])], "probe", [value("a")], [value("b")])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()
def running(provider):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=[provider], enable_fallback=0)
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"{provider} did not start: the CUDA or cuDNN it was built for is not there")
    import numpy
    assert session.run(None, {"a": numpy.ones(1, numpy.float32)})[0][0] == 2
"""

_ORT_CPU = f"""{_ORT}
running("CPUExecutionProvider")
found["providers"] = onnxruntime.get_available_providers()
names = [name.removesuffix("ExecutionProvider") for name in found["providers"]]
found["detail"] = f"{{onnxruntime.__version__}}, providers {{' '.join(names)}}"
"""

_ORT_CUDA = f"""{_ORT}
if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
    found["detail"] = ""
else:
    running("CUDAExecutionProvider")
    found["detail"] = f"{{onnxruntime.__version__}}, runs on the GPU"
"""

_INT8 = """
import numpy, onnxruntime
from anyflow_deploy.engines.onnxruntime.int8 import is_exact
for weights in ("int8", "uint8"):
    found[weights] = is_exact(onnxruntime, getattr(numpy, weights))
"""

_TORCH = """
import torch
assert float((torch.eye(3) @ torch.ones(3)).sum()) == 3
found["cuda_build"], found["cuda"] = torch.version.cuda, torch.cuda.is_available()
build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
found["detail"] = f"{torch.__version__}, {build}"
if found["cuda"]:
    major, minor = torch.cuda.get_device_capability()
    assert float((torch.eye(3, device="cuda") @ torch.ones(3, device="cuda")).sum()) == 3
    found["detail"] += ", runs on the GPU"
elif torch.version.cuda:
    found["detail"] += ", sees no GPU"
"""

_TENSORRT = """
import tensorrt
found["version"] = tensorrt.__version__
builder = tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.ERROR))
if not builder:
    raise RuntimeError(f"{tensorrt.__version__} can be imported, and gives no builder: no GPU, or a driver too old for it")
found["detail"] = f"{tensorrt.__version__}, gives a builder"
"""

_CUDA_PYTHON = """
import importlib.metadata
from cuda.bindings import runtime
found["detail"] = importlib.metadata.version("cuda-bindings")
status, count = runtime.cudaGetDeviceCount()
found["gpus"] = 0 if int(status) else int(count)
found["detail"] += f", sees {found['gpus']} GPUs"
"""


def numpy() -> Finding:
    """numpy multiplies."""
    return imported("numpy", _NUMPY, "pip install numpy")


def onnxruntime(providers: Iterable[str] | None = None) -> Finding:
    """ONNX Runtime runs a graph on the CPU; and only one of the packages that install it is there."""
    names = installed_as("onnxruntime") if providers is None else sorted(providers)
    if len(names) > 1:
        both, keep = " and ".join(names), GPU if "onnxruntime-gpu" in names else CPU
        remedy = f"pip uninstall -y {' '.join(names)} && {keep}"
        return Finding(FAULT, f"{both} are both installed, and each overwrote files of the other", remedy)
    found = imported("onnxruntime", _ORT_CPU, GPU if "onnxruntime-gpu" in names else CPU)
    return Finding(found.state, f"{found.detail} ({names[0]})", found.remedy, found.facts) if names and found.works else found


def onnxruntime_cuda() -> Finding:
    """ONNX Runtime's CUDA provider runs a graph on the GPU."""
    remedy = "pip uninstall -y onnxruntime && pip install 'anyflow-deploy[gpu]' 'onnxruntime-gpu[cuda,cudnn]'"
    found = imported("onnxruntime", _ORT_CUDA, GPU)
    if found.state == FAULT:
        return Finding(FAULT, found.detail, "pip install 'onnxruntime-gpu[cuda,cudnn]'")
    if not found.works or not found.detail:
        return Finding(MISSING, found.detail or "this ONNX Runtime was built without CUDA", remedy)
    return found


def int8_on_cpu() -> Finding:
    """Whether products of 8 bits are exact, and with which weights; see engines/onnxruntime/int8.py."""
    answer = asked(_INT8)
    return Finding(FAULT, answer.error, CPU) if answer.error else int8_finding(**answer.found)


def int8_finding(int8: bool, uint8: bool) -> Finding:
    """Say what the processor's products mean for int8 bundles.

    Args:
        int8: whether uint8 x int8 is exact.
        uint8: whether uint8 x uint8 is.
    """
    if int8:
        return Finding(WORKS, "a sum of 64 products came out exact")
    if uint8:
        return Finding(WORKS, "exact with unsigned weights, which the engine uses here (u8 x s8 overflows: no VNNI)")
    return Finding(FAULT, "its products overflow, with unsigned weights too", "use fp32 or fp16 on this processor")


def torch() -> Finding:
    """PyTorch multiplies, on the GPU too where it can."""
    return imported("torch", _TORCH, EXPORT)


def tensorrt() -> Finding:
    """TensorRT loads and gives a builder."""
    return imported("tensorrt", _TENSORRT, TENSORRT)


def cuda_python() -> Finding:
    """cuda-python's bindings load."""
    return imported("cuda", _CUDA_PYTHON, "pip install cuda-python")


def torch_tensorrt() -> Finding:
    """torch-tensorrt loads."""
    return imported(
        "torch_tensorrt",
        "import torch_tensorrt\nfound['detail'] = torch_tensorrt.__version__",
        "pip install torch-tensorrt (on a machine with a GPU, in the version of your torch)",
    )


def modelopt() -> Finding:
    """ModelOpt loads."""
    code = "import modelopt, modelopt.torch.quantization\nfound['detail'] = modelopt.__version__"
    return imported("modelopt", code, "pip install 'anyflow-deploy[quantize]'")


def export_packages() -> Finding:
    """What `[export]` brings is installed; only looked up, not imported."""
    names = extra("export")
    missing = [name for name in names if _version(name) is None]
    if missing or not names:
        return Finding(MISSING, f"not installed: {', '.join(missing) or 'anyflow-deploy itself'}", EXPORT)
    shown = ("diffusers", "transformers", "onnxscript", "av")
    return Finding(WORKS, ", ".join(f"{name} {_version(name)}" for name in shown))


def extra(name: str) -> list[str]:
    """The packages that an extra of anyflow-deploy names."""
    try:
        rows = importlib.metadata.requires("anyflow-deploy") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = [row for row in rows if re.search(rf"extra == ['\"]{name}['\"]", row)]
    return [re.split(r"[ ><=!~;\[]", row, maxsplit=1)[0] for row in found]


def installed_as(module: str) -> list[str]:
    """Names of the installed packages that bring a module, such as onnxruntime and onnxruntime-gpu."""
    owners = importlib.metadata.packages_distributions().get(module, [])
    return sorted({name.lower().replace("_", "-") for name in owners})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
