"""All that is looked at: one row each, in the order it is shown."""

from __future__ import annotations

import dataclasses

from anyflow_deploy.doctor import compiler, cpp, gpu, machine, packages
from anyflow_deploy.doctor.probe import MISSING, Probe, ProbeResult, ProbeResults

PYTHON = "Python"
NUMPY = "numpy"
ORT = "ONNX Runtime"
ORT_CUDA = "ONNX Runtime on CUDA"
INT8 = "int8 on the CPU"
TORCH = "PyTorch"
GPU = "GPU"
TENSORRT = "TensorRT"
TENSORRT_RTX = "TensorRT for RTX"
CUDA_PYTHON = "cuda-python"
TORCH_TENSORRT = "torch-tensorrt"
COMPILER, LIBRARY = "C++ compiler", "C++ library"
CUDA_HEADERS = "CUDA headers"
TENSORRT_HEADERS = "TensorRT headers"
JETSON = "Jetson"

OF_JETPACK = (
    "JetPack brings it: apt-get install nvidia-jetpack, and python3 -m venv --system-site-packages"
)

CUDA_OF_JETPACK = (
    "a Jetson's GPU answers through cuda-python in the version of its CUDA: pip install"
    " 'anyflow-deploy[jetpack6]', or [jetpack7]"
)

NOT_OF_JETSON = "TensorRT for RTX does not run on a Jetson's GPU; backend tensorrt does"

FOR_A_GPU = (ORT_CUDA, TENSORRT, CUDA_PYTHON, TORCH_TENSORRT, TENSORRT_HEADERS, CUDA_HEADERS)
"""Useless without one, so nobody is told to install them there."""

PROBES = (
    Probe(PYTHON, machine.probe_python),
    Probe("processor", machine.probe_processor),
    Probe("memory", machine.probe_memory),
    Probe("disk", machine.probe_disk),
    Probe(JETSON, machine.probe_jetson),
    Probe(GPU, gpu.probe_gpu),
    Probe(NUMPY, packages.probe_numpy),
    Probe(ORT, packages.probe_onnxruntime),
    Probe(ORT_CUDA, packages.probe_onnxruntime_cuda),
    Probe(INT8, packages.probe_int8_on_cpu),
    Probe(TORCH, packages.probe_torch),
    Probe("export packages", packages.probe_export_packages),
    Probe("ModelOpt", packages.probe_modelopt),
    Probe(TENSORRT, packages.probe_tensorrt),
    Probe(TENSORRT_RTX, packages.probe_tensorrt_rtx),
    Probe(CUDA_PYTHON, packages.probe_cuda_python),
    Probe(TORCH_TENSORRT, packages.probe_torch_tensorrt),
    Probe(COMPILER, compiler.probe_compiler),
    Probe(LIBRARY, cpp.probe_library),
    Probe("AOTInductor headers", cpp.probe_torch_headers),
    Probe(TENSORRT_HEADERS, cpp.probe_tensorrt_headers),
    Probe(CUDA_HEADERS, cpp.probe_cuda_headers),
)


def adjust_remedies(found: ProbeResults) -> dict[str, ProbeResult]:
    """The same findings, without advice to install what only a GPU needs where there is none, or
    what JetPack brings."""
    if JETSON in found:
        ways = dict.fromkeys((TENSORRT, TENSORRT_HEADERS, CUDA_HEADERS), OF_JETPACK)
        ways |= dict.fromkeys((GPU, CUDA_PYTHON), CUDA_OF_JETPACK)
        ways[TENSORRT_RTX] = NOT_OF_JETSON
        return {
            name: (
                dataclasses.replace(finding, remedy=ways[name])
                if name in ways and not finding.works
                else finding
            )
            for name, finding in found.items()
        }
    if GPU not in found or found[GPU].state != MISSING:
        return dict(found)
    useless = {name for name in FOR_A_GPU if name in found and found[name].state == MISSING}
    ways = dict.fromkeys(useless, "only of use with an NVIDIA GPU")
    if TENSORRT_RTX in found and found[TENSORRT_RTX].state == MISSING:
        ways[TENSORRT_RTX] = f"to build for GeForce RTX cards here: {found[TENSORRT_RTX].remedy}"
    return {
        name: dataclasses.replace(finding, remedy=ways[name]) if name in ways else finding
        for name, finding in found.items()
    }
