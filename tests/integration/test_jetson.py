"""docs/how-to/jetson.md: its commands run, on a stand-in for an Orin where they need one; its
tables are what the code computes.

And the parts that only a Jetson uses, on files like those of its kernel.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anyflow_deploy import MODELS, BackendError, Bundle
from anyflow_deploy.cli.build import build
from anyflow_deploy.cli.export import export
from anyflow_deploy.cli.fit import fit
from anyflow_deploy.cli.generate import generate
from anyflow_deploy.cli.inspect_bundle import inspect
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.cli.profile_bundle import profile
from anyflow_deploy.engines.build import build_engine
from anyflow_deploy.engines.engine_folder import load_engine_folder
from anyflow_deploy.engines.tensorrt.build.settings import TensorRTSettings
from anyflow_deploy.engines.tensorrt.lint.operators import MAX_OPSETS, version_from_text
from anyflow_deploy.export.quantization.calibrate import write_calibration
from anyflow_deploy.memory.estimate import available_memory, estimate_memory, shape_from_pixels
from anyflow_deploy.profiling import jetson, profiler
from anyflow_deploy.profiling.memory import PeakMemory, gpu_memory_reader
from anyflow_deploy.profiling.record import Profile
from anyflow_deploy.profiling.terminal import print_profile
from anyflow_deploy.targets import TARGETS, get_target
from tests.conftest import SMALL, Export, calibration_of
from tests.fakes.profile_sample import sample_profile
from tests.integration.test_promises import COMMANDS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "jetson.md").read_text()
LINES = [
    line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]
OURS = [shlex.split(line) for line in LINES if line.startswith("anyflow-")]
WORK: dict[str, Callable[[Any], int]] = {
    "anyflow-build": build,
    "anyflow-export": export,
    "anyflow-fit": fit,
    "anyflow-generate": generate,
    "anyflow-inspect": inspect,
    "anyflow-profile": profile,
}
NANO = {
    "model": "NVIDIA Jetson Orin Nano Developer Kit",
    "power_mode": "15W",
    "gpu_clock": "306 to 1020 MHz",
}
on_an_orin = pytest.mark.parametrize("fake_tensorrt", ["10.3"], indirect=True)


def orin(machine: Any) -> None:
    machine.cuda.properties |= {"name": b"Orin", "major": 8, "minor": 7, "integrated": 1}


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


# The page


def test_every_command_of_ours_parses() -> None:
    assert {words[0] for words in OURS} == {*WORK, "anyflow-doctor"}
    for words in OURS:
        parse_options(COMMANDS[words[0]], words[1:])


@on_an_orin
def test_every_command_of_ours_runs(
    fake_tensorrt: Any,
    tiny_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In order, in small, but for the doctor, whose probes are processes that see no stand-in."""
    orin(fake_tensorrt)
    (tmp_path / "my-anyflow").symlink_to(tiny_pipeline)
    write_calibration(tmp_path / "calibration.json", calibration_of(tiny_pipeline))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jetson, "describe", lambda root=None: NANO)
    for words in OURS:
        small = [
            word.replace("480x832x81", "32x48x5") if "tensorrt" in words else word for word in words
        ]
        if words[0] == "anyflow-generate":
            small = [*small, "--height", "32", "--width", "48", "--frames", "5"]
            small = [word.replace("20s", "200ms") for word in small]
        options = parse_options(COMMANDS[words[0]], small[1:])
        if words[0] == "anyflow-doctor":
            continue
        if words[0] == "anyflow-profile" and "--backend" in words:
            options = options.model_copy(update={"rounds": 2, "seconds": 0.5})
        status = WORK[words[0]](options)
        assert status == 0, words
        if "--json" in words:  # the file that the page compares with: another mode
            read = json.loads(Path("orin.json").read_text())
            read["machine"]["jetson"]["power_mode"] = "MODE_30W"
            Path("orin-30w.json").write_text(json.dumps(read))
    assert "jetson power_mode" in (said := capsys.readouterr().out) and "MODE_30W" in said
    assert (
        load_engine_folder(tmp_path / "my-bundle/engines/tensorrt-cuda").record.device.name
        == "Orin"
    )
    check_profile(Profile.model_validate_json(Path("orin.json").read_text()))
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(block, {})
    found = re.search(r"relative L2 distance (\S+)", capsys.readouterr().out)
    assert found and float(found[1]) < 5e-4
    assert Path("fox.mp4").stat().st_size > 500


def check_profile(made: Profile) -> None:
    """What only a Jetson's has."""
    assert made.machine["jetson"] == NANO and made.subject.engine.startswith(
        "TensorRT 10.3.0, Orin"
    )
    memory = made.memory
    assert (
        memory.unified
        and memory.shared_before
        and memory.shared_peak
        and memory.shared_peak > 10**8
    )
    assert memory.gpu_peak is None, "CUDA's own count is not used"
    assert made.ceilings is not None and made.ceilings.name == TARGETS["orin-nano"].device
    assert "nvpmodel says 15W" in [advice.measurement for advice in made.advice]
    assert made.layers and made.points[0].enqueue is not None


def test_every_other_command_is_shell(tmp_path: Path) -> None:
    others = [line for line in LINES if not line.startswith("anyflow-")]
    assert len(others) >= 14
    for line in others:
        subprocess.run(["bash", "-n", "-c", line], check=True)
    cmake = [line for line in others if line.startswith("cmake -S")]
    listed = "".join(path.read_text() for path in (ROOT / "engines/cpp").rglob("CMake*.txt"))
    for setting in re.findall(r"-D(ANYFLOW_\w+)=", "".join(cmake)):
        assert f"set({setting} " in listed
    usage = (ROOT / "engines/cpp/examples/generate.cpp").read_text()
    (example,) = (line for line in others if line.startswith("build/examples/generate"))
    assert not [flag for flag in re.findall(r"--\w+", example) if f'"{flag}"' not in usage]
    extras = (ROOT / "pyproject.toml").read_text()
    for name in {
        name for group in re.findall(r"'\.\[([\w,]+)\]'", PAGE) for name in group.split(",")
    } | {"jetpack7"}:
        assert f"\n{name} = [" in extras


def test_the_table_of_boards_is_that_of_targets() -> None:
    rows = re.findall(
        r"^\| .*Orin, .*\| .* \| (.*) \| (.*) \| (.*); no fp8 \| 20 \|$", PAGE, re.MULTILINE
    )
    ((tensorrt, names, precisions),) = rows
    for name in re.findall(r"`([\w-]+)`", names):
        target = get_target(name)
        assert set(target.precisions) == set(precisions.split(", ")) and tensorrt in target.tensorrt
    assert "fp8" in TARGETS["thor"].precisions and "| `thor` | fp8, " in PAGE
    opsets = dict(MAX_OPSETS)
    assert opsets[version_from_text("10.14")] == 23 and "23 from 10.14 on" in PAGE
    assert max(v for at, v in MAX_OPSETS if at <= version_from_text("10.3")) == 20


def test_the_table_of_what_fits_is_what_anyflow_fit_says() -> None:
    boards = {
        "Orin Nano 8GB": "orin-nano",
        "Orin NX 16GB": "orin-nx",
        "AGX Orin 64GB": "orin",
        "AGX Thor 128GB": "thor",
    }
    order = list(boards)
    rows = re.findall(r"^\| (\S+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| (.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 5
    for model, frames, fp16, int8, smallest in rows:
        a = MODELS[model].architecture
        sizes = {
            p: (
                estimate_memory(
                    a, p, TARGETS["orin"], shape_from_pixels(f"480x832x{frames}", a)
                ).total
            )
            for p in ("fp16", "int8")
        }
        assert [round(size / 1e9, 1) for size in sizes.values()] == [
            float(fp16),
            float(int8),
        ], model
        first, _, eight = smallest.partition("; in int8 ")
        precision = "fp16" if eight else "int8"
        fitting = [
            board for board in order if sizes[precision] <= available_memory(TARGETS[boards[board]])
        ]
        assert first == fitting[0], model
        if eight == "AGX Orin 32GB":  # a row's variant, as the command below the table has it
            assert sizes["int8"] <= 26e9
        elif eight:
            assert eight == next(
                board
                for board in order
                if sizes["int8"] <= available_memory(TARGETS[boards[board]])
            )


# What only a Jetson has


def test_a_jetson_is_described_by_its_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert jetson.describe(tmp_path) is None and jetson.gpu_clock(tmp_path)() is None
    write(tmp_path / "proc/device-tree", model="NVIDIA Jetson AGX Orin Developer Kit\0")
    monkeypatch.setattr(jetson, "_run_command", lambda command: "NV Power Mode: MODE_30W\n2\n")
    assert jetson.describe(tmp_path) == {
        "model": "NVIDIA Jetson AGX Orin Developer Kit",
        "power_mode": "MODE_30W",
    }
    folder = tmp_path / "sys/class/devfreq"
    write(folder / "15340000.vic", cur_freq="729600000", min_freq="1", max_freq="2")
    write(
        folder / "17000000.gpu",
        cur_freq="930750000\n",
        min_freq="306000000\n",
        max_freq="1300500000\n",
    )
    assert (jetson.describe(tmp_path) or {})["gpu_clock"] == "306 to 1300 MHz"
    assert jetson.gpu_clock(tmp_path)() == 930.75
    (folder / "17000000.gpu/min_freq").write_text("1300500000\n")  # as jetson_clocks leaves it
    assert (jetson.describe(tmp_path) or {})["gpu_clock"] == "locked at 1300 MHz"
    thor = tmp_path / "thor"
    write(thor / "sys/class/devfreq/gpu-gpc-0", cur_freq="1575000000")
    write(thor / "sys/class/devfreq/gpu-nvd-0", cur_freq="1")
    assert jetson.gpu_clock(thor)() == 1575.0
    monkeypatch.setattr(jetson, "_run_command", lambda command: "")
    assert (jetson.describe(tmp_path) or {})["power_mode"].startswith("unknown")


def test_shared_memory_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the file cache, and not what processor and GPU each say, added up."""
    rows = (
        "MemTotal: 64000000 kB\nMemFree: 1000000 kB\nMemAvailable: 50000000 kB\nCached: 49000000"
        " kB\n"
    )
    write(tmp_path / "proc", meminfo=rows)
    assert jetson.used_memory(tmp_path) == 14_000_000 * 1024 and jetson.gpu_memory(tmp_path) is None
    write(tmp_path / "proc", meminfo=f"{rows}NvMapMemUsed: 5000000 kB\n")
    assert jetson.gpu_memory(tmp_path) == 5_000_000 * 1024
    monkeypatch.setattr("anyflow_deploy.profiling.memory.jetson.gpu_memory", lambda: 3.0e9)
    read = gpu_memory_reader(None, 0, unified=True)
    assert read is not None and read() == 3.0e9
    taken = iter([4e9, 9e9])
    record = PeakMemory(read, lambda: next(taken)).record(3.5e9, 11e9)
    assert (record.shared_before, record.shared_peak, record.gpu_peak, record.unified) == (
        4 * 10**9,
        11 * 10**9,
        35 * 10**8,
        True,
    )


def test_what_was_taken_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    sample = sample_profile()
    changes = {
        "unified": True,
        "gpu_peak": 3 * 10**9,
        "shared_before": 2 * 10**9,
        "shared_peak": 7 * 10**9,
    }
    print_profile(
        sample.model_copy(update={"memory": sample.memory.model_copy(update=changes)}),
        Console(width=120),
    )
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "peak 3.00 GB (of the CPU's memory)" in said
        and "5.00 GB more than before, counted once; 7.00 GB with all else" in said
    )


def test_nvml_is_not_asked_for_clocks_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jetson, "gpu_clock", lambda: lambda: 918.0)
    reads = profiler._build_readers(None, on_jetson=True)
    assert reads["GPU clock"]() == 918.0 and "GPU memory clock" not in reads
    assert "GPU clock" not in profiler._build_readers(None, on_jetson=False)


@on_an_orin
def test_weights_are_not_streamed_from_the_same_memory(
    fake_tensorrt: Any, export_once: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle: Bundle = export_once(SMALL)
    orin(fake_tensorrt)
    shapes = ("64x96x5",)
    with pytest.raises(
        BackendError,
        match=r"--weight-streaming keeps weights in the processor's memory, and Orin has no other",
    ):
        build_engine(
            bundle,
            "tensorrt",
            TensorRTSettings(shapes=shapes, weight_streaming=True),
            tmp_path / "engine",
        )
    fake_tensorrt.failure = "[allocator] out of memory"
    with pytest.raises(
        BackendError, match=r"processor and GPU share it.*lower --workspace"
    ) as failed:
        build_engine(bundle, "tensorrt", TensorRTSettings(shapes=shapes), tmp_path / "engine")
    assert "weight-streaming" not in str(failed.value) and not (tmp_path / "engine").exists()
    shutil.rmtree(tmp_path / "engine", ignore_errors=True)
