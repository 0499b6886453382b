"""Reads the interface of a release of cuda-python: functions, enums, constants and structures.

    python tools/cuda_surface.py

cuda-python's bindings are an ordinary wheel that can be imported without a GPU, so the interface is
read from the module itself, in a process of its own since two releases cannot be imported at once.
The fake CUDA of the tests is made from it. The result is JSON, and is kept in .cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RELEASES = {
    "12.6": "cuda-python==12.6.2.post1",
    "12.9": "cuda-bindings==12.9.10",
    "13": "cuda-bindings==13.5.0",
}
"""By CUDA's version. JetPack 6 has 12.6, from when cuda-python was one package."""

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "cuda"

_READ = """
import enum, inspect, json, sys
from cuda.bindings import runtime
surface = {"functions": {}, "enums": {}, "constants": {}, "structures": {}}
for name, item in vars(runtime).items():
    if name.startswith("_"):
        continue
    if isinstance(item, int):
        surface["constants"][name] = int(item)
    elif isinstance(item, type) and "Enum" in type(item).__name__ + str(item.__mro__):
        surface["enums"][name] = {member.name: int(member) for member in item}
    elif isinstance(item, type):
        surface["structures"][name] = [field for field in dir(item) if not field.startswith("_")]
    elif name.startswith("cuda") and callable(item):
        surface["functions"][name] = list(inspect.signature(item).parameters)
json.dump(surface, sys.stdout)
"""


def load_surface(cuda: str) -> dict[str, Any]:
    """Return the interface of a release in `RELEASES`, from .cache or from the package index.

    Raises:
        RuntimeError: no package index, or no wheel for this Python.
    """
    requirement = RELEASES[cuda]
    cache_file = (
        CACHE
        / f"{requirement.partition('==')[2]}-{sys.version_info.major}.{sys.version_info.minor}.json"
    )
    if not cache_file.exists():
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        partial = cache_file.with_suffix(f".{os.getpid()}")
        partial.write_text(_read(requirement))
        partial.replace(cache_file)
    surface: dict[str, Any] = json.loads(cache_file.read_text())
    return surface


def _read(requirement: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--only-binary=:all:",
            "--target",
            folder,
        ]
        _run([*install, requirement], {})
        return _run([sys.executable, "-c", _READ], {"PYTHONPATH": folder})


def _run(command: list[str], variables: dict[str, str]) -> str:
    process = subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    if process.returncode:
        last = (process.stderr or process.stdout).strip().splitlines()[-1:]
        raise RuntimeError(
            f"the surface of cuda-python needs the package index once: {' '.join(last)}"
        )
    return process.stdout


if __name__ == "__main__":
    for name in RELEASES:
        print(name, {kind: len(items) for kind, items in load_surface(name).items()})  # noqa: T201
