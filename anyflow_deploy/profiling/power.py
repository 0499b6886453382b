"""Find where power can be read: NVML, a Jetson's INA3221 and INA238, RAPL counters.

A source gives watts, or counts joules. Counters are read as they are (nothing is missed between two
samples); watts are integrated by the trapezoidal rule over the readings of the sampling thread.
Each source is listed with what it covers: a rail of a Jetson's board, a processor package, a
graphics card. They are never added up here, since they may overlap.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anyflow_deploy.profiling.errors import MeasurementUnavailableError
from anyflow_deploy.profiling.kernel_files import kernel_text
from anyflow_deploy.profiling.nvml import NvmlGpu

PowerKind = Literal["gpu", "cpu", "memory", "board"]


@dataclass(frozen=True)
class PowerSource:
    """One place where power is read.

    Attributes:
        name: as its driver calls it.
        kind: what it covers.
        method: how it is read, in words.
        watts: power now; None for a source that counts.
        joules: energy since some moment; None for one that gives watts.
        wraps: joules at which the counter starts again from 0.
    """

    name: str
    kind: PowerKind
    method: str
    watts: Callable[[], float] | None = None
    joules: Callable[[], float] | None = None
    wraps: float | None = None


def find_power_sources(
    gpu: NvmlGpu | None, root: Path = Path("/")
) -> tuple[list[PowerSource], dict[str, str]]:
    """Find all sources that can be read here, and the reasons why others cannot, by name."""
    sources: list[PowerSource] = []
    absent: dict[str, str] = {}
    finders: dict[str, Callable[[], list[PowerSource]]] = {
        "NVML": lambda: nvml_sources(gpu),
        "Jetson's rails": lambda: jetson_sources(root),
        "RAPL": lambda: rapl_sources(root),
    }
    for name, find in finders.items():
        try:
            sources += find()
        except MeasurementUnavailableError as error:
            absent[name] = str(error)
    return sources, absent


def nvml_sources(gpu: NvmlGpu | None) -> list[PowerSource]:
    """Return the source for a graphics card as a whole.

    Raises:
        MeasurementUnavailableError: no GPU, or one without power readings.
    """
    if gpu is None:
        raise MeasurementUnavailableError("no GPU that NVML knows is in use")
    name = f"NVML {gpu.name}"
    if gpu.joules() is not None:
        return [
            PowerSource(
                name, "gpu", "NVML's energy counter", joules=lambda: _require_reading(gpu.joules())
            )
        ]
    if gpu.watts() is not None:
        return [
            PowerSource(
                name,
                "gpu",
                "NVML's power, sampled and integrated",
                watts=lambda: _require_reading(gpu.watts()),
            )
        ]
    raise MeasurementUnavailableError(
        f"NVML gives no power for {gpu.name} (a Jetson's is on its INA3221 rails)"
    )


def _require_reading(value: float | None) -> float:
    """Return a reading, or raise an OSError, which the sampler passes over."""
    if value is None:
        raise OSError("no reading")
    return value


_GPU_RAILS = re.compile(r"GPU")
_CPU_RAILS = re.compile(r"CPU")
_MEMORY_RAILS = re.compile(r"VDDQ|DDR")


def jetson_sources(root: Path = Path("/")) -> list[PowerSource]:
    """Return the sources for a Jetson's power rails.

    An INA3221 has three: `inN_input` in millivolts times `currN_input` in milliamperes, named by
    `inN_label`. Thor's board also has an INA238, without names, where its power comes in:
    `power1_input` in microwatts.
    """
    names = {
        folder: kernel_text(folder / "name")
        for folder in sorted((root / "sys/class/hwmon").glob("hwmon*"))
    }
    monitors = [folder for folder, name in names.items() if name in ("ina3221", "ina238")]
    if not monitors:
        raise MeasurementUnavailableError(
            "no INA3221 or INA238 power monitor under /sys/class/hwmon (Jetsons have them)"
        )
    readers = {"ina3221": _ina3221_sources, "ina238": _ina238_sources}
    rails = [rail for folder in monitors for rail in readers[names[folder]](folder)]
    if not rails:
        raise MeasurementUnavailableError(
            f"{monitors[0]} names no rail that has both voltage and current"
        )
    return rails


def _ina238_sources(folder: Path) -> Iterator[PowerSource]:
    file = folder / "power1_input"
    if file.is_file():
        name = kernel_text(folder / "power1_label") or "VIN"
        yield PowerSource(
            name,
            "board",
            "INA238, sampled and integrated",
            watts=lambda: int(file.read_text()) * 1e-6,
        )


def _ina3221_sources(folder: Path) -> Iterator[PowerSource]:
    for label in sorted(folder.glob("in*_label")):
        number = label.name.removeprefix("in").removesuffix("_label")
        volts = folder / f"in{number}_input"
        amperes = folder / f"curr{number}_input"
        name = kernel_text(label)
        if not (name and volts.is_file() and amperes.is_file()) or name.lower().startswith(
            ("nc", "sum")
        ):
            continue
        patterns: tuple[tuple[PowerKind, re.Pattern[str]], ...] = (
            ("memory", _MEMORY_RAILS),
            ("gpu", _GPU_RAILS),
            ("cpu", _CPU_RAILS),
        )
        kinds = [kind for kind, pattern in patterns if pattern.search(name)]
        # On Orin Nano and NX, VDD_CPU_GPU_CV covers both.
        kind: PowerKind = kinds[0] if len(kinds) == 1 else "board"
        yield PowerSource(
            name,
            kind,
            "INA3221 rail, sampled and integrated",
            watts=lambda v=volts, a=amperes: _rail_watts(v, a),  # type: ignore[misc]
        )


def _rail_watts(volts: Path, amperes: Path) -> float:
    return int(volts.read_text()) * int(amperes.read_text()) * 1e-6


def rapl_sources(root: Path = Path("/")) -> list[PowerSource]:
    """Return the kernel's powercap counters (microjoules) of packages and their memory."""
    folder = root / "sys/class/powercap"
    zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if (zone / "name").is_file()]
    if not zones:
        raise MeasurementUnavailableError(
            "the kernel offers no RAPL counters under /sys/class/powercap (virtual machines have"
            " none)"
        )
    sources: list[PowerSource] = []
    for zone in zones:
        name = kernel_text(zone / "name") or zone.name
        if not re.match(r"package|dram|psys", name):  # cores and uncore are inside the package
            continue
        counter = zone / "energy_uj"
        try:
            counter.read_text()
        except OSError as error:
            raise MeasurementUnavailableError(
                f"{counter} cannot be read ({error.strerror}): only root may, unless its mode is"
                " changed"
            ) from None
        maximum = kernel_text(zone / "max_energy_range_uj")
        kind: PowerKind = (
            "memory" if name.startswith("dram") else "board" if name.startswith("psys") else "cpu"
        )
        wraps = int(maximum) * 1e-6 if maximum else None
        read = lambda c=counter: int(c.read_text()) * 1e-6  # noqa: E731 - bound to this zone
        sources.append(
            PowerSource(f"RAPL {name}", kind, "RAPL energy counter", joules=read, wraps=wraps)
        )
    if not sources:
        raise MeasurementUnavailableError(
            "the kernel's powercap zones hold no package, memory or platform counter"
        )
    return sources
