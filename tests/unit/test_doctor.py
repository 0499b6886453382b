"""anyflow-doctor on machines that are not there: broken installs, other GPUs, Jetsons; and on this
one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from anyflow_deploy import AnyFlowError
from anyflow_deploy.cli.doctor import doctor
from anyflow_deploy.cli.doctor_options import DoctorOptions
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.doctor import compiler, cpp, gpu, machine, packages, probes, subprocess_probe
from anyflow_deploy.doctor.backends import (
    PRECISIONS,
    REQUIREMENTS,
    check_requirement,
    judge_backends,
)
from anyflow_deploy.doctor.probe import FAULT, MISSING, WORKS, Probe, ProbeResult, run_probes
from anyflow_deploy.doctor.report import format_plain, report_json, report_rows
from anyflow_deploy.engines import registry

ROOT = Path(__file__).parents[2]
BROKEN = {
    "raises": (
        "raise ImportError('libfake.so.1: cannot open shared object file')",
        "ImportError: libfake.so.1",
    ),
    "crashes": ("import ctypes; ctypes.string_at(0)", "crashed (SIGSEGV)"),
    "kills": ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "crashed (SIGILL)"),
    "leaves": ("import os; os._exit(3)", "ended with status 3"),
    "exits": ("raise SystemExit(0)", "SystemExit: 0"),
    "hangs": ("import time; time.sleep(600)", "gave no answer within 1 s"),
    "depends": ("import a_module_nobody_has", "No module named 'a_module_nobody_has'"),
}


def works(detail: str = "", **facts: object) -> ProbeResult:
    return ProbeResult(WORKS, detail, facts=facts)


def of_gpu(*capability: int) -> ProbeResult:
    return works(
        "a GPU",
        gpus=[
            {"name": "x", "compute_capability": list(capability), "total_bytes": 1, "free_bytes": 1}
        ],
    )


def healthy(**changes: ProbeResult) -> dict[str, ProbeResult]:
    found = {probe.name: works() for probe in probes.PROBES if probe.name != probes.JETSON}
    return {**found, probes.GPU: of_gpu(9, 0), probes.TORCH: works(cuda=True), **changes}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a module where children find it before the real one."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")

    def install(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)

    return install


# Children and probes


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_package_is_a_fault_of_its_own(
    installed: Callable[[str, str], None], kind: str
) -> None:
    installed("fragile", BROKEN[kind][0])
    limit = 1 if kind == "hangs" else 60  # a busy machine may need seconds to start a process
    code = "import fragile\nfound['detail'] = 'fine'"
    found = subprocess_probe.probe_import("fragile", code, "pip install fragile", timeout=limit)
    assert found.state == FAULT and BROKEN[kind][1] in found.detail
    assert found.remedy == "pip install --force-reinstall fragile"


def test_a_package_that_is_not_there_is_missing() -> None:
    found = subprocess_probe.probe_import(
        "nobody_has_this", "import nobody_has_this", "pip install it"
    )
    assert found == ProbeResult(MISSING, "no module nobody_has_this", "pip install it")


def test_what_a_package_prints_or_breaks_at_the_end_does_not_matter(
    installed: Callable[[str, str], None],
) -> None:
    installed(
        "noisy", "import atexit, os\nprint('{\"error\": 1}')\natexit.register(lambda: os.abort())"
    )
    assert subprocess_probe.probe_import(
        "noisy", "import noisy\nfound.update(detail='1.0', n=2)", ""
    ) == works("1.0", n=2)


def test_no_file_in_the_working_folder_is_taken_for_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fragile.py").write_text("raise RuntimeError")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert (
        subprocess_probe.probe_import("fragile", "import fragile", "pip install it").state
        == MISSING
    )


def test_a_probe_that_fails_is_a_fault_and_the_others_go_on() -> None:
    def fails() -> ProbeResult:
        raise PermissionError("/proc is closed")

    found = run_probes(
        [Probe("a", fails), Probe("none", lambda: None), Probe("b", lambda: works("fine"))]
    )
    assert found == {
        "a": ProbeResult(FAULT, "could not be looked at: PermissionError: /proc is closed"),
        "b": works("fine"),
    }


def test_a_program_that_is_not_there_tells_nothing() -> None:
    assert subprocess_probe.run_command(["no-such-program-here"]) is None
    assert subprocess_probe.run_command([sys.executable, "-c", "raise SystemExit(2)"]) is None
    assert subprocess_probe.run_command([sys.executable, "-c", "print(3)"]) == "3\n"


# Packages


def test_two_onnx_runtimes_are_a_fault() -> None:
    found = packages.probe_onnxruntime(["onnxruntime-gpu", "onnxruntime"])
    assert (
        found.state == FAULT
        and "onnxruntime and onnxruntime-gpu are both installed" in found.detail
    )
    assert (
        found.remedy
        == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'anyflow-deploy[gpu]'"
    )


def test_a_cuda_provider_that_does_not_start(installed: Callable[[str, str], None]) -> None:
    installed(
        "onnxruntime",
        "__version__ = '9'\nget_available_providers = lambda: ['CUDAExecutionProvider']\nclass"
        " SessionOptions: pass\nclass InferenceSession:\n    def __init__(self, *a, **k): pass\n   "
        " get_providers = lambda self: ['CPUExecutionProvider']\n",
    )
    found = packages.probe_onnxruntime_cuda()
    assert (
        found.state == FAULT
        and "CUDAExecutionProvider did not start" in found.detail
        and "[cuda,cudnn]" in found.remedy
    )


def test_a_tensorrt_without_a_gpu(installed: Callable[[str, str], None]) -> None:
    installed(
        "tensorrt",
        "__version__ = '10.3.0'\nclass Logger:\n    ERROR = 1\n    def __init__(self, level):"
        " pass\nBuilder = lambda logger: None",
    )
    found = packages.probe_tensorrt()
    assert found.state == FAULT and "10.3.0 can be imported, and gives no builder" in found.detail


def test_export_packages_are_read_from_the_metadata() -> None:
    assert {"torch", "diffusers", "onnxscript"} <= set(
        packages.packages_of_extra("export")
    ) and packages.packages_of_extra("nothing") == []
    assert packages.probe_export_packages().works


# The machine


def test_a_jetson(tmp_path: Path) -> None:
    assert machine.probe_jetson(tmp_path) is None
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    assert machine.probe_jetson(tmp_path).state == FAULT  # type: ignore[union-attr]
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text(
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
    )
    found = machine.probe_jetson(tmp_path)
    assert (
        found is not None
        and found.detail == "NVIDIA Jetson AGX Orin Developer Kit, L4T 36.4.3 (JetPack 6)"
    )


def test_memory_counts_the_containers_limit(tmp_path: Path) -> None:
    meminfo, limit = tmp_path / "meminfo", tmp_path / "max"
    meminfo.write_text("MemTotal:       16000000 kB\nMemAvailable:   12000000 kB\n")
    assert machine.probe_memory(meminfo, limit).works
    limit.write_text("2000000000\n")
    found = machine.probe_memory(meminfo, limit)
    assert found.state == FAULT and "this container may take 2.0 GB" in found.detail


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model name\t: Xeon\nflags\t\t: fpu avx2 avx512_vnni amx_int8\n", "Xeon, "),
        ("Features\t: fp asimd asimddp i8mm bf16\n", "asimddp i8mm bf16"),
        ("", "no flags of interest"),
    ],
)
def test_processors(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    found = machine.probe_processor(tmp_path / "cpuinfo")
    assert found.works and words in found.detail
    assert ("avx512_vnni" in found.facts["flags"]) == ("avx512_vnni" in text)


def test_benchmarks_name_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import common

    assert common.describe_machine()["instructions"] == machine.probe_processor().facts["flags"]


# The GPU


def test_nvidia_smi() -> None:
    rows = (
        "NVIDIA H100 80GB HBM3, 9.0, 81559, 81008, 550.54.15\nNVIDIA L4, 8.9, 23034, 22565,"
        " 550.54.15\n"
    )
    facts = gpu.facts_from_smi(
        rows, "| NVIDIA-SMI 550.54.15  Driver Version: 550.54.15  CUDA Version: 12.4  |\n"
    )
    assert facts is not None and facts["cuda"] == "12.4" and facts["driver"] == "550.54.15"
    assert [g["compute_capability"] for g in facts["gpus"]] == [[9, 0], [8, 9]]
    found = gpu.probe_gpu([lambda: None, lambda: facts])
    assert (
        found.works
        and "NVIDIA H100 80GB HBM3 (compute capability 9.0, 85.5 GB, 84.9 GB free); NVIDIA L4"
        in found.detail
    )
    assert found.detail.endswith("driver 550.54.15, CUDA 12.4")


@pytest.mark.parametrize(
    "rows", ["Orin (nvgpu), [N/A], [N/A], [N/A], N/A\n", "No devices were found\n", "a, b\n"]
)
def test_nvidia_smi_that_knows_too_little(rows: str) -> None:
    assert gpu.facts_from_smi(rows, "") is None


def test_a_gpu_whose_driver_does_not_answer(tmp_path: Path) -> None:
    assert gpu.probe_gpu([lambda: None], tmp_path).state == MISSING
    card = tmp_path / "sys/bus/pci/devices/0000:01:00.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x10de\n")
    (card / "class").write_text("0x030200\n")
    found = gpu.probe_gpu([lambda: None], tmp_path)
    assert (
        found.state == FAULT
        and "0000:01:00.0" in found.detail
        and "driver does not answer" in found.detail
    )


def test_nvml_is_asked_for_what_it_has() -> None:
    """On this machine it has no driver to ask; the names in the question have to be its own."""
    pynvml = pytest.importorskip("pynvml")
    names = {
        word.split("(")[0]
        for word in gpu._NVML.replace(")", " ").replace("nv.", " nv.").split()
        if word.startswith("nv.")
    }
    assert len(names) == 8 and all(hasattr(pynvml, name.removeprefix("nv.")) for name in names)


def test_nvml_as_it_would_answer(installed: Callable[[str, str], None]) -> None:
    installed(
        "pynvml",
        "class M: total, free = 64 << 30, 60 << 30\nnvmlInit = lambda:"
        " None\nnvmlSystemGetCudaDriverVersion = lambda: 12060\nnvmlSystemGetDriverVersion ="
        " lambda: b'560.1'\nnvmlDeviceGetCount = lambda: 1\nnvmlDeviceGetHandleByIndex = lambda i:"
        " i\nnvmlDeviceGetMemoryInfo = lambda g: M\nnvmlDeviceGetCudaComputeCapability = lambda g:"
        " (8, 7)\nnvmlDeviceGetName = lambda g: 'Orin'\n",
    )
    found = gpu.probe_gpu()
    assert (
        found.works
        and found.detail
        == "Orin (compute capability 8.7, 68.7 GB, 64.4 GB free); driver 560.1, CUDA 12.6"
    )


# Compiling


def test_a_compiler_that_lacks_openmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "broken++"
    fake.write_text(
        "#!/bin/sh\necho 'probe.cpp:2:10: fatal error: omp.h: No such file or directory'"
        " >&2\nexit 1\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    found = compiler.probe_compiler()
    assert found.state == FAULT and "omp.h: No such file" in found.detail
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiler.probe_compiler().state == MISSING


def test_headers_and_their_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "include").mkdir()
    (tmp_path / "include/NvInferRuntime.h").write_text("")
    (tmp_path / "include/NvInferVersion.h").write_text(
        "#define TRT_MAJOR_ENTERPRISE 10\n#define TRT_MINOR_ENTERPRISE 13 //!\n#define"
        " TRT_PATCH_ENTERPRISE 3\n#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE\n"
    )
    (tmp_path / "include/cuda_runtime_api.h").write_text("")
    (tmp_path / "include/cuda.h").write_text("#define CUDA_VERSION 12060\n")
    for name in ("TensorRT_ROOT", "CUDA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    folder = tmp_path / "include"
    assert cpp.probe_tensorrt_headers().detail == f"10.13.3 in {folder}"
    assert cpp.probe_cuda_headers().detail == f"12.6 in {folder}"


def test_the_headers_looked_for_are_those_the_library_includes() -> None:
    """And what its CMake files look for; a header that nothing includes is nobody's business."""
    sources = "".join(path.read_text() for path in (ROOT / "engines/cpp/src").glob("*.?pp"))
    folder = ROOT / "engines/cpp"
    listed = "".join(
        path.read_text() for path in (folder / "CMakeLists.txt", *folder.glob("cmake/*.cmake"))
    )
    asked = re.findall(
        r'"([\w/]+\.h(?:pp)?)", (?:folders|include_folders)', Path(cpp.__file__).read_text()
    )
    assert len(asked) == 4 and not [name for name in asked if f"#include <{name}>" not in sources]
    assert f"cmake_minimum_required(VERSION {'.'.join(map(str, cpp.OLDEST_CMAKE))})" in listed
    assert "TensorRT_ROOT" in listed and "CMAKE_CXX_STANDARD 20" in listed


def test_what_the_cpp_library_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpp.probe_torch_headers().works
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(cpp, "find_spec", lambda name: None)
    monkeypatch.setattr(cpp, "include_folders", lambda *names: [tmp_path / "include"])
    found = cpp.probe_library()
    assert found.state == MISSING
    assert (
        found.detail == "no cmake; neither ninja nor make; none of no-such-compiler is there; no"
        " nlohmann/json.hpp"
    )
    assert all(
        word in found.remedy
        for word in ("pip install cmake", "ninja", "g++ (11 or later)", "nlohmann-json3-dev")
    )
    for name, answer in {"cmake": "cmake version 3.20.4", "ninja": "1.11", "c20": ""}.items():
        (programs / name).write_text(f"#!/bin/sh\necho '{answer}'\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("CXX", "c20")
    (tmp_path / "include/nlohmann").mkdir(parents=True)
    numbers = zip(("MAJOR", "MINOR", "PATCH"), (3, 10, 5), strict=True)
    (tmp_path / "include/nlohmann/json.hpp").write_text(
        "".join(f"#define NLOHMANN_JSON_VERSION_{p} {n}\n" for p, n in numbers)
    )
    found = cpp.probe_library()
    assert found.state == FAULT and found.detail == "CMake 3.20.4, needed is 3.22 or later"
    (programs / "cmake").write_text("#!/bin/sh\necho 'cmake version 3.22.1'\n")
    found = cpp.probe_library()
    assert (
        found.works
        and "CMake 3.22.1, ninja, " in found.detail
        and "nlohmann-json 3.10.5 in " in found.detail
    )


@pytest.mark.parametrize(
    ("int8", "uint8", "state", "said"),
    [
        (True, True, WORKS, "came out exact"),
        (False, True, WORKS, "exact with unsigned weights.*no VNNI"),
        (False, False, FAULT, "overflow, with unsigned weights too"),
    ],
)
def test_int8_on_processors_of_every_kind(int8: bool, uint8: bool, state: str, said: str) -> None:
    found = packages.int8_finding(int8, uint8)
    assert found.state == state and re.search(said, found.detail)


def test_int8_works_on_this_processor() -> None:
    assert packages.probe_int8_on_cpu().works


# Backends and precisions


@pytest.mark.parametrize(
    ("capability", "running"),
    [
        ((8, 7), ["fp32", "fp16", "bf16", "int8"]),
        ((9, 0), list(PRECISIONS)),
        ((7, 5), ["fp32", "fp16", "int8"]),
        ((7, 0), []),
    ],
)
def test_precisions_follow_the_gpu(capability: tuple[int, int], running: list[str]) -> None:
    verdicts = {
        (v.backend.name, v.backend.provider): v
        for v in judge_backends(healthy(**{probes.GPU: of_gpu(*capability)}))
    }
    assert verdicts["tensorrt", "cuda"].running == running
    assert verdicts["aotinductor", "cpu"].running == list(PRECISIONS)
    assert "int8" not in verdicts["torch-tensorrt", "cuda"].running
    assert verdicts["onnxruntime", "cpu"].running == ["fp32", "fp16", "int8", "fp8"]


@pytest.mark.parametrize(
    ("wish", "provider", "changes", "why"),
    [
        ("onnxruntime:bf16", None, {}, "no bf16 matrix product"),
        ("onnxruntime:bf16", "cuda", {}, ""),
        (
            "onnxruntime:int8",
            None,
            {probes.INT8: ProbeResult(FAULT, "its products overflow")},
            "its products overflow",
        ),
        ("onnxruntime", None, {probes.INT8: ProbeResult(FAULT, "its products overflow")}, ""),
        (
            "onnxruntime",
            "cuda",
            {probes.ORT_CUDA: ProbeResult(MISSING, "built without CUDA")},
            "built without CUDA",
        ),
        (
            "tensorrt",
            None,
            {probes.GPU: ProbeResult(MISSING, "no NVIDIA GPU")},
            "GPU: no NVIDIA GPU",
        ),
        (
            "tensorrt:fp8",
            None,
            {probes.GPU: of_gpu(8, 7)},
            "needs compute capability 8.9, the first GPU has 8.7",
        ),
        (
            "aotinductor",
            "cuda",
            {probes.TORCH: works("2.13, CPU build", cuda=False)},
            "PyTorch: 2.13, CPU build",
        ),
        (
            "aotinductor",
            None,
            {probes.COMPILER: ProbeResult(MISSING, "none of g++")},
            "C++ compiler: none of g++",
        ),
        ("torch-tensorrt:int8", None, {}, "no such precision"),
    ],
)
def test_what_is_required(
    wish: str, provider: str | None, changes: dict[str, ProbeResult], why: str
) -> None:
    answer = check_requirement(wish, provider, judge_backends(healthy(**changes)))
    assert why in answer and bool(answer) == bool(why)


@pytest.mark.parametrize(
    ("wish", "provider", "message"),
    [
        ("tensort", None, "'tensort'; allowed are onnxruntime, .*Did you mean 'tensorrt'"),
        ("onnxruntime:fp4", None, "'fp4'; allowed are fp32"),
        ("onnxruntime:", None, "allowed are fp32"),
        ("tensorrt", "cpu", "tensorrt has no provider 'cpu'"),
    ],
)
def test_misspelt_requirements(wish: str, provider: str | None, message: str) -> None:
    with pytest.raises(AnyFlowError, match=message):
        check_requirement(wish, provider, judge_backends({}))
    with pytest.raises(AnyFlowError, match=message):
        doctor(DoctorOptions(require=wish, provider=provider))  # type: ignore[arg-type]


def test_a_provider_of_nothing() -> None:
    with pytest.raises(AnyFlowError, match="give --require, or leave --provider out"):
        parse_options(DoctorOptions, ["--provider", "cuda"])


def test_backends_and_probes_name_each_other() -> None:
    names = {probe.name for probe in probes.PROBES}
    assert {need for backend in REQUIREMENTS for need in backend.needs} | set(
        probes.FOR_A_GPU
    ) <= names
    assert {(row.name, row.provider) for row in REQUIREMENTS} == {
        (backend.name, provider)
        for backend in registry.BACKENDS.values()
        for provider in backend.packages
    }


def test_nobody_without_a_gpu_is_told_to_install_for_one() -> None:
    found = healthy(
        **{
            probes.GPU: ProbeResult(MISSING, "none"),
            probes.TENSORRT: ProbeResult(MISSING, "no module", "pip install x"),
        }
    )
    assert probes.adjust_remedies(found)[probes.TENSORRT].remedy == "only of use with an NVIDIA GPU"
    assert (
        probes.adjust_remedies({**found, probes.GPU: of_gpu(9, 0)})[probes.TENSORRT].remedy
        == "pip install x"
    )


def test_on_a_jetson_tensorrt_comes_with_jetpack() -> None:
    found = healthy(
        **{
            probes.TENSORRT: ProbeResult(MISSING, "no module", "pip install x"),
            probes.JETSON: works(),
        }
    )
    assert "--system-site-packages" in probes.adjust_remedies(found)[probes.TENSORRT].remedy
    assert (
        "anyflow-deploy[jetpack6]"
        in probes.adjust_remedies({**found, probes.GPU: ProbeResult(MISSING, "none")})[
            probes.GPU
        ].remedy
    )
    del found[probes.JETSON]
    assert probes.adjust_remedies(found)[probes.TENSORRT].remedy == "pip install x"


def test_the_report() -> None:
    found = healthy(**{"disk": ProbeResult(FAULT, "full", "make room")})
    verdicts = judge_backends({**found, probes.GPU: ProbeResult(MISSING, "no NVIDIA GPU")})
    text = format_plain(report_rows(found, verdicts))
    assert "full  ->  make room" in text and "no NVIDIA GPU" in text
    assert (
        json.loads(json.dumps(report_json(found, verdicts, {"x": "y"})))["findings"]["disk"][
            "remedy"
        ]
        == "make room"
    )


# The command


def command(
    *words: str, path: str = str(ROOT), cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    code = "from anyflow_deploy.cli.doctor import main; main()"
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=cwd,
    )


def test_on_this_machine(tmp_path: Path) -> None:
    done = command("--json", "--require", "onnxruntime:fp32,tensorrt:fp8")
    report = json.loads(done.stdout)
    assert "onnxruntime" in [b["backend"] for b in report["backends"] if "fp32" in b["precisions"]]
    for name in ("Python", "numpy", "ONNX Runtime", "PyTorch", "processor", "memory", "disk"):
        assert report["findings"][name]["state"] == WORKS, name
    assert done.returncode == (1 if "tensorrt:fp8" in report["unmet"] else 0)
    assert ("error: tensorrt:fp8 does not run here: " in done.stderr) == (
        "tensorrt:fp8" in report["unmet"]
    )


@pytest.mark.parametrize("base", ["numpy", "pydantic", "rich", "fire"])
def test_where_everything_is_broken_it_still_answers(tmp_path: Path, base: str) -> None:
    heavy = {
        "torch": "crashes",
        "onnxruntime": "raises",
        "modelopt": "kills",
        "tensorrt": "exits",
        "pynvml": "leaves",
    }
    for name, kind in {**heavy, base: "raises"}.items():
        (tmp_path / f"{name}.py").write_text(BROKEN[kind][0])
    done = command(path=f"{tmp_path}{os.pathsep}{ROOT}", cwd=tmp_path)
    assert "Traceback" not in done.stderr
    words = " ".join(done.stdout.split())
    assert (
        "PyTorch does not work crashed (SIGSEGV)" in words
        and "ModelOpt does not work crashed (SIGILL)" in words
    )
    assert "onnxruntime, cpu does not run" in words
    if base == "numpy":
        assert done.returncode == 0 and "numpy does not work ImportError: libfake.so.1" in words
    else:
        assert (
            done.returncode == 1
            and "the packages that every command needs are broken (ImportError: libfake"
            in done.stderr
        )


def test_it_can_be_interrupted() -> None:
    """While a probe waits: the program says when it has come that far, however long that takes."""
    program = (
        "import time\n"
        "from anyflow_deploy.cli import doctor\n"
        "def look():\n"
        "    print('looking', flush=True)\n"
        "    time.sleep(600)\n"
        "doctor.probe_machine = look\n"
        "doctor.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "looking\n"
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said
