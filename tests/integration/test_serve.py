"""The HTTP service, by HTTP: what clients see, who may ask, what is refused, how it stops."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from anyflow_deploy import AnyFlowError, OutputError
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.cli.serve import ServeOptions, _read_token, serve
from anyflow_deploy.pipelines.video_io import VideoWriter, load_fragment
from anyflow_deploy.serving.errors import api_error_from_exception
from anyflow_deploy.serving.job import Job
from anyflow_deploy.serving.limits import Limits
from anyflow_deploy.serving.metrics import Metrics
from anyflow_deploy.serving.request import VideoRequest, validate_request
from anyflow_deploy.serving.service import Service
from anyflow_deploy.serving.video_store import VideoStore
from anyflow_deploy.serving.warmup import warm_up
from tests.fakes.serving import PacedGenerator, RunningServer, eventually, fake_manifest, serving

TOKEN = "fox-in-the-snow-1234567890"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One that makes every video at once."""
    with serving(PacedGenerator(), tmp_path_factory.mktemp("videos")) as served:
        yield served


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[tuple[RunningServer, PacedGenerator]]:
    """One whose maker waits for permits, with room for two in the queue."""
    maker = PacedGenerator(free=False)
    with serving(maker, tmp_path / "videos", queue=2, streams=2) as served:
        yield served, maker


def frames_in(data: bytes, tmp_path: Path) -> int:
    path = tmp_path / "received.mp4"
    path.write_bytes(data)
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def messages_of(
    url: str, path: str, **options: object
) -> tuple[list[dict[str, object]], list[bytes]]:
    """All that a stream sends, until its end."""
    texts, parts = [], []
    with connect(f"ws://{url}{path}", **options) as socket_:  # type: ignore[arg-type]
        for message in socket_:
            if isinstance(message, bytes):
                parts.append(message)
            else:
                texts.append(json.loads(message))
    return texts, parts


# A video's life


def test_create_poll_content_delete(server: RunningServer, tmp_path: Path) -> None:
    video = server.create_and_wait(
        size="48x32", seconds="1", num_inference_steps=2, seed=7, model="far-tiny"
    )
    expected = {
        "object": "video",
        "status": "completed",
        "progress": 100,
        "size": "48x32",
        "num_frames": 17,
        "seed": 7,
    }
    assert expected.items() <= video.items() and video["error"] is None
    assert video["steps"] == [2, 2, 2] and video["chunks"] == 3 and video["seconds"] == "1.0625"
    name = video["id"]
    content = server.client.get(f"/v1/videos/{name}/content")
    assert content.headers["content-type"] == "video/mp4" and len(content.content) == video["bytes"]
    assert frames_in(content.content, tmp_path) == 17
    part = server.client.get(f"/v1/videos/{name}/content", headers={"Range": "bytes=4-7"})
    assert part.status_code == 206 and part.content == b"ftyp"
    picture = server.client.get(f"/v1/videos/{name}/content?variant=thumbnail")
    assert (
        picture.headers["content-type"] == "image/jpeg" and picture.content[:3] == b"\xff\xd8\xff"
    )
    assert {p.name for p in (server.folder / str(name)).iterdir()} == {"video.mp4", "video.json"}
    gone = server.client.delete(f"/v1/videos/{name}")
    assert gone.json() == {"id": name, "object": "video.deleted", "deleted": True}
    assert not (server.folder / str(name)).exists()
    for answer in (
        server.client.get(f"/v1/videos/{name}"),
        server.client.get(f"/v1/videos/{name}/content"),
    ):
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"


def test_sync_answers_with_the_file(server: RunningServer, tmp_path: Path) -> None:
    answer = server.client.post("/v1/videos/sync", json={"prompt": "fox", "num_frames": 5})
    assert (
        answer.headers["content-type"] == "video/mp4" and frames_in(answer.content, tmp_path) == 5
    )
    assert (
        server.client.get(f"/v1/videos/{answer.headers['x-video-id']}").json()["status"]
        == "completed"
    )


def test_a_form_is_taken_as_openais_client_sends_it(server: RunningServer) -> None:
    fields = {
        name: (None, value)
        for name, value in {"prompt": "fox", "seconds": "1", "num_inference_steps": "3"}.items()
    }
    answer = server.client.post("/v1/videos", files=fields)
    assert answer.status_code == 200 and server.wait_until_ended(answer.json()["id"])["steps"] == [
        3,
        3,
        3,
    ]
    picture = server.client.post(
        "/v1/videos", data={"prompt": "x"}, files={"input_reference": ("a.png", b"1")}
    )
    assert picture.status_code == 400 and picture.json()["error"]["param"] == "input_reference"


def test_openais_own_client(server: RunningServer, tmp_path: Path) -> None:
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    client = openai.OpenAI(base_url=f"http://{server.url}/v1", api_key="none")
    video = client.videos.create_and_poll(
        prompt="a red fox", seconds="1", size="48x32", extra_body={"num_inference_steps": 2}
    )
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    client.videos.download_content(video.id).write_to_file(tmp_path / "fox.mp4")
    assert frames_in((tmp_path / "fox.mp4").read_bytes(), tmp_path) == 17
    assert video.id in [v.id for v in client.videos.list(limit=1)]  # the client fetches the pages
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_pages_of_the_list(tmp_path: Path) -> None:
    with serving(PacedGenerator(), tmp_path) as server:
        names = [server.create_and_wait(num_frames=1)["id"] for _ in range(3)]
        first = server.client.get("/v1/videos", params={"limit": 2}).json()
        assert (
            [v["id"] for v in first["data"]] == names[:0:-1]
            and first["has_more"]
            and first["last_id"] == names[1]
        )
        rest = server.client.get("/v1/videos", params={"after": names[1]}).json()
        assert [v["id"] for v in rest["data"]] == names[:1] and not rest["has_more"]
        assert [v["id"] for v in server.client.get("/v1/videos?order=asc").json()["data"]] == names


def test_the_stream_sends_what_is_there_and_then_what_is_made(
    slow: tuple[RunningServer, PacedGenerator], tmp_path: Path
) -> None:
    server, maker = slow
    name = server.create(num_frames=17, num_inference_steps=1).json()["id"]
    maker.permits.release()
    # Wait until a chunk exists before anybody watches.
    eventually(lambda: server.client.get(f"/v1/videos/{name}").json()["chunks"] == 1)
    texts, parts = [], b""
    with connect(f"ws://{server.url}/v1/videos/{name}/stream") as socket_:
        for message in socket_:
            if isinstance(message, bytes):
                parts += message
                maker.permits.release()  # the next chunk is made only when this one has arrived
                continue
            texts.append(json.loads(message))
    chunks = [text for text in texts if text["type"] == "chunk"]
    assert [(c["index"], c["first_frame"], c["frames"], c["messages"]) for c in chunks] == [
        (0, 0, 1, 1),
        (1, 1, 12, 1),
        (2, 13, 4, 1),
    ]
    progress = [text["video"]["progress"] for text in texts if text["type"] == "progress"]
    assert progress == sorted(progress) and 0 < progress[0] < 100
    assert texts[-1]["type"] == "end" and texts[-1]["video"]["status"] == "completed"
    assert parts == server.client.get(f"/v1/videos/{name}/content").content
    late, pictures = messages_of(server.url, f"/v1/videos/{name}/stream?format=jpeg")
    assert [t["messages"] for t in late if t["type"] == "chunk"] == [1, 12, 4] and late[-1][
        "type"
    ] == "end"
    assert len(pictures) == 17 and all(picture[:3] == b"\xff\xd8\xff" for picture in pictures)


def test_cancel_by_socket_and_by_request(slow: tuple[RunningServer, PacedGenerator]) -> None:
    server, maker = slow
    first, second = (server.create().json()["id"] for _ in range(2))
    assert server.client.get(f"/v1/videos/{second}").json()["queue_position"] == 1
    waiting = server.client.post(f"/v1/videos/{second}/cancel").json()
    assert (waiting["status"], waiting["error"]["code"]) == ("failed", "cancelled")
    with connect(f"ws://{server.url}/v1/videos/{first}/stream") as socket_:
        for word in ("what", '{"type": "dance"}', '{"type": "finish"}'):
            socket_.send(word)
        replies = [json.loads(socket_.recv(10)) for _ in range(4)]
        assert sum(reply["type"] == "error" for reply in replies) == 3
        socket_.send('{"type": "cancel"}')
        last = json.loads([message for message in socket_ if isinstance(message, str)][-1])
    assert last["type"] == "end" and last["video"]["error"]["code"] == "cancelled"
    assert not (server.folder / first).exists()
    answer = server.client.get(f"/v1/videos/{first}/content")
    assert answer.status_code == 409 and answer.json()["error"]["code"] == "cancelled"
    assert maker.began == ["a red fox"]  # the one that waited was never begun


def test_deleting_what_is_being_made_stops_it(slow: tuple[RunningServer, PacedGenerator]) -> None:
    server, maker = slow
    name = server.create().json()["id"]
    maker.permits.release()
    eventually(lambda: (server.folder / name).exists())
    assert server.client.delete(f"/v1/videos/{name}").json()["deleted"]
    assert server.client.get(f"/v1/videos/{name}").status_code == 404
    eventually(lambda: not (server.folder / name).exists())
    maker.free.set()
    assert server.create_and_wait(num_frames=1)["status"] == "completed"


def test_who_leaves_a_sync_request_cancels_it(slow: tuple[RunningServer, PacedGenerator]) -> None:
    server, _ = slow
    body = b'{"prompt": "fox"}'
    with socket.create_connection(server.url.split(":")) as raw:  # type: ignore[arg-type]
        head = (
            f"POST /v1/videos/sync HTTP/1.1\r\nHost: {server.url}\r\nContent-Length:"
            f" {len(body)}\r\n\r\n"
        )
        raw.sendall(head.encode() + body)
        eventually(lambda: server.client.get("/v1/videos").json()["data"])
    name = server.client.get("/v1/videos").json()["data"][0]["id"]
    assert server.wait_until_ended(name)["error"]["code"] == "cancelled"  # type: ignore[index]


def test_a_full_queue_says_when_to_come_again(slow: tuple[RunningServer, PacedGenerator]) -> None:
    server, maker = slow
    server.create()
    eventually(lambda: maker.began)
    assert [server.create().status_code for _ in range(2)] == [200, 200]
    refused = server.create()
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert (
        refused.json()["error"]["code"] == "queue_full"
        and refused.json()["error"]["type"] == "rate_limit_error"
    )
    stream = f"ws://{server.url}/v1/videos/{server.service.list_jobs()[0].id}/stream"
    with connect(stream), connect(stream):
        with pytest.raises(InvalidStatus) as third:
            connect(stream)
        assert third.value.response.status_code == 429
    maker.free.set()
    eventually(lambda: not server.service.queue_length)
    assert server.create_and_wait(num_frames=1)["status"] == "completed"
    metrics = server.client.get("/metrics").text
    assert (
        'anyflow_refused_total{reason="queue"} 1.0' in metrics
        and 'anyflow_videos_total{outcome="completed"} 4.0' in metrics
    )


def test_a_video_that_fails_says_so_and_the_next_one_is_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = PacedGenerator()
    with serving(maker, tmp_path) as server:
        for fault, code, message in (
            (RuntimeError("secret"), "server_error", "its log has it under req_"),
            (AnyFlowError("too wide; choose less."), "invalid_request", "too wide; choose less."),
            (
                OSError(28, "No space left on device"),
                "server_error",
                "could not be written: No space left on device.",
            ),
            (
                OutputError("/secret/video.mp4 cannot be written", OSError(28, "No space left")),
                "server_error",
                "could not be written: No space left.",
            ),
        ):
            maker.fault = fault
            video = server.create_and_wait(num_frames=1)
            assert (video["status"], video["error"]["code"]) == ("failed", code)  # type: ignore[index]
            assert message in video["error"]["message"] and "secret" not in str(video)  # type: ignore[index]
            assert not (tmp_path / str(video["id"])).exists()
        failed = server.client.post("/v1/videos/sync", json={"prompt": "x"})
        assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
        maker.fault = None
        with monkeypatch.context() as broken:
            broken.setattr(
                "anyflow_deploy.serving.video_store.write_text_atomically", lambda *_: 1 / 0
            )
            assert server.create_and_wait(num_frames=1)["error"]["code"] == "server_error"  # type: ignore[index]
        assert server.create_and_wait(num_frames=1)["status"] == "completed"
        assert len([f for f in tmp_path.iterdir() if f.is_dir()]) == 1
    assert "secret" in caplog.text


# What is refused


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "is empty"),
        ({"prompt": "x" * 5000}, "prompt", "asks for 5,000 characters; this server allows 4,000"),
        ({"prompt": "unspeakable"}, "prompt", "600 tokens"),
        ({"prompt": 3}, "prompt", "should be a valid string"),
        ({"num_frames": 10**400}, "num_frames", "less than or equal to"),
        ({"model": "sora-2"}, "model", "this server has 'far-tiny'"),
        ({"size": "48*32"}, "size", "WIDTHxHEIGHT in pixels, as 48x32"),
        ({"size": "50x32"}, "size", "width is 50; allowed are multiples of 16"),
        ({"size": "4096x4096"}, "size", "asks for 16,777,216 pixels; this server allows 6,144"),
        ({"num_frames": 16}, "num_frames", "frames is 16; allowed are 4n+1"),
        ({"num_frames": 85}, "num_frames", "asks for 85 frames; this server allows 81"),
        ({"seconds": "12"}, "seconds", "this server allows 81"),
        ({"seconds": "1", "num_frames": 17}, "seconds", "give one of them"),
        ({"seconds": "inf"}, "seconds", "finite"),
        (
            {"num_inference_steps": 51},
            "num_inference_steps",
            "asks for 51 steps; this server allows 50",
        ),
        ({"num_inference_steps": 0}, "num_inference_steps", "greater than or equal to 1"),
        ({"num_inference_steps": True}, "num_inference_steps", "allowed is a number"),
        ({"first_steps": 51}, "first_steps", "allows 50"),
        ({"deadline_ms": 1e9}, "deadline_ms", "this server allows 600,000"),
        ({"deadline_ms": -1}, "deadline_ms", "greater than 0"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"num_steps": 4}, "num_steps", "Did you mean 'num_inference_steps'?"),
        ({"frames": 5}, "frames", "Did you mean 'num_frames'?"),
        ({"promt": "x"}, "promt", "Did you mean 'prompt'?"),
        ({"zoom": 2}, "zoom", "unknown field 'zoom'. Allowed are prompt, "),
        ({"fps": 24}, "fps", "fps is 24; this model makes 16 frames a second"),
        ({"n": 2}, "n", "a request is one video"),
        ({"size": "48x32", "width": 48}, "size", "give one of them"),
        ({"width": 50}, "size", "width is 50"),
        ({"width": 9600, "height": 64}, None, "width and height ask for 614,400 pixels"),
        ({"negative_prompt": "blurry"}, "negative_prompt", "guidance is distilled into"),
        ({"guidance_scale": 5.0}, "guidance_scale", "guidance is distilled into"),
        (
            {"input_reference": {"image_url": "data:image/png;base64,AAAA"}},
            "input_reference",
            "makes videos from words alone",
        ),
    ],
)
def test_what_cannot_be_made_is_refused_by_field(
    server: RunningServer, fields: dict[str, object], param: str | None, message: str
) -> None:
    before = len(server.service.list_jobs())
    answer = server.create(**fields)
    error = answer.json()["error"]
    assert (
        answer.status_code == 400
        and error["type"] == "invalid_request_error"
        and error["param"] == param
    )
    assert message in error["message"] and set(error) == {"message", "type", "param", "code"}
    assert len(server.service.list_jobs()) == before


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "message"),
    [
        (
            "POST",
            "/v1/videos",
            {"content": b"{", "headers": {"content-type": "application/json"}},
            400,
            "not JSON",
        ),
        ("POST", "/v1/videos", {"content": b"[" * 50000}, 400, "not JSON"),
        ("POST", "/v1/videos", {"json": [1]}, 400, "valid dictionary"),
        ("POST", "/v1/videos", {"json": {}}, 400, "prompt is missing"),
        ("POST", "/v1/videos", {"content": b'{"prompt": "\\ud800"}'}, 400, "half a character"),
        (
            "POST",
            "/v1/videos",
            {"content": b'{"prompt": "x", "\\ud800": 1}'},
            400,
            "unable to parse",
        ),
        (
            "POST",
            "/v1/videos",
            {"content": b"x", "headers": {"content-type": "text/plain"}},
            415,
            "allowed are application/json",
        ),
        ("POST", "/v1/videos", {"content": b"x" * 70000}, 413, "larger than 65,536 bytes"),
        (
            "POST",
            "/v1/videos",
            {"content": iter([b"x" * 40000] * 2)},
            413,
            "larger than 65,536 bytes",
        ),
        ("GET", "/v1/videos/video_0", {}, 404, "is not here"),
        ("GET", "/v1/videos/..%2f..%2fetc/content", {}, 404, "."),
        ("GET", "/v1/videos?limit=1000", {}, 400, "allowed are 1 to 100"),
        ("GET", "/v1/videos?order=up", {}, 400, "asc and desc"),
        ("GET", "/v1/videos?after=x", {}, 400, "no video here"),
        ("GET", "/v1/models/sora-2", {}, 404, "this server has 'far-tiny'"),
        ("PUT", "/v1/videos", {}, 405, "allowed are GET, HEAD, POST"),
        ("GET", "/v1/videos/video_0/cancel", {}, 405, "allowed are POST"),
        ("GET", "/docs", {}, 404, "'/docs' is no path of this server. It has /v1/videos, "),
        ("POST", "/videos", {}, 404, "Did you mean '/v1/videos'?"),
        ("GET", "/v1/video", {}, 404, "Did you mean '/v1/videos'?"),
        ("POST", "/v1/videos/video_0/remix", {}, 404, "remix is not supported: a video cannot be"),
        ("POST", "/v1/videos/edits", {}, 404, "edits is not supported: a video cannot be"),
        ("POST", "/v1/images/generations", {}, 404, "this server makes videos, POST /v1/videos"),
        ("GET", "/v1/videos/video_0/stream", {}, 404, "is a WebSocket"),
    ],
)
def test_other_mistakes_have_openais_shape_too(
    server: RunningServer,
    method: str,
    path: str,
    options: dict[str, object],
    status: int,
    message: str,
) -> None:
    answer = server.client.request(method, path, **options)  # type: ignore[arg-type]
    assert answer.status_code == status and message in answer.json()["error"]["message"]


HALF = "\ud800"
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([HALF, 10**400, -1, 1e308, "9" * 50, "48x32", "4"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*VideoRequest.model_fields, HALF, "extra"]), JSON, max_size=5)
)
def test_whatever_is_asked_becomes_a_request_or_a_refusal(fields: dict[str, object]) -> None:
    limits = Limits(frames=81, pixels=64 * 96)
    for name in ("far-tiny", "tiny"):
        try:
            order = validate_request(
                VideoRequest.model_validate({"prompt": "x", **fields}),
                fake_manifest(name),
                limits,
                name,
            )
        except (AnyFlowError, ValidationError) as error:
            answer = api_error_from_exception(error).to_response()  # can be sent, too
            assert answer.status_code == 400
        else:
            assert (
                order.num_frames <= 81
                and order.height * order.width <= 64 * 96
                and order.num_inference_steps <= 50
            )
            assert order.plan is None or order.plan.frames == order.shape[0]


def test_a_body_that_does_not_come_is_not_waited_for(tmp_path: Path) -> None:
    with (
        serving(PacedGenerator(), tmp_path, body_seconds=0.2) as server,
        socket.create_connection(server.url.split(":")) as raw,
    ):  # type: ignore[arg-type]
        raw.sendall(
            f"POST /v1/videos HTTP/1.1\r\nHost: {server.url}\r\n"
            "Content-Length: 10\r\n\r\n{".encode()
        )
        raw.settimeout(10)
        assert raw.recv(100).startswith(b"HTTP/1.1 408")


def test_a_bidirectional_model_has_no_chunks_to_choose(tmp_path: Path) -> None:
    with serving(PacedGenerator(), tmp_path, fake_manifest("tiny")) as server:
        for field in ("first_steps", "window"):
            error = server.create(**{field: 2}).json()["error"]
            assert error["param"] == field and "for causal models" in error["message"]
        assert server.create_and_wait()["chunks"] == 1


# Who may ask


def test_a_token_is_needed_for_everything_but_health_and_the_page(tmp_path: Path) -> None:
    with serving(PacedGenerator(), tmp_path, token=TOKEN) as server:
        assert {
            server.client.get(path).status_code
            for path in ("/health", "/", "/page.js", "/page.css")
        } == {200}
        for path in ("/v1/videos", "/metrics", "/v1/models", "/openapi.json"):
            for headers in (
                {},
                {"Authorization": f"Bearer {TOKEN}x"},
                {"Authorization": TOKEN},
                {"Authorization": "Bearer é".encode()},
            ):
                answer = server.client.get(path, headers=headers)  # type: ignore[arg-type]
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "invalid_api_key"
            assert (
                server.client.get(
                    path, headers={"Authorization": f"Bearer {TOKEN}", "Host": "fox.example"}
                ).status_code
                == 200
            )
        server.client.headers["Authorization"] = f"Bearer {TOKEN}"
        name = server.create_and_wait(num_frames=1)["id"]
        path = f"/v1/videos/{name}/stream"
        for options in ({}, {"subprotocols": ["anyflow", "token.wrong"]}):
            with pytest.raises(InvalidStatus) as refused:
                messages_of(server.url, path, **options)
            assert refused.value.response.status_code == 401
        texts, _ = messages_of(server.url, path, subprotocols=["anyflow", f"token.{TOKEN}"])
        assert texts[-1]["type"] == "end"


def test_without_a_token_other_pages_and_names_are_refused(server: RunningServer) -> None:
    port = server.url.split(":")[1]
    for headers in (
        {"Host": f"evil.example:{port}"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Host": "[::"},
    ):
        answer = server.client.post("/v1/videos", json={"prompt": "x"}, headers=headers)
        assert answer.status_code == 403 and answer.json()["error"]["type"] == "permission_error", (
            headers
        )
    with pytest.raises(InvalidStatus) as refused:
        connect(f"ws://{server.url}/v1/videos/x/stream", origin="https://evil.example")  # type: ignore[arg-type]
    assert refused.value.response.status_code == 403
    own = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
    assert server.client.get("/v1/videos", headers=own).status_code == 200


@pytest.mark.parametrize(
    ("flags", "variable", "message"),
    [
        ("--host 0.0.0.0", None, "there is no token. Give --token-file FILE"),
        ("--host ::", None, "there is no token"),
        ("--host 192.168.1.4", "short", "has to be 16 to 256"),
        ("--token-file nowhere", None, "cannot be read as a token"),
        ("--token-file {file}", None, "has to be 16 to 256"),
    ],
)
def test_other_machines_need_a_token(
    flags: str, variable: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ANYFLOW_TOKEN", raising=False)
    if variable is not None:
        monkeypatch.setenv("ANYFLOW_TOKEN", variable)
    (tmp_path / "token").write_text("with a space in it, long enough\n")
    with pytest.raises(AnyFlowError, match=message):
        serve(
            parse_options(ServeOptions, ["bundle", *flags.format(file=tmp_path / "token").split()])
        )
    monkeypatch.setenv("ANYFLOW_TOKEN", TOKEN)
    assert _read_token(ServeOptions(bundle=tmp_path, host="0.0.0.0")) == TOKEN


# What is kept


def test_finished_videos_outlive_the_server_and_half_ones_do_not(tmp_path: Path) -> None:
    with serving(PacedGenerator(), tmp_path) as server:
        video = server.create_and_wait(num_frames=17)
        with pytest.raises(AnyFlowError, match="belongs to another anyflow-serve that runs"):
            VideoStore(tmp_path, 1, 1)
    half = tmp_path / f"video_{'0' * 32}"
    foreign = tmp_path / "holidays"
    newer = tmp_path / f"video_{'1' * 32}"
    for folder in (half, foreign, newer):
        folder.mkdir()
        (folder / "video.mp4").write_bytes(b"half")
    (newer / "video.json").write_text('{"schema_version": 9}')
    with serving(PacedGenerator(), tmp_path) as server:
        assert server.client.get(f"/v1/videos/{video['id']}").json() == video
        assert len(server.client.get(f"/v1/videos/{video['id']}/content").content) == video["bytes"]
        _, parts = messages_of(server.url, f"/v1/videos/{video['id']}/stream")
        assert len(parts) == video["chunks"]
        assert not half.exists() and foreign.exists() and newer.exists()
        assert len(server.client.get("/v1/videos").json()["data"]) == 1


def test_the_shelf_has_a_bound_in_bytes_and_in_age(tmp_path: Path) -> None:
    with serving(PacedGenerator(), tmp_path) as server:
        size = int(server.create_and_wait()["bytes"])  # type: ignore[call-overload]
    with serving(PacedGenerator(), tmp_path, disk_bytes=2 * size + size // 2) as server:
        # All within a second, so that created_at does not order them.
        names = [str(server.create_and_wait(seed=0)["id"]) for _ in range(3)]
        eventually(lambda: {f.name for f in tmp_path.iterdir() if f.is_dir()} == set(names[1:]))
        stored = float(
            server.client.get("/metrics").text.split("\nanyflow_stored_bytes ")[1].split()[0]
        )
        assert stored <= 2.5 * size
        jobs = server.service.list_jobs()
        assert [
            job.id for job in server.service.store.find_surplus(jobs, time.time() + 24 * 3601)
        ] == names[1:]
        assert server.service.store.find_surplus(jobs, time.time() + 3600) == []
    with serving(PacedGenerator(), tmp_path, disk_bytes=1) as server:
        # The newest one stays.
        assert [v["id"] for v in server.client.get("/v1/videos").json()["data"]] == names[2:]


# How it stops


def test_stopping_lets_the_running_video_finish(tmp_path: Path) -> None:
    maker = PacedGenerator(free=False)
    with serving(maker, tmp_path, grace=30) as server:
        answers: list[int] = []
        waiting = threading.Thread(
            target=lambda: answers.append(
                server.client.post(
                    "/v1/videos/sync", json={"prompt": "fox", "num_frames": 1}
                ).status_code
            )
        )
        waiting.start()
        eventually(lambda: maker.began)
        queued = server.create().json()["id"]
        server.server.handle_exit(15, None)
        eventually(lambda: server.client.get("/health").status_code == 503)
        refused = server.create()
        assert refused.status_code == 503 and refused.headers["retry-after"] == "30"
        assert server.wait_until_ended(queued)["error"]["code"] == "server_shutdown"  # type: ignore[index]
        maker.free.set()
        waiting.join()
        assert answers == [200]
        eventually(lambda: server.server.should_exit)
    assert len([f for f in tmp_path.iterdir() if f.is_dir()]) == 1


@pytest.mark.parametrize("signals", [1, 2])
def test_a_video_that_takes_too_long_to_stop_is_cancelled(tmp_path: Path, signals: int) -> None:
    maker = PacedGenerator(free=False)
    with serving(maker, tmp_path, grace=0.3 if signals == 1 else 600) as server:
        name = server.create().json()["id"]
        maker.permits.release(5)
        eventually(lambda: server.client.get(f"/v1/videos/{name}").json()["chunks"])
        with connect(f"ws://{server.url}/v1/videos/{name}/stream") as socket_:
            for _ in range(signals):
                server.server.handle_exit(15, None)
                time.sleep(0.05)
            last = json.loads([message for message in socket_ if isinstance(message, str)][-1])
        assert last["type"] == "end" and last["video"]["error"]["code"] == "server_shutdown"
        eventually(lambda: server.server.should_exit)
    assert [f.name for f in tmp_path.iterdir() if f.is_dir()] == []


def test_warming_up_leaves_no_trace_and_fails_loudly(tmp_path: Path) -> None:
    maker = PacedGenerator()
    limits = Limits(frames=81, pixels=64 * 96)
    warm_up(maker, fake_manifest("far-tiny"), limits, "far-tiny")
    assert maker.began == ["a red fox"]
    maker.fault = AnyFlowError("no memory for this.")
    with pytest.raises(AnyFlowError, match="the warm-up failed: no memory for this"):
        warm_up(maker, fake_manifest("far-tiny"), limits, "far-tiny")
    maker.fault = None
    narrow = Limits(
        frames=7, pixels=1100, steps=1, prompt_characters=2, deadline_seconds=1e-9
    )  # below the bundle's own video in everything
    warm_up(maker, fake_manifest("far-tiny"), narrow, "far-tiny")
    assert maker.began[-1] == "a "


# Watching it


def test_ids_of_requests_are_in_answers_and_logs(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "anyflow.serve")
    own = server.client.get("/health").headers["x-request-id"]
    assert own.startswith("req_") and own != server.client.get("/health").headers["x-request-id"]
    answer = server.client.post(
        "/v1/videos", json={"prompt": "a secret fox"}, headers={"X-Request-ID": "fox-1"}
    )
    assert answer.headers["x-request-id"] == "fox-1"
    assert (
        server.client.get("/health", headers={"X-Request-ID": "a b\tc"})
        .headers["x-request-id"]
        .startswith("req_")
    )
    name = answer.json()["id"]
    server.wait_until_ended(name)
    eventually(lambda: "completed after" in caplog.text)
    about = [r for r in caplog.records if getattr(r, "video", "") == name]
    assert {r.request for r in about} == {"fox-1"} and len(about) == 3  # type: ignore[attr-defined]
    assert "secret fox" not in caplog.text


def test_metrics_name_routes_by_their_pattern(server: RunningServer) -> None:
    server.create_and_wait(deadline_ms=1000, num_inference_steps=2)
    for _ in range(2):
        server.client.get("/v1/videos/video_x")
        server.client.get("/nowhere")
    text = server.client.get("/metrics").text
    assert 'anyflow_requests_total{method="GET",route="/v1/videos/{video_id}",status="404"}' in text
    assert "video_x" not in text and "nowhere" not in text
    for name in (
        "first_frame_seconds_count",
        "chunk_seconds_bucket",
        "queue_seconds_sum",
        "step_seconds_count",
        "frames_total",
        "queued",
    ):
        assert f"anyflow_{name}" in text
    assert server.client.get("/health").json() == {"status": "ok", "model": "far-tiny", "queued": 0}


def test_many_clients_at_once(tmp_path: Path) -> None:
    """Thirty create, watch and fetch at the same time; each gets the video it asked for."""
    maker = PacedGenerator()
    with serving(maker, tmp_path, queue=40) as server:
        problems: list[object] = []

        def client(seed: int) -> None:
            try:
                name = server.create(seed=seed, num_frames=5, num_inference_steps=1).json()["id"]
                texts, parts = messages_of(server.url, f"/v1/videos/{name}/stream")
                video = texts[-1]["video"]
                assert isinstance(video, dict) and (video["seed"], video["status"]) == (
                    seed,
                    "completed",
                )
                assert b"".join(parts) == server.client.get(f"/v1/videos/{name}/content").content
            except BaseException as error:  # noqa: BLE001 - told on the main thread
                problems.append(error)

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems
        assert not [job for job in server.service.list_jobs() if job._listeners]


def test_a_piece_of_a_growing_file_is_read_alone(tmp_path: Path) -> None:
    shades, ends = (30, 120, 220), [0]
    with VideoWriter(tmp_path / "v.mp4", 16, (32, 48)) as writer:
        for count, shade in enumerate(shades, start=1):
            ends.append(ends[-1] + writer.append(np.full((count, 32, 48, 3), shade, np.uint8)))
            frames = load_fragment(tmp_path / "v.mp4", ends[-2], ends[-1])  # while it grows
            assert len(frames) == count and abs(frames.astype(int) - shade).max() <= 4
    assert ends[-1] == (tmp_path / "v.mp4").stat().st_size
    for start, end in ((ends[1], ends[1]), (ends[-1], ends[-1] + 100), (ends[1] + 7, ends[2])):
        with pytest.raises(AnyFlowError, match="cannot be read as a (fragment of a )?video"):
            load_fragment(tmp_path / "v.mp4", start, end)


def test_a_job_hears_nothing_after_it_let_go() -> None:
    job = Job(SimpleNamespace(), None)  # type: ignore[arg-type]
    heard: list[int] = []
    with job.subscribe(lambda: heard.append(1)):
        job.notify()
    job.notify()
    assert heard == [1]


def test_failures_are_forgotten_oldest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anyflow_deploy.serving.service.MAX_FAILURES", 2)
    maker = PacedGenerator()
    maker.fault = AnyFlowError("no.")
    with serving(maker, tmp_path) as server:
        names = [server.create_and_wait(num_frames=1)["id"] for _ in range(3)]
        eventually(lambda: [job.id for job in server.service.list_jobs()] == names[1:])
    assert isinstance(server.service, Service) and isinstance(server.service.metrics, Metrics)
