"""Building the C++ library for the tests: once a session for each configuration, with the tools of this Python environment."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parent.parent / "engines" / "cpp"


def tool(name: str) -> str:
    """cmake or ninja: of this environment (the dev extra), or the system's."""
    here = Path(sys.executable).parent / name
    found = str(here) if here.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: pip install 'anyflow-deploy[dev]' brings it")
    return found


def compiler() -> str:
    """The C++ compiler that CMake will take."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    pytest.skip("there is no C++ compiler here: apt install g++ (or name one in CXX), and the C++ library is tested")


def run(*words: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    """A command that has to succeed; what it said is in the failure."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done


def configured(folder: Path, *settings: str, source: Path = SOURCE) -> str:
    """Configure into `folder`; what CMake said."""
    compiler()
    where = (f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DANYFLOW_PYTHON={sys.executable}") if source == SOURCE else ()
    return run(tool("cmake"), "-S", source, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", *where, *settings).stdout


def built(folder: Path, *targets: str) -> Path:
    """Build targets in a configured folder."""
    run(tool("cmake"), "--build", folder, "--parallel", "2", *(["--target", *targets] if targets else []))
    return folder


class Conformance:
    """The program `conformance`, asked one question after the other."""

    def __init__(self, program: Path) -> None:
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
        self._process = subprocess.Popen([str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def __call__(self, question: str, **details: Any) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"question": question, **details}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the program died with {self._process.wait()} over {question} {details}"
        return dict(json.loads(line))

    def close(self) -> None:
        """End it; a sanitizer's complaint (a leak, say) is its exit status."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        assert self._process.wait(60) == 0
        self._process.stdout.close()


@functools.cache
def sanitizers_work() -> bool:
    """Whether the compiler can link its address sanitizer."""
    words = [compiler(), "-x", "c++", "-fsanitize=address,undefined", "-o", os.devnull, "-"]
    return subprocess.run(words, input="int main() {}", text=True, capture_output=True, check=False).returncode == 0
