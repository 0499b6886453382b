"""What other people's clients send to the HTTP service, defaults below its limits, and loading."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from anyflow_deploy import AnyFlowError
from anyflow_deploy.bundle.manifest import records_from_ranges
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.cli.serve import ServeOptions, limits_from_options, rules_from_options
from anyflow_deploy.serving.access import AccessRules
from anyflow_deploy.serving.default_video import default_video
from anyflow_deploy.serving.endpoints import ENDPOINTS
from anyflow_deploy.serving.errors import api_error_from_exception
from anyflow_deploy.serving.limits import Limits
from anyflow_deploy.serving.loading import BackgroundLoader
from anyflow_deploy.serving.request import VideoRequest, validate_request
from anyflow_deploy.serving.service import LoadingError
from anyflow_deploy.shape_ranges import Range, narrow_ranges, widest_ranges
from tests.fakes.serving import PacedGenerator, RunningServer, eventually, fake_manifest, serving

TOKEN = "fox-in-the-snow-1234567890"
PAGE = "https://fox.example"
PICTURE = b"\x89PNG" + bytes(1 << 20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One that makes every video at once, of at most 13 frames and 1024 pixels."""
    with serving(
        PacedGenerator(), tmp_path_factory.mktemp("videos"), frames=15, pixels=1100, steps=3
    ) as served:
        yield served


# Defaults and limits


def test_a_prompt_alone_is_served_within_every_limit(server: RunningServer) -> None:
    """The bundle's own video is 17 frames of 48x32 in 4 steps."""
    video = server.create_and_wait()
    made = (video["num_frames"], video["size"], video["num_inference_steps"], video["status"])
    assert made == (13, "32x32", 3, "completed")
    model = server.client.get("/v1/models").json()["data"][0]
    assert model["default"] == {"size": "32x32", "num_frames": 13, "num_inference_steps": 3}
    for field, value in (("num_frames", 17), ("size", "48x32"), ("num_inference_steps", 4)):
        asked = server.create(**{field: value})
        assert asked.status_code == 400 and asked.json()["error"]["param"] == field


@pytest.mark.parametrize("name", ["tiny", "far-tiny"])
def test_defaults_stay_what_they_are_where_limits_allow(name: str) -> None:
    manifest = fake_manifest(name)
    assert default_video(manifest, Limits(frames=17, pixels=48 * 32)) == (17, 32, 48)
    smaller = (1, 16, 32) if name == "tiny" else (1, 32, 32)  # causal sides begin at 32
    assert default_video(manifest, Limits(frames=1, pixels=32 * 32)) == smaller


def test_a_flag_below_everything_is_refused_with_what_would_do(tmp_path: Path) -> None:
    manifest = fake_manifest("tiny")
    base = widest_ranges(manifest.architecture)
    ranges = narrow_ranges(base, {"frames": Range(3, 5), "width": Range(6, 6, 2)})
    fixed: Any = SimpleNamespace(
        manifest=manifest.model_copy(update={"ranges": records_from_ranges(ranges)})
    )
    for flags, message in (
        ("--max-frames 8", "--max-frames is 8; the shortest video of this bundle has 9 frames"),
        ("--max-pixels 700", r"--max-pixels is 700; .* has 768 pixels \(48x16\)"),
    ):
        options = parse_options(ServeOptions, ["bundle", *flags.split()])
        with pytest.raises(AnyFlowError, match=message):
            limits_from_options(options, fixed)
    options = parse_options(ServeOptions, ["bundle", "--max-frames", "12"])
    limits = limits_from_options(options, fixed)
    made = validate_request(VideoRequest(prompt="x"), fixed.manifest, limits, "tiny")
    assert made.num_frames == 9


# Bodies


def test_fields_of_other_servers_are_understood(server: RunningServer) -> None:
    fields = {"width": 32, "height": 32, "fps": 16, "n": 1, "user": "someone", "seconds": "0.3"}
    silent = {"negative_prompt": "", "guidance_scale": None, "input_reference": None}
    video = server.create_and_wait(**fields, **silent)
    assert (video["size"], video["num_frames"], video["status"]) == ("32x32", 5, "completed")
    assert "someone" not in str(video)
    assert server.create_and_wait(height=32)["size"] == "32x32"


def test_a_picture_of_a_megabyte_is_refused_for_what_it_is(server: RunningServer) -> None:
    multipart = server.client.post(
        "/v1/videos", data={"prompt": "x"}, files={"input_reference": ("a.png", PICTURE)}
    )
    text = {"prompt": "x", "input_reference": {"image_url": "data:," + "A" * len(PICTURE)}}
    other = server.client.post("/v1/videos", data={"prompt": "x"}, files={"mask": ("a", PICTURE)})
    for answer, param in (
        (multipart, "input_reference"),
        (server.client.post("/v1/videos", json=text), "input_reference"),
        (other, "mask"),
    ):
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param)
        assert "makes videos from words alone" in error["message"]
    long = server.client.post("/v1/videos", json={"prompt": "x" * len(PICTURE)})
    assert (long.status_code, long.json()["error"]["code"]) == (413, "body_too_large")


def test_openais_client_sends_a_picture(server: RunningServer) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"http://{server.url}/v1", api_key="none") as client:
        with pytest.raises(openai.BadRequestError, match="makes videos from words alone"):
            client.videos.create(prompt="x", input_reference=("a.png", PICTURE))
        with pytest.raises(openai.NotFoundError, match="remix is not supported"):
            client.videos.remix("video_0", prompt="x")


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain;charset=UTF-8"])
def test_json_without_its_header_is_json(server: RunningServer, kind: str) -> None:
    headers = {"content-type": kind}
    body = b' {"prompt": "a=b & c", "num_frames": 1}'
    answer = server.client.post("/v1/videos", content=body, headers=headers)
    assert answer.status_code == 200 and answer.json()["prompt"] == "a=b & c"
    broken = server.client.post("/v1/videos", content=b'{"prompt": ', headers=headers)
    assert broken.json()["error"]["code"] == "invalid_json"


# Paths and methods


def test_the_table_of_paths_is_the_routes(server: RunningServer) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    routes = {path: {word.upper() for word in methods} for path, methods in paths.items()}
    routes["/openapi.json"] = {"GET"}
    assert routes == {path: set(methods) for path, methods in ENDPOINTS.items()}


def test_head_is_answered_wherever_get_is(server: RunningServer) -> None:
    name = server.create_and_wait()["id"]
    paths = ["/", "/page.js", *(path for path, methods in ENDPOINTS.items() if "GET" in methods)]
    for pattern in paths:
        path = pattern.format(video_id=name, model="far-tiny")
        head, get = server.client.head(path), server.client.get(path)
        assert (head.status_code, head.content) == (get.status_code, b"") == (200, b""), path
        if pattern != "/metrics":  # which counts these requests
            assert head.headers["content-length"] == get.headers["content-length"]
    assert server.client.head("/v1/videos/sync").status_code == 404  # an id, to GET
    assert server.client.head(f"/v1/videos/{name}/cancel").status_code == 405
    metrics = server.client.get("/metrics").text
    assert 'method="HEAD",route="/v1/videos/{video_id}/content",status="200"' in metrics


def test_metrics_may_be_public(tmp_path: Path) -> None:
    with serving(PacedGenerator(), tmp_path, rules=AccessRules(TOKEN, (), True)) as server:
        codes = [server.client.get(path).status_code for path in ("/metrics", "/v1/videos")]
        assert codes == [200, 401]


@pytest.mark.parametrize("prefix", ["", "/fox"])
def test_behind_a_proxy(tmp_path: Path, prefix: str) -> None:
    """Whether the proxy leaves the prefix or removes it."""
    with serving(PacedGenerator(), tmp_path, rules=AccessRules(TOKEN, root_path="/fox")) as server:
        assert server.client.get(f"{prefix}/health").status_code == 200
        assert server.client.get(f"{prefix}/v1/videos").status_code == 401
        headers = {"Authorization": f"Bearer {TOKEN}"}
        body = {"prompt": "x", "num_frames": 1}
        made = server.client.post(f"{prefix}/v1/videos", json=body, headers=headers)
        assert made.status_code == 200
        address = f"ws://{server.url}{prefix}/v1/videos/{made.json()['id']}/stream"
        with connect(address, additional_headers=headers) as stream:
            assert '"type": "end"' in list(stream)[-1]
        unknown = server.client.get(f"{prefix}/v1/video", headers=headers).json()["error"]
        assert unknown["message"].startswith("'/v1/video' is no path of this server")
        document = server.client.get(f"{prefix}/openapi.json", headers=headers).json()
        assert document["servers"] == [{"url": "/fox"}]
        page = server.client.get("/fox", follow_redirects=True)
        assert page.url.path == "/fox/" and "page.js" in page.text


# Other pages


def test_a_page_that_is_named_may_ask(tmp_path: Path) -> None:
    with serving(PacedGenerator(), tmp_path, rules=AccessRules(origins=(PAGE,))) as server:
        question = {
            "Origin": PAGE,
            "Access-Control-Request-Method": "DELETE",
            "Access-Control-Request-Headers": "authorization,x-stainless-os",
        }
        permission = server.client.options("/v1/videos/x", headers=question)
        assert permission.status_code == 200
        assert permission.headers["access-control-allow-origin"] == PAGE
        assert "DELETE" in permission.headers["access-control-allow-methods"]
        assert "x-stainless-os" in permission.headers["access-control-allow-headers"]
        answer = server.client.get("/v1/videos/x", headers={"Origin": PAGE})
        assert answer.status_code == 404  # a refusal can be read, too
        assert answer.headers["access-control-allow-origin"] == PAGE
        other = {"Origin": "https://evil.example"}
        refused = server.client.get("/v1/videos", headers=other)
        assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers
        assert server.client.options("/v1/videos", headers={**question, **other}).status_code == 400
        with pytest.raises(InvalidStatus):
            connect(f"ws://{server.url}/v1/videos/x/stream", origin="https://evil.example")  # type: ignore[arg-type]


def test_a_page_needs_the_token_where_there_is_one(tmp_path: Path) -> None:
    with serving(PacedGenerator(), tmp_path, rules=AccessRules(TOKEN, ("*",))) as server:
        question = {"Origin": PAGE, "Access-Control-Request-Method": "GET"}
        assert server.client.options("/v1/videos", headers=question).status_code == 200
        refused = server.client.get("/v1/videos", headers={"Origin": PAGE})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cors-origin *", "Name the origins, or give --token-file"),
        ("--cors-origin fox.example", "allowed are a scheme and a host"),
        ("--cors-origin https://fox.example/page", "allowed are a scheme and a host"),
        ("--root-path fox", "--root-path is 'fox'"),
    ],
)
def test_rules_that_are_refused(flags: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANYFLOW_TOKEN", raising=False)
    with pytest.raises(AnyFlowError, match=message.replace("*", r"\*")):
        rules_from_options(parse_options(ServeOptions, ["bundle", *flags.split()]))


def test_rules_of_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYFLOW_TOKEN", TOKEN)
    flags = f"--cors-origin {PAGE},http://localhost:3000 --root-path /a/b/ --public-metrics"
    rules = rules_from_options(parse_options(ServeOptions, ["bundle", *flags.split()]))
    origins = (PAGE, "http://localhost:3000")
    assert rules == AccessRules(TOKEN, origins, public_metrics=True, root_path="/a/b")


# Loading while listening


def test_a_server_listens_while_it_loads(tmp_path: Path) -> None:
    with serving(PacedGenerator(), tmp_path, is_loading=True) as server:
        go, warm = threading.Event(), threading.Event()
        loader = BackgroundLoader(
            server.service, server.server, lambda: _wait(go), lambda: _wait(warm)
        )
        loader.start()
        for event in (go, warm):
            health = server.client.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, "loading")
            early = server.create()
            assert (early.status_code, early.headers["retry-after"]) == (503, "5")
            assert early.json()["error"]["code"] == "loading"
            assert server.create(num_frames=30).status_code == 400  # known without the model
            assert server.client.get("/v1/videos").json()["data"] == []
            event.set()
        eventually(lambda: server.client.get("/health").status_code == 200)
        assert server.create_and_wait()["status"] == "completed"
        loader.finish()


def test_a_server_that_cannot_load_ends_with_the_reason(tmp_path: Path) -> None:
    def fail() -> None:
        raise AnyFlowError("the pipeline has no vae.")

    with serving(PacedGenerator(), tmp_path, is_loading=True) as server:
        loader = BackgroundLoader(server.service, server.server, fail, lambda: None)
        loader.start()
        eventually(lambda: server.server.should_exit)
        with pytest.raises(AnyFlowError, match="has no vae"):
            loader.finish()
    assert api_error_from_exception(LoadingError()).status == 503


def test_a_stop_does_not_wait_for_imports_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr("anyflow_deploy.serving.loading.os._exit", end)
    go = threading.Event()
    with serving(PacedGenerator(), tmp_path, is_loading=True) as server:
        loader = BackgroundLoader(server.service, server.server, lambda: _wait(go), lambda: None)
        loader.start()
        with pytest.raises(SystemExit) as ended:
            loader.finish()
        assert ended.value.code == 0
        go.set()
        eventually(lambda: server.service.state == "ok")
        loader.finish()


def test_a_client_that_retries_is_served_when_the_model_is_there(tmp_path: Path) -> None:
    with serving(PacedGenerator(), tmp_path, is_loading=True) as server:
        threading.Timer(0.2, server.service.finish_loading).start()

        def made() -> httpx.Response | None:
            answer = server.create(num_frames=1)
            return answer if answer.status_code == 200 else None

        eventually(made)


def _wait(event: threading.Event) -> None:
    assert event.wait(300)
