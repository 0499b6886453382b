"""The programs in examples/ run as their first lines say, each in a process of its own, on tiny
models."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import httpx
import pytest

from anyflow_deploy import Bundle
from tests.fakes.serving import eventually

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PROMPT = "a red fox in the snow"
SERVE = [sys.executable, "-c", "from anyflow_deploy.cli.serve import main; main()"]
TRITON = Path(os.environ.get("ANYFLOW_TRITON", ROOT / ".triton"))


def run_example(name: str, *words: str | Path) -> str:
    """What the program prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def count_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_every_example_has_a_line_and_a_test() -> None:
    text = (EXAMPLES / "README.md").read_text()
    here = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f"[{path.name}]({path.name})" in text
        assert f'run_example("{path.stem}"' in here
        assert f"python examples/{path.name} " in path.read_text().split('"""')[1]


def test_quickstart(tiny_bundle: Bundle, tmp_path: Path) -> None:
    printed = run_example("quickstart", tiny_bundle.path, PROMPT, tmp_path / "fox.mp4")
    assert (
        printed.startswith("4 steps, ")
        and count_frames(tmp_path / "fox.mp4") == tiny_bundle.manifest.video.frames
    )


def test_streaming(far_bundle: Bundle) -> None:
    lines = run_example("streaming", far_bundle.path, PROMPT).splitlines()
    assert len(lines) > 1
    assert lines[0].startswith("chunk 0: frames 0 to 0 after ") and lines[1].startswith(
        "chunk 1: frames 1 to "
    )


def test_deadline(tiny_bundle: Bundle) -> None:
    lines = run_example("deadline", tiny_bundle.path, PROMPT, "60").splitlines()
    assert len(lines) == 2
    assert all(
        re.fullmatch(r"video \d: \d+ steps in \d+\.\d\d s, the deadline was (met|missed)", line)
        for line in lines
    )


def test_diffusers_dropin(tiny_pipeline: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    run_example("diffusers_dropin", tiny_pipeline, tiny_bundle.path, PROMPT, tmp_path / "fox.mp4")
    assert count_frames(tmp_path / "fox.mp4") == tiny_bundle.manifest.video.frames


@pytest.fixture
def service(tiny_bundle: Bundle, tmp_path: Path) -> Iterator[str]:
    """The address of `anyflow-serve`."""
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [*SERVE, str(tiny_bundle.path), "--port", "0", "--grace", "0"],
            cwd=tmp_path,
            stderr=file,
        )
    try:
        eventually(lambda: "serving" in log.read_text() or server.poll() is not None, 120)
        found = re.search(r"on (http://127\.0\.0\.1:\d+)", log.read_text())
        assert found, log.read_text()
        eventually(lambda: answers(found[1]), 60)
        yield found[1]
    finally:
        server.terminate()
        server.wait(300)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_http_client(service: str, tiny_bundle: Bundle, tmp_path: Path) -> None:
    printed = run_example("http_client", service, PROMPT, tmp_path / "fox.mp4")
    assert (
        printed.startswith("4 steps, ")
        and count_frames(tmp_path / "fox.mp4") == tiny_bundle.manifest.video.frames
    )


@pytest.mark.triton
@pytest.mark.skipif(
    not (TRITON / ".ready").exists(),
    reason="no Triton Inference Server here; make test-triton gets it",
)
def test_triton_client(far_bundle: Bundle, tmp_path: Path) -> None:
    from anyflow_deploy.cli.options import parse_options
    from anyflow_deploy.cli.tritonserver import TritonOptions, triton
    from tests.triton_server import TritonServer

    repository = tmp_path / "models"
    assert (
        triton(
            parse_options(
                TritonOptions, [str(far_bundle.path), "--output", str(repository), "--threads", "1"]
            )
        )
        == 0
    )
    server = TritonServer(TRITON, repository, tmp_path / "log")
    server.start()
    try:
        server.wait_ready("anyflow")
        lines = run_example("triton_client", server.grpc, PROMPT, tmp_path / "fox.mp4").splitlines()
        assert (
            len(lines) > 1
            and count_frames(tmp_path / "fox.mp4") == far_bundle.manifest.video.frames
        )
    finally:
        server.kill()
