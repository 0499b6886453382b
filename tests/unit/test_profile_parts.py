"""The parts of a profile one by one: statistics, power on machines that are not here, rules of
advice, comparison."""

from __future__ import annotations

import itertools
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from anyflow_deploy import AnyFlowError
from anyflow_deploy.engines.onnxruntime.profiler import timings_from_trace
from anyflow_deploy.engines.registry import EngineOptions
from anyflow_deploy.profiling import machine, power, timing
from anyflow_deploy.profiling import sampler as sampler_module
from anyflow_deploy.profiling.advice import advise
from anyflow_deploy.profiling.compare import Thresholds, compare_profiles
from anyflow_deploy.profiling.errors import MeasurementUnavailableError
from anyflow_deploy.profiling.formatting import format_percentile
from anyflow_deploy.profiling.layers import network_part
from anyflow_deploy.profiling.nvml import NvmlGpu
from anyflow_deploy.profiling.record import Conditions, Profile, Series, Warmup
from anyflow_deploy.profiling.roofline import target_from_gpu_name
from anyflow_deploy.profiling.sampler import ResourceSampler
from anyflow_deploy.profiling.summary_statistics import (
    is_steady,
    latency_from_samples,
    measure_drift,
    median_interval,
)
from anyflow_deploy.profiling.terminal import format_latency
from anyflow_deploy.profiling.timing import TimingRules, measure_cases, run_warm_up
from anyflow_deploy.progress import NullProgress
from tests.fakes.profile_sample import sample_layers, sample_point, sample_profile, steady_samples

# Statistics


def test_a_latency_is_what_numpy_says_and_counts_outliers() -> None:
    times = [*np.linspace(1, 2, 99), 50.0]
    latency = latency_from_samples(times)
    assert latency.median == pytest.approx(np.median(times)) and latency.p99 == pytest.approx(
        np.percentile(times, 99)
    )
    assert (latency.count, latency.outliers, latency.maximum) == (100, 1, 50.0)
    assert latency.deviation == pytest.approx(np.std(times, ddof=1)) and latency.samples[-1] == 50.0


def test_the_interval_holds_the_true_median_as_often_as_it_says() -> None:
    generator = random.Random(0)
    for count in (7, 20, 61):
        inside = 0
        for _ in range(400):
            low, high = median_interval([generator.lognormvariate(0, 1) for _ in range(count)])
            inside += low <= 1.0 <= high
        assert inside >= 0.93 * 400, f"{count} samples: {inside} of 400"
    assert median_interval([3.0]) == (3.0, 3.0) and median_interval([1.0, 2.0]) == (1.0, 2.0)
    assert median_interval(list(range(5000)))[0] > 2400


def test_drift_and_steadiness() -> None:
    assert measure_drift([1, 1, 1, 2, 2, 2]) == pytest.approx(1) and measure_drift([1, 2]) == 0
    assert is_steady([9, 1, 1, 1, 1, 1, 1, 1, 1], 4, 0.05) and not is_steady([4, 3, 2, 1], 2, 0.05)


def test_warm_up_waits_until_it_is_steady_and_gives_up_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(timing, "clock", lambda: now)
    slow = iter([5.0, 4.0, 3.0, 2.0, *[1.0] * 100])
    times: list[float] = []
    done = run_warm_up(lambda: times.append(next(slow)), times, TimingRules(10))
    assert done.steady and done.runs == 11 and times == []

    def slower_each_time() -> None:
        nonlocal now
        now += 0.01
        times.append(2.0 ** (100 * now))

    done = run_warm_up(slower_each_time, times, TimingRules(0.1))
    assert not done.steady and done.runs == 6 and done.seconds == pytest.approx(0.06), (
        "half of the budget, and one run"
    )


def test_percentiles_that_there_are_no_samples_for_are_not_shown() -> None:
    for share, enough in ((0.9, 10), (0.95, 20), (0.99, 100)):
        assert (
            format_percentile(1.5, share, enough) == "1.5 s"
            and format_percentile(1.5, share, enough - 1) == "–"
        )
    assert format_latency(latency_from_samples(steady_samples(0.1, 21)))[-3:] == [
        "101 ms",
        "101 ms",
        "–",
    ]


def test_cases_take_turns() -> None:
    order: list[str] = []
    taken = measure_cases(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        TimingRules(1, rounds=3),
        NullProgress(),
        "x",
    )
    assert order == ["a", "b"] * 3 and len(taken.seconds("a")) == 3
    assert (
        TimingRules(10).count_rounds(100) == 3
        and TimingRules(10).count_rounds(1e-9) == 200
        and TimingRules(10).count_rounds(0.5) == 20
    )


# Power


def test_watts_are_integrated_and_counters_subtracted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test: readings every 5 ms, however busy the machine is."""
    now = 0.0
    monkeypatch.setattr(sampler_module, "clock", lambda: now)
    steady_watts = power.PowerSource("w", "gpu", "sampled", watts=lambda: 20.0)
    counter = power.PowerSource("c", "cpu", "counter", joules=lambda: (30 * now) % 1.5, wraps=1.5)
    sampler = ResourceSampler((steady_watts, counter))
    begin, end = 0.0, 0.2
    for reading in range(41):
        now = 0.005 * reading
        sampler._sample()
    for name, watts in (("w", 20.0), ("c", 30.0)):
        assert sampler.joules(name, [(begin, end)]) == pytest.approx(
            watts * (end - begin), rel=0.02
        )
        halves = [(begin, (begin + end) / 2), ((begin + end) / 2, end)]
        assert sampler.joules(name, halves) == pytest.approx(sampler.joules(name, [(begin, end)]))
        row = sampler.power(name, (begin, begin + 0.05), (begin, end))
        assert row is not None and row.mean_watts == pytest.approx(watts, rel=0.05)
        assert row.idle_watts == pytest.approx(watts, rel=0.02) and len(row.samples) > 10


def test_the_sampler_reads_while_it_is_open() -> None:
    readings = threading.Event()
    values = itertools.count()

    def watts() -> float:
        if next(values) == 5:
            readings.set()
        return 20.0

    with ResourceSampler((power.PowerSource("w", "gpu", "sampled", watts=watts),), interval=0.001):
        assert readings.wait(60)


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_jetsons_rails(tmp_path: Path) -> None:
    hwmon = tmp_path / "sys/class/hwmon"
    rows = {
        "name": "ina3221\n",
        "in1_label": "VDD_GPU_SOC\n",
        "in1_input": "19000",
        "curr1_input": "500",
    }
    rows |= {
        "in2_label": "VDD_CPU_CV",
        "in2_input": "19000",
        "curr2_input": "200",
        "in3_label": "VIN_SYS_5V0",
    }
    rows |= {
        "in3_input": "5000",
        "curr3_input": "1000",
        "in7_label": "sum of shunt voltages",
        "in7_input": "3",
    }
    write(hwmon / "hwmon3", **rows)
    write(hwmon / "hwmon0", name="tegra-thermal")
    found = power.jetson_sources(tmp_path)
    assert [(rail.name, rail.kind) for rail in found] == [
        ("VDD_GPU_SOC", "gpu"),
        ("VDD_CPU_CV", "cpu"),
        ("VIN_SYS_5V0", "board"),
    ]
    assert [rail.watts() for rail in found if rail.watts] == pytest.approx([9.5, 3.8, 5.0])
    with pytest.raises(MeasurementUnavailableError, match="Jetsons have them"):
        power.jetson_sources(tmp_path / "else")


def test_the_rails_of_an_orin_nano_and_of_a_thor(tmp_path: Path) -> None:
    nano = {
        "name": "ina3221\n",
        "in1_label": "VDD_IN\n",
        "in2_label": "VDD_CPU_GPU_CV\n",
        "in3_label": "VDD_SOC\n",
    }
    nano |= {f"in{n}_input": "5000" for n in (1, 2, 3)} | {
        f"curr{n}_input": "1000" for n in (1, 2, 3)
    }
    write(tmp_path / "nano/sys/class/hwmon/hwmon1", **nano)
    found = power.jetson_sources(tmp_path / "nano")
    assert [(rail.name, rail.kind) for rail in found] == [
        (n, "board") for n in ("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC")
    ]
    thor = {
        "name": "ina3221\n",
        "in1_label": "VDD_GPU\n",
        "in2_label": "VDD_CPU_SOC_MSS\n",
        "in3_label": "VIN_SYS_5V0\n",
    }
    thor |= {f"in{n}_input": "12000" for n in (1, 2, 3)} | {
        f"curr{n}_input": "2000" for n in (1, 2, 3)
    }
    write(tmp_path / "thor/sys/class/hwmon/hwmon4", **thor)
    write(
        tmp_path / "thor/sys/class/hwmon/hwmon5",
        name="ina238\n",
        power1_input="61500000\n",
        in1_input="19000",
    )
    found = power.jetson_sources(tmp_path / "thor")
    kinds = [
        ("VDD_GPU", "gpu"),
        ("VDD_CPU_SOC_MSS", "cpu"),
        ("VIN_SYS_5V0", "board"),
        ("VIN", "board"),
    ]
    assert [(rail.name, rail.kind) for rail in found] == kinds
    assert found[-1].watts is not None and found[-1].watts() == pytest.approx(61.5)


def test_rapl(tmp_path: Path) -> None:
    zones = tmp_path / "sys/class/powercap"
    write(
        zones / "intel-rapl:0",
        name="package-0\n",
        energy_uj="5000000",
        max_energy_range_uj="262143328850",
    )
    write(zones / "intel-rapl:0:0", name="core\n", energy_uj="1")
    write(
        zones / "intel-rapl:0:1",
        name="dram\n",
        energy_uj="7000000",
        max_energy_range_uj="65712999613",
    )
    found = power.rapl_sources(tmp_path)
    assert [(zone.name, zone.kind, zone.joules()) for zone in found if zone.joules] == [
        ("RAPL package-0", "cpu", 5.0),
        ("RAPL dram", "memory", 7.0),
    ]
    assert found[0].wraps == pytest.approx(262143.32885)
    with pytest.raises(MeasurementUnavailableError, match="virtual machines"):
        power.rapl_sources(tmp_path / "else")
    (zones / "intel-rapl:0/energy_uj").unlink()
    (zones / "intel-rapl:0/energy_uj").mkdir()  # unreadable, even for root
    with pytest.raises(MeasurementUnavailableError, match="only root may"):
        power.rapl_sources(tmp_path)


class FakeNvml:
    """pynvml with one H100, strict about names: what the real module lacks is an AttributeError
    here."""

    def __init__(self, real: Any, refuse: tuple[str, ...] = ()) -> None:
        self.real, self.refuse, self.index = real, refuse, -1
        self.bits = real.nvmlClocksEventReasonSwPowerCap | real.nvmlClocksEventReasonGpuIdle

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.real, name)
        if not name.startswith(("nvmlInit", "nvmlDevice", "nvmlSystem")):
            return real
        return lambda *given: self._answer(name, given)

    def _answer(self, name: str, given: tuple[Any, ...]) -> Any:
        if name in self.refuse:
            raise self.real.NVMLError(self.real.NVML_ERROR_NOT_SUPPORTED)
        if name == "nvmlDeviceGetHandleByIndex":
            self.index = given[0]
        import os

        return {
            "nvmlDeviceGetHandleByIndex": "handle",
            "nvmlDeviceGetName": b"NVIDIA H100 80GB HBM3",
            "nvmlDeviceGetPowerUsage": 350_000,
            "nvmlDeviceGetTotalEnergyConsumption": 42_000,
            "nvmlDeviceGetClockInfo": 1755,
            "nvmlDeviceGetMaxClockInfo": 1980,
            "nvmlDeviceGetTemperature": 61,
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            "nvmlDeviceGetCurrentClocksEventReasons": self.bits,
            "nvmlDeviceGetComputeRunningProcesses": [
                SimpleNamespace(pid=os.getpid(), usedGpuMemory=5 << 30)
            ],
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=6 << 30),
            "nvmlSystemGetDriverVersion": "580.1",
            "nvmlInit": None,
        }[name]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    real = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    fake = FakeNvml(real)
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    return fake


def test_a_gpu_through_nvml(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = NvmlGpu(0)
    assert (gpu.watts(), gpu.joules(), gpu.sm_clock(), gpu.temperature()) == (
        350.0,
        42.0,
        1755.0,
        61.0,
    )
    assert gpu.throttle_reasons() == ["power cap"] and gpu.memory() == (5 << 30, 6 << 30)
    assert gpu.describe()["power_limit_watts"] == 700.0
    (source,) = power.nvml_sources(gpu)
    assert source.joules is not None and source.joules() == 42.0
    nvml.refuse = ("nvmlDeviceGetTotalEnergyConsumption",)
    (source,) = power.nvml_sources(gpu)
    assert source.watts is not None and source.watts() == 350.0
    nvml.refuse += ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetComputeRunningProcesses")
    assert gpu.memory() == (None, 6 << 30)
    with pytest.raises(MeasurementUnavailableError, match="gives no power"):
        power.nvml_sources(gpu)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert NvmlGpu(1) and nvml.index == 1
    nvml.refuse = ("nvmlInit",)
    with pytest.raises(MeasurementUnavailableError, match="does not answer"):
        NvmlGpu(0)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3060 Ti", None),
        ("NVIDIA GeForce RTX 3060", "rtx3060"),
        ("NVIDIA GeForce RTX 5070 Laptop GPU", None),
        ("NVIDIA GB10", "gb10"),
        ("Orin", "orin"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "orin"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "orin-nx"),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "orin-nano"),
        ("NVIDIA Jetson AGX Thor Developer Kit", "thor"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_table_knows_a_gpu_by_its_name(name: str, target: str | None) -> None:
    found = target_from_gpu_name(name)
    assert (found.name if found else None) == target


def test_a_machine_on_paper(tmp_path: Path) -> None:
    stat = "cpu  1000 0 500 9000 0 0 0 100 0 0\n"
    write(
        tmp_path / "proc",
        stat=stat,
        cpuinfo="model name : Test 9000\nflags: hypervisor\ncpu MHz : 2500.0\n",
        meminfo="",
    )
    write(tmp_path / "sys/devices/system/cpu/cpu0/cpufreq", scaling_governor="schedutil\n")
    found = machine.describe(None, tmp_path)
    assert (
        found["cpu"] == "Test 9000"
        and found["virtual"]
        and found["governor"] == "schedutil"
        and "gpu" not in found
    )
    assert machine.cpu_clock(tmp_path)() == 2500.0
    load = machine.OtherLoad(tmp_path)
    (tmp_path / "proc/stat").write_text("cpu  9000000 0 500 9000 0 0 0 100 0 0\n")
    assert (load.cores() or 0) > 1
    write(tmp_path / "sys/devices/system/cpu/cpu0/thermal_throttle", core_throttle_count="4")
    assert machine.throttle_counts(tmp_path) == {"processor temperature (core)": 4}


# Advice

MOVING = Series(name="GPU clock", unit="MHz", samples=[(0, 900), (1, 1800)])

RULES: dict[str, Callable[[], Profile]] = {
    "throttled": lambda: sample_profile(
        conditions=Conditions(other_load=0, throttle={"power cap": 0.4}, series=[])
    ),
    "drifting": lambda: sample_profile(
        points=[sample_point(transition=latency_from_samples([*[0.1] * 60, *[0.12] * 60]))]
    ),
    "machine busy": lambda: sample_profile(
        conditions=Conditions(other_load=0.8, throttle={}, series=[])
    ),
    "never steady": lambda: sample_profile(
        points=[sample_point(warm_up=Warmup(runs=2, seconds=9, steady=False))]
    ),
    "times vary": lambda: sample_profile(
        points=[sample_point(transition=latency_from_samples([0.1, 0.12] * 60))]
    ),
    "clocks not locked": lambda: sample_profile(
        points=[sample_point(transition=latency_from_samples([0.1, 0.12] * 60))],
        conditions=Conditions(other_load=0, throttle={}, series=[MOVING]),
    ),
    "power mode": lambda: sample_profile(
        machine={"jetson": {"model": "Orin", "power_mode": "30W"}}
    ),
    "launch-bound": lambda: sample_profile(
        points=[sample_point(enqueue=latency_from_samples(steady_samples(0.09)))]
    ),
    "memory-bound": lambda: with_roof(compute_seconds=0.02, memory_seconds=0.09, efficiency=0.9),
    "ceiling too low": lambda: with_roof(compute_seconds=0.2, memory_seconds=0.001, efficiency=2.0),
    "far from the ceiling": lambda: with_roof(
        compute_seconds=0.02, memory_seconds=0.001, efficiency=0.2
    ),
    "many small operators": lambda: sample_profile(
        layers=[sample_layers(Gemm=0.5, Mul=0.3, Reshape=0.2)]
    ),
    "short tail": lambda: sample_profile(
        points=[sample_point(transition=latency_from_samples(steady_samples(0.1, 20)))]
    ),
}


def with_roof(**changes: float) -> Profile:
    point = sample_point()
    assert point.roofline is not None
    return sample_profile(
        points=[point.model_copy(update={"roofline": point.roofline.model_copy(update=changes)})]
    )


def test_a_steady_profile_gets_notes_only() -> None:
    found = advise(sample_profile())
    assert {advice.kind for advice in found} == {"compute-bound", "real time"}
    assert all(
        advice.weight == "note" and any(c.isdigit() for c in advice.measurement) for advice in found
    )


@pytest.mark.parametrize("kind", RULES)
def test_every_rule_speaks_when_it_should(kind: str) -> None:
    found = {advice.kind: advice for advice in advise(RULES[kind]())}
    assert kind in found and found[kind].text and any(c.isdigit() for c in found[kind].measurement)


def test_a_governor_that_saves_power_is_named() -> None:
    found = advise(sample_profile(machine={"governor": "powersave"}))
    assert "governor powersave" in [advice.measurement for advice in found]


# Comparison


def test_more_than_a_threshold_and_more_than_chance() -> None:
    old = sample_profile(0.1)
    verdicts = {
        row.name: row.verdict
        for row in compare_profiles(old, sample_profile(0.12), Thresholds()).rows
    }
    assert (
        verdicts["480x832x81, transition"] == "regression"
        and verdicts["480x832x81, 1 steps"] == "regression"
    )
    assert verdicts["engine, peak CPU memory"] == "unchanged"
    faster = compare_profiles(old, sample_profile(0.08), Thresholds())
    assert not faster.has_regression and {row.verdict for row in faster.rows} == {
        "improvement",
        "unchanged",
    }
    assert not compare_profiles(old, sample_profile(0.103), Thresholds()).has_regression, (
        "3 % is below the threshold"
    )
    scattered = [
        sample_point(transition=latency_from_samples(list(np.linspace(low, 0.3, 20))))
        for low in (0.01, 0.05)
    ]
    noisy = compare_profiles(
        sample_profile(points=scattered[:1]), sample_profile(points=scattered[1:]), Thresholds()
    )
    assert {row.name: row.verdict for row in noisy.rows}["480x832x81, transition"] == "within noise"


def test_what_vanished_is_a_regression_and_what_differs_is_named() -> None:
    old = sample_profile(points=[sample_point(), sample_point(shape="64x64x9")])
    new = sample_profile(
        machine={"cpu": "another", "cores": 2, "versions": {"onnxruntime": "1.33.0"}}
    )
    comparison = compare_profiles(old, new, Thresholds())
    assert comparison.has_regression and {
        row.name for row in comparison.rows if row.verdict == "missing"
    } >= {"64x64x9, transition"}
    assert (
        comparison.differences["versions onnxruntime"] == ("1.32.0", "1.33.0")
        and "cpu" in comparison.differences
    )
    energy = sample_point()
    hungry = [
        clip.model_copy(update={"joules": {"RAPL package-0": 9.0 * clip.steps}})
        for clip in energy.clips
    ]
    more = compare_profiles(
        sample_profile(),
        sample_profile(points=[energy.model_copy(update={"clips": hungry})]),
        Thresholds(),
    )
    assert [row.name for row in more.rows if row.verdict == "regression"] == [
        f"480x832x81, {steps} steps, energy of RAPL package-0" for steps in (1, 4)
    ]


# Layers


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("blocks.12.ffn.net.2/Gemm", "ffn.net.2"),
        ("blocks.3.attn1/Transpose_5/MultiHeadAttention", "attn1"),
        ("blocks.0/LayerNormalization", "blocks: modulation, norms"),
        ("patch_embedding/Conv", "patch_embedding"),
        ("_empty_nn_module_stack_from_metadata_hook/Shape_5", "other"),
        ("Mul_7/QuickGeluFusion/", "other"),
        ("Sub", "other"),
    ],
)
def test_parts_of_the_network(name: str, wanted: str) -> None:
    assert network_part(name) == wanted


def test_a_trace_is_cut_to_the_runs_that_count() -> None:
    def event(start: int, category: str, name: str, **arguments: Any) -> dict[str, Any]:
        return {"cat": category, "name": name, "ts": start, "dur": 10, "args": arguments}

    shapes: dict[str, Any] = {
        "input_type_shape": [{"float": [5, 64]}, {"float": [96]}],
        "output_type_shape": [{"float": [5, 96]}],
    }
    gemm = {
        "op_name": "Gemm",
        **shapes,
        "activation_size": "1280",
        "parameter_size": "384",
        "output_size": "1920",
    }
    events = [event(start, "Session", "model_run") for start in (0, 100, 200)]
    events += [event(start + 1, "Node", "a/Gemm_kernel_time", **gemm) for start in (0, 100, 200)]
    (row,) = timings_from_trace(events, 2)
    assert (row.name, row.calls, row.operations) == (
        "a/Gemm",
        2,
        2 * 5 * 64 * 96,
    ) and row.seconds == pytest.approx(20e-6)
    assert row.bytes == 1280 + 384 + 1920 + 4 * 64 * 96, "the packed weight is counted, too"


def test_backends_without_a_profiler_say_so() -> None:
    from anyflow_deploy.profiling import layer_profiling

    for backend, options, why in (
        ("onnxruntime", EngineOptions("cuda"), "Nsight"),
        ("aotinductor", EngineOptions("cpu"), "no layers left"),
    ):
        with pytest.raises(MeasurementUnavailableError, match=why):
            layer_profiling.profile_layers(None, backend, options, None, sample_point())  # type: ignore[arg-type]


def test_an_engine_that_makes_nan_is_no_measurement() -> None:
    from anyflow_deploy.profiling.workload import _check_finite

    with pytest.raises(AnyFlowError, match="its times mean nothing"):
        _check_finite(np.array([1.0, np.nan], np.float32))
