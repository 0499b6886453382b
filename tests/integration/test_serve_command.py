"""`anyflow-serve` as a user starts it: a real process on a tiny causal bundle; the documents'
examples; the page in a browser."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import httpx
import pytest

from anyflow_deploy import Bundle
from anyflow_deploy.cli.generate import GenerateOptions, generate
from tests.fakes.serving import eventually

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "how-to" / "serving.md").read_text()
COMMAND = [sys.executable, "-c", "from anyflow_deploy.cli.serve import main; main()"]
PROMPT = "a red fox in the snow"
SCREENS = os.environ.get("ANYFLOW_SCREENSHOTS")
"""A folder to leave pictures of the page in."""


@dataclass
class Command:
    """A running `anyflow-serve`."""

    url: str
    folder: Path
    client: httpx.Client
    bundle: Path

    def create_and_wait(self, **fields: object) -> dict[str, Any]:
        answer = self.client.post("/v1/videos", json={"prompt": PROMPT, **fields})
        assert answer.status_code == 200, answer.text
        return self.wait_until_ended(answer.json()["id"])

    def wait_until_ended(self, name: str) -> dict[str, Any]:
        eventually(lambda: self.snapshot(name)["status"] in ("completed", "failed"))
        return self.snapshot(name)

    def snapshot(self, name: str) -> dict[str, Any]:
        return dict(self.client.get(f"/v1/videos/{name}").json())


@pytest.fixture(scope="module")
def command(far_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """The server of this module; when it is stopped it says so, and its exit status is 0."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "my-causal").symlink_to(far_bundle.path)
    log = folder / "log"
    with log.open("w") as file:
        words = [
            *COMMAND,
            "my-causal",
            "--port",
            "0",
            "--max-steps",
            "400",
            "--warm-up",
            "--grace",
            "0",
        ]
        server = subprocess.Popen(words, cwd=folder, stderr=file)
    try:
        eventually(lambda: "serving" in log.read_text() or server.poll() is not None)
        found = re.search(r"on (http://127\.0\.0\.1:\d+)", log.read_text())
        assert found, log.read_text()
        with httpx.Client(base_url=found[1], timeout=60) as client:
            eventually(lambda: _answers(client))
            yield Command(found[1], folder, client, far_bundle.path)
            running = client.post(
                "/v1/videos", json={"prompt": PROMPT, "num_inference_steps": 400}
            ).json()["id"]
            eventually(
                lambda: client.get(f"/v1/videos/{running}").json()["status"] == "in_progress"
            )
            server.send_signal(signal.SIGTERM)
            assert server.wait(300) == 0, log.read_text()
        assert (
            "stopped; finished videos stay in anyflow-videos" in log.read_text()
            and "Traceback" not in log.read_text()
        )
        assert "server_shutdown after" in log.read_text()
        videos = [f for f in (folder / "anyflow-videos").iterdir() if f.is_dir()]
        assert running not in [f.name for f in videos] and all(
            (f / "video.json").is_file() for f in videos
        )
    finally:
        server.kill()
        server.wait()


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def frames_of(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


# The same videos as the command line's


def test_a_served_video_is_anyflow_generates_byte_for_byte(
    command: Command, tmp_path: Path
) -> None:
    video = command.create_and_wait(
        num_frames=29, size="96x64", num_inference_steps=2, first_steps=3, seed=5
    )
    assert (
        video["status"] == "completed"
        and video["steps"] == [3, 2, 2, 2]
        and video["timings"]["first_frame"] > 0
    ), video
    output = tmp_path / "fox.mp4"
    chunks = (1, 3, 3, 1)
    asked = {
        "bundle": command.bundle,
        "prompt": PROMPT,
        "output": output,
        "seed": 5,
        "steps": 2,
        "first_steps": 3,
    }
    generate(GenerateOptions(**asked, frames=29, chunks=chunks, height=64, width=96, stream=True))  # type: ignore[arg-type]
    assert command.client.get(f"/v1/videos/{video['id']}/content").content == output.read_bytes()


# Deadlines, cancelling


def test_deadlines_share_one_pace(command: Command) -> None:
    """The warm-up has learnt it: no draft is made, so two steps are two."""
    video = command.create_and_wait(num_frames=13, deadline_ms=60000, num_inference_steps=2)
    assert (video["steps"], video["deadline_met"]) == ([2, 2], True)
    assert _metric(command, "anyflow_drafts_total") == 0
    hasty = command.create_and_wait(num_frames=13, deadline_ms=0.001)
    assert (hasty["steps"], hasty["deadline_met"]) == ([1, 1], False)


def test_enough_is_enough(command: Command) -> None:
    order = {"prompt": PROMPT, "num_frames": 13, "deadline_ms": 300000, "num_inference_steps": 400}
    name = command.client.post("/v1/videos", json=order).json()["id"]
    eventually(lambda: command.snapshot(name)["progress"] > 0)
    assert command.client.post(f"/v1/videos/{name}/finish").status_code == 200
    video = command.wait_until_ended(name)
    assert video["status"] == "completed" and video["steps"][-1] == 1 and video["steps"][0] < 400
    refused = command.client.post(
        f"/v1/videos/{command.create_and_wait(num_frames=1)['id']}/finish"
    )
    assert refused.status_code == 400 and "only a deadline" in refused.json()["error"]["message"]


def test_cancelling_in_the_middle_leaves_the_engine_fit(command: Command) -> None:
    name = command.client.post(
        "/v1/videos", json={"prompt": PROMPT, "num_inference_steps": 400}
    ).json()["id"]
    eventually(lambda: command.snapshot(name)["progress"] > 0)
    command.client.post(f"/v1/videos/{name}/cancel")
    assert command.wait_until_ended(name)["error"]["code"] == "cancelled"
    assert not (command.folder / "anyflow-videos" / name).exists()
    assert command.create_and_wait(num_frames=1)["status"] == "completed"


def test_a_prompt_of_too_many_tokens_is_refused_at_once(command: Command) -> None:
    answer = command.client.post("/v1/videos", json={"prompt": "fox " * 600})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"
    assert "tokens and the model takes 512; shorten it" in answer.json()["error"]["message"]


def test_a_port_that_is_taken_is_known_before_anything_is_loaded(
    command: Command, tmp_path: Path
) -> None:
    words = [*COMMAND, str(command.bundle), "--port", command.url.rsplit(":", 1)[1]]
    done = subprocess.run(
        words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert (
        done.returncode == 1
        and "Address already in use. Choose another --port" in done.stderr.replace("\n", " ")
    )
    assert not list(tmp_path.iterdir())


# What the documents promise


def test_the_documents_commands_run(command: Command, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    blocks = [
        block for block in re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL) if "curl" in block
    ]
    assert len(blocks) == 3
    for block in blocks:
        script = re.sub(r"^anyflow-serve .*$", "", block, flags=re.MULTILINE).replace(
            "http://127.0.0.1:8000", command.url
        )
        done = subprocess.run(
            ["bash", "-euc", script],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        assert '"object":"list"' in done.stdout or '"error":{' not in done.stdout
    assert frames_of(tmp_path / "fox.mp4") == 17 and frames_of(tmp_path / "fox-sync.mp4") == 17


def test_the_documents_python_runs(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block.replace("127.0.0.1:8000", command.url.removeprefix("http://")), names)
    assert names["video"]["status"] == "completed" and frames_of(tmp_path / "fox-stream.mp4") == 29


def test_the_documents_commands_for_other_machines_are_flags_there_are() -> None:
    from anyflow_deploy.cli.options import parse_options
    from anyflow_deploy.cli.serve import ServeOptions

    lines = [
        line.split("#")[0].split()
        for line in DOCUMENT.splitlines()
        if line.startswith("anyflow-serve ")
    ]
    assert len(lines) == 2
    for words in lines:
        parse_options(ServeOptions, words[1:])
    flags = set(re.findall(r"`(--[a-z-]+)", DOCUMENT))
    assert flags <= {f"--{name.replace('_', '-')}" for name in ServeOptions.model_fields}


def test_the_document_names_every_field_and_metric(command: Command) -> None:
    from anyflow_deploy.serving.request import VideoRequest

    assert not [
        name
        for name in VideoRequest.model_fields
        if f"`{name}`" not in DOCUMENT and name not in DOCUMENT
    ]
    served = set(
        re.findall(r"^# TYPE (anyflow_\w+)", command.client.get("/metrics").text, re.MULTILINE)
    )
    named = set(re.findall(r"anyflow_\w+", DOCUMENT)) - {"anyflow_deploy"}
    assert named == {name for name in served if not name.endswith("_created")} - {
        "anyflow_build_info"
    }


# The page


def test_the_page_shows_frames_while_they_are_made(command: Command) -> None:
    with Browser() as page:
        problems: list[str] = []
        page.on(
            "console",
            lambda message: problems.append(message.text) if message.type == "error" else None,
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(command.url)
        _until(page, "document.getElementById('size').value === '96x64'")
        assert "far-tiny, chunk by chunk, 16 frames a second" in page.inner_text("#model")
        page.fill("#frames", "29")
        page.fill("#seed", "7")
        _slide(page, "steps", 24)
        page.click("#go")
        # Frames are drawn although the video is not whole.
        _until(page, "Number(document.getElementById('screen').dataset.drawn || 0) >= 2")
        assert (
            "Working" in page.inner_text("#status") and page.locator("#timeline span").count() < 4
        )
        _shot(page, "working")
        _until(page, "document.getElementById('status').textContent === 'Done.'")
        assert page.locator("#timeline span").count() == 4 and page.is_enabled("#go")
        assert "24, 24, 24, 24" in page.inner_text("#numbers") and page.inner_text("#problem") == ""
        colours = page.evaluate(
            "new Set(document.getElementById('screen').getContext('2d').getImageData(0, 0, 96,"
            " 64).data).size"
        )
        assert colours > 10  # a picture, not an empty canvas
        with page.expect_download() as download:
            page.click("#download")
        assert frames_of(download.value.path()) == 29
        _shot(page, "done")

        # A deadline, finished early, then one that is cancelled
        page.check("input[value=deadline]")
        assert page.is_visible("#deadline") and not page.is_visible("#steps")
        _slide(page, "deadline", 100)
        page.click("#go")
        page.click("#finish")
        _until(page, "document.getElementById('status').textContent === 'Done.'")
        page.check("input[value=steps]")
        _slide(page, "steps", 400)
        page.click("#go")
        page.click("#cancel")
        _until(page, "document.getElementById('status').textContent === 'Cancelled.'")

        page.fill("#size", "50x64")
        page.click("#go")
        _until(page, "document.getElementById('problem').textContent.includes('width is 50')")
        _shot(page, "refused")
        assert [p for p in problems if "400" not in p] == []
        assert all(url.startswith((command.url, "data:", "blob:")) for url in asked)


def _until(page: Any, true: str) -> None:
    """Wait; Playwright's own way of it evaluates text inside the page, which the page's policy
    forbids."""
    eventually(lambda: page.evaluate(true))


def _slide(page: Any, name: str, value: int) -> None:
    script = (
        "([n, v]) => { const s = document.getElementById(n); s.value = v; s.dispatchEvent(new"
        " Event('input')); }"
    )
    page.evaluate(script, [name, value])


def _shot(page: Any, name: str) -> None:
    if SCREENS:
        page.screenshot(path=Path(SCREENS) / f"{name}.png", full_page=True)


class Browser:
    """A page in headless Chromium: Playwright's own, else the system's; skips where there is
    none."""

    def __enter__(self) -> Any:
        playwright = pytest.importorskip(
            "playwright.sync_api", reason="playwright is not installed"
        )
        self._driver = playwright.sync_playwright().start()
        try:
            own = Path(self._driver.chromium.executable_path)
            found = next(
                (
                    p
                    for name in ("chromium", "chromium-browser", "google-chrome")
                    if (p := shutil.which(name))
                ),
                None,
            )
            if not own.exists() and found is None:
                pytest.skip(
                    "no Chromium: neither Playwright's (playwright install chromium) nor the"
                    " system's (apt install chromium)"
                )
            flags = ["--no-sandbox"] if os.geteuid() == 0 else []
            self._chrome = self._driver.chromium.launch(
                executable_path=None if own.exists() else found, args=flags
            )
        except BaseException:
            self._driver.stop()
            raise
        self.page = self._chrome.new_page(viewport={"width": 1200, "height": 800})
        self.page.set_default_timeout(30000)
        return self.page

    def __exit__(self, *_: object) -> None:
        self._chrome.close()
        self._driver.stop()


def _metric(command: Command, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", command.client.get("/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])
