"""The table of all probes, in the order in which they are shown."""

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

JETPACK_REMEDY = (
    "JetPack brings it: apt-get install nvidia-jetpack, and python3 -m venv --system-site-packages"
)

JETPACK_CUDA_REMEDY = (
    "a Jetson's GPU answers through cuda-python in the version of its CUDA: pip install"
    " 'anyflow-deploy[jetpack6]', or [jetpack7]"
)

RTX_ON_JETSON_REMEDY = "TensorRT for RTX does not run on a Jetson's GPU; backend tensorrt does"

GPU_ONLY = (ORT_CUDA, TENSORRT, CUDA_PYTHON, TORCH_TENSORRT, TENSORRT_HEADERS, CUDA_HEADERS)
"""Useless without a GPU, so nobody without one is told to install them."""

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


def adjust_remedies(results: ProbeResults) -> dict[str, ProbeResult]:
    """Replace advice that does not help on this machine.

    Where there is no GPU, nothing that only a GPU needs has to be installed; on a Jetson, JetPack
    brings some packages.
    """
    remedies = _machine_remedies(results)
    return {
        name: (dataclasses.replace(result, remedy=remedies[name]) if name in remedies else result)
        for name, result in results.items()
    }


def _machine_remedies(results: ProbeResults) -> dict[str, str]:
    """Return what to do on this kind of machine, by the name of what does not work."""
    if JETSON in results:
        remedies = dict.fromkeys((TENSORRT, TENSORRT_HEADERS, CUDA_HEADERS), JETPACK_REMEDY)
        remedies |= dict.fromkeys((GPU, CUDA_PYTHON), JETPACK_CUDA_REMEDY)
        remedies[TENSORRT_RTX] = RTX_ON_JETSON_REMEDY
        return {
            name: remedy
            for name, remedy in remedies.items()
            if name in results and not results[name].works
        }
    if GPU not in results or results[GPU].state != MISSING:
        return {}
    missing = [name for name in GPU_ONLY if name in results and results[name].state == MISSING]
    remedies = dict.fromkeys(missing, "useful only with an NVIDIA GPU")
    if TENSORRT_RTX in results and results[TENSORRT_RTX].state == MISSING:
        install = results[TENSORRT_RTX].remedy
        remedies[TENSORRT_RTX] = f"to build for GeForce RTX cards here: {install}"
    return remedies
