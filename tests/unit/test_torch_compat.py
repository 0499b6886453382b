"""The private interfaces of torch are there, and are private to one module."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_deploy.engines.torch_common import compat
from anyflow_deploy.errors import BackendError

ROOT = Path(__file__).parents[2]
PRIVATE = re.compile(r"\btorch\._(?!_version__)\w+|from torch\._\w+")
ELSEWHERE = {
    "engines/aotinductor/compiler.py": "from torch._inductor import aoti_compile_and_package"
}
"""Public for all that torch's documents say, under a private name."""


def find_attribute(dotted: str) -> Any:
    """Import as much of a dotted name as is a module; look the rest up."""
    words = dotted.split(".")
    for count in range(len(words), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(words[:count]))
        except ImportError:
            continue
        for word in words[count:]:
            found = getattr(found, word)
        return found
    raise ImportError(dotted)


@pytest.mark.parametrize("dotted", compat.PRIVATE_NAMES)
def test_this_torch_has_every_private_name(dotted: str) -> None:
    """A failure here names what a new release moved; mend it in compat.py, with both spellings."""
    assert callable(find_attribute(dotted))


def test_private_names_stand_in_one_module() -> None:
    for folder in ("anyflow_deploy", "engines", "export", "training"):
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            lines = [line.strip() for line in path.read_text().splitlines()]
            code = [
                line
                for line in lines
                if PRIVATE.search(line) and not line.startswith(("#", "- ", "`"))
            ]
            if not name.endswith("torch_common/compat.py"):
                assert set(code) <= {ELSEWHERE.get(name.removeprefix("anyflow_deploy/"), "")}, name


def test_the_script_calls_the_compiler_and_links_to_its_own_functions(tmp_path: Path) -> None:
    script = compat.make_compiler_script(compat.find_cpp_compiler(), tmp_path)
    assert script == compat.make_compiler_script(compat.find_cpp_compiler(), tmp_path)
    source, library = tmp_path / "f.cpp", tmp_path / "f.so"
    source.write_text("int g() { return 1; }\nint f() { return g(); }\n")
    subprocess.run([script, "-shared", "-fPIC", "-O0", str(source), "-o", str(library)], check=True)
    plain = subprocess.run(
        ["nm", "-D", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert " T _Z1fv" in plain
    relocations = subprocess.run(
        ["readelf", "-r", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert "_Z1gv" not in relocations, "the call of g() can be given to another library's g()"


def test_a_wrapper_knows_the_type_fp8(tmp_path: Path) -> None:
    """Inductor of torch 2.11 names the type without the header that declares it."""
    script = compat.make_compiler_script(compat.find_cpp_compiler(), tmp_path)
    include = Path(torch.__file__).parent / "include"
    code = "c10::Float8_e4m3fn* f() { return nullptr; }\n"
    for name, compiles in (("a.wrapper.cpp", True), ("a.cpp", False)):
        (tmp_path / name).write_text(code)
        command = [script, "-std=c++17", f"-I{include}", "-fsyntax-only", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == compiles, done.stderr


def test_a_package_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt2"
    broken.write_bytes(b"not an archive")
    with pytest.raises(BackendError, match=r"cannot be opened|ends the process"):
        compat.check_packages_open([broken], -1)


def test_a_crash_is_an_error_with_its_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_OPEN", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(BackendError, match=r"signal 11.*CXX"):
        compat.check_packages_open([], -1)


def test_options_that_this_torch_lacks_are_left_out() -> None:
    options = compat.select_known_options({"max_autotune": False, "aot_inductor.no_such_option": 1})
    assert options == {"max_autotune": False}
