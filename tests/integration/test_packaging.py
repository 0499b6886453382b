"""What is built from this repository: the wheel, the sdist, and an environment with the wheel.

Nothing here is editable. The installed wheel runs in a virtual environment that holds `[cpu]` and
nothing more, so an import of torch or of a module that only the repository has would fail.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anyflow_deploy import Bundle, Schedule, __version__, load_engine, noise, sample
from tests.artifact_cache import ARTIFACTS

ROOT = Path(__file__).parents[2]
LINKS = ("engines", "export", "training")


def build(target: str, source: Path, folder: Path) -> Path:
    """Build a wheel or an sdist, without the network; the file."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.iterdir()
    return path


def build_once(target: str) -> Path:
    """Build from this repository, once for all workers."""

    def make(folder: Path) -> None:
        partial = folder.with_name(f".{folder.name}.partial")
        build(target, ROOT, partial)
        partial.rename(folder)

    return next(ARTIFACTS.cached_path("distribution", target, make).iterdir())


@pytest.fixture(scope="session")
def wheel() -> Path:
    return build_once("wheel")


@pytest.fixture(scope="session")
def sdist() -> Path:
    return build_once("sdist")


@pytest.fixture(scope="session")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist's folder, unpacked as pip does it."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"anyflow_deploy-{__version__}"


def outside_environment() -> dict[str, str]:
    """Environment variables of a shell that knows nothing of this repository."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in package} == {"anyflow_deploy"}
    for folder in ("anyflow_deploy", *LINKS):
        prefix = "" if folder == "anyflow_deploy" else "anyflow_deploy/"
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{prefix}{path.relative_to(ROOT).as_posix()}" in names
    assert "anyflow_deploy/py.typed" in names
    assert "anyflow_deploy/engines/cpp/include/anyflow/anyflow.h" in names
    assert {
        f"anyflow_deploy/serving/page/{name}" for name in ("index.html", "page.js", "page.css")
    } <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_holds_no_tests_and_no_fakes(wheel: Path) -> None:
    folders = {part for name in zipfile.ZipFile(wheel).namelist() for part in Path(name).parts[:-1]}
    assert folders.isdisjoint({"tests", "fakes", "standin", "__pycache__"})


def test_the_wheel_needs_little(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("METADATA"))
        lines = archive.read(name).decode().splitlines()
    assert f"Version: {__version__}" in lines
    assert "Classifier: Operating System :: POSIX :: Linux" in lines
    needed = [line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    names = {re.split(r"[ ><=]", line.split(": ")[1])[0] for line in needed}
    assert names == {"fire", "numpy", "pydantic", "rich", "safetensors"}


def list_with_git(*flags: str) -> set[str]:
    """Ask git for this repository's files."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout: what the sdist has to hold is not known")
    done = subprocess.run(
        ["git", "ls-files", "-z", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {name for name in done.stdout.split("\0") if name and os.path.lexists(ROOT / name)}


def test_the_sdist_is_what_git_tracks(sdist: Path) -> None:
    tracked = list_with_git()
    untracked = list_with_git("--others", "--exclude-standard")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert tracked - names == set()
    assert names - tracked - untracked == {"PKG-INFO"}


def test_the_sdist_keeps_the_links(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        links = {entry.name.split("/", 1)[1]: entry.linkname for entry in archive if entry.issym()}
    assert links == {f"anyflow_deploy/{name}": f"../{name}" for name in LINKS}


def test_the_sdist_builds_the_same_wheel(unpacked: Path, wheel: Path, tmp_path: Path) -> None:
    again = build("wheel", unpacked, tmp_path / "wheel")
    assert again.name == wheel.name
    assert again.read_bytes() == wheel.read_bytes()


def test_the_sdist_runs_its_tests(unpacked: Path) -> None:
    """Two files of them, one of which imports `tools`; all others import the same conftest."""
    files = ["tests/unit/test_schedule.py", "tests/integration/test_project_files.py"]
    environment = {**outside_environment(), "PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    code = "import anyflow_deploy, tools.tensorrt_headers; print(anyflow_deploy.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=unpacked,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()).is_relative_to(unpacked)
    done = subprocess.run(
        command, cwd=unpacked, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def copy_without_links(folder: Path, as_files: bool) -> Path:
    """Copy the package's first files as an archive without links unpacks them."""
    package = folder / "anyflow_deploy"
    package.mkdir()
    for name in ("__init__.py", "_version.py"):
        shutil.copy(ROOT / "anyflow_deploy" / name, package)
    if as_files:
        for name in LINKS:
            (package / name).write_text(f"../{name}")
    return folder


@pytest.mark.parametrize(
    "as_files", [True, False], ids=["links are text files", "links are missing"]
)
def test_a_checkout_without_links_says_so(tmp_path: Path, as_files: bool) -> None:
    folder = copy_without_links(tmp_path, as_files)
    command = [sys.executable, "-c", "import anyflow_deploy.engines"]
    done = subprocess.run(
        command, cwd=folder, env=outside_environment(), capture_output=True, text=True, check=False
    )
    last = done.stderr.strip().splitlines()[-1]
    assert (
        last
        == "ImportError: anyflow_deploy/engines is not the link to engines/ that it has to be: this"
        " copy was made without symbolic links (as a zip archive or on Windows). Clone the"
        " repository with git on Linux, or install the wheel."
    )


class Fresh:
    """A virtual environment that holds nothing but the built wheel with `[cpu]`."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        """Create it, and install the wheel from the package index's dependencies."""
        self.bin = folder / "bin"
        venv.create(folder, with_pip=True)
        probe = self.run("pip", "download", "--no-deps", "--dest", str(folder / "probe"), "fire")
        if probe.returncode != 0:
            reason = (probe.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            pytest.skip(
                f"the package index cannot be reached, so the wheel cannot be installed: {reason}"
            )
        constraints = str(ROOT / "constraints.txt")
        done = self.run("pip", "install", "--quiet", "-c", constraints, f"{wheel}[cpu]")
        assert done.returncode == 0, done.stderr

    def run(self, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run one of its commands."""
        environment = {**outside_environment(), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        command = [str(self.bin / words[0]), *words[1:]]
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )


@pytest.fixture(scope="session")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fresh]:
    folder = tmp_path_factory.mktemp("fresh")
    yield Fresh(folder / "venv", wheel)
    shutil.rmtree(folder)


@pytest.fixture
def words() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Prompt embeddings as a text encoder's."""
    return noise((1, 8, 64), 1)


API = """
import importlib.util, sys
from pathlib import Path
from safetensors.numpy import load_file, save_file
import anyflow_deploy
from anyflow_deploy import Schedule, load_bundle, load_engine, noise, sample

bundle, text, output = sys.argv[1:]
engine = load_engine(load_bundle(bundle))
start = noise((1, 2, 16, 4, 6), seed=0)
latents = sample(engine, start, load_file(text)["prompt_embeds"], Schedule.uniform(4))
save_file({"latents": latents}, output)
assert importlib.util.find_spec("torch") is None
assert (Path(anyflow_deploy.__file__).parent / "py.typed").exists()
print(anyflow_deploy.__version__, anyflow_deploy.__file__)
"""


def test_the_installed_wheel_samples(
    fresh: Fresh, tiny_bundle: Bundle, words: np.ndarray[Any, np.dtype[np.float32]], tmp_path: Path
) -> None:
    save_file({"prompt_embeds": words}, tmp_path / "text.safetensors")
    arguments = (str(tiny_bundle.path), "text.safetensors", "latents.safetensors")
    done = fresh.run("python", "-c", API, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    version, path = done.stdout.split()
    assert version == __version__
    assert Path(path).is_relative_to(fresh.bin.parent)
    start = noise((1, 2, 16, 4, 6), seed=0)
    expected = sample(load_engine(tiny_bundle), start, words, Schedule.uniform(4))
    found = load_file(tmp_path / "latents.safetensors")["latents"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_installed_commands_run(
    fresh: Fresh, tiny_bundle: Bundle, words: np.ndarray[Any, np.dtype[np.float32]], tmp_path: Path
) -> None:
    bundle = str(tiny_bundle.path)
    done = fresh.run("anyflow-inspect", bundle, "--verify", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    save_file({"prompt_embeds": words}, tmp_path / "text.safetensors")
    size = ("--height", "32", "--width", "48", "--frames", "5")
    inputs = ("--prompt-embeds", "text.safetensors", "--steps", "2", *size)
    output = ("--output", "latents.safetensors")
    done = fresh.run("anyflow-generate", bundle, *inputs, *output, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert load_file(tmp_path / "latents.safetensors")["latents"].shape == (1, 2, 16, 4, 6)


def test_every_installed_command_answers_help(fresh: Fresh) -> None:
    """No command needs more than `[cpu]` to say what it does."""
    commands = sorted(path.name for path in fresh.bin.glob("anyflow-*"))
    assert commands == re.findall(
        r"^(anyflow-\w+) = ", (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    for command in commands:
        done = fresh.run(command, "--help")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: {command}")
