"""The repository that `anyflow-triton` writes, in the real Triton Inference Server: `make
test-triton`."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest

from anyflow_deploy import Bundle, Schedule, load_engine, noise, sample, stream
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.cli.tritonserver import TritonOptions, triton
from anyflow_deploy.pipelines.text_encoder import encode_prompts
from anyflow_deploy.pipelines.vae import StreamingDecoder
from anyflow_deploy.pipelines.video_io import load_video
from tests.fakes.serving import eventually
from tests.triton_server import TritonServer

grpcclient = pytest.importorskip("tritonclient.grpc")

ROOT = Path(__file__).parents[2]
ENVIRONMENT = Path(os.environ.get("ANYFLOW_TRITON", ROOT / ".triton"))
DOCUMENT = (ROOT / "docs" / "how-to" / "triton.md").read_text()
PROMPT = "a red fox in the snow"
TYPES: dict[str, Any] = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32}
STREAMS, WAITING = 4, 6
REFUSED = {"num_inference_steps": 0}

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        not (ENVIRONMENT / ".ready").exists(),
        reason="no Triton Inference Server here; make test-triton gets it",
    ),
]


class Stream:
    """One request on a connection of its own, as a client of the server's makes it."""

    opened: ClassVar[set[Stream]] = set()

    def __init__(self, server: TritonServer, model: str = "anyflow", **given: Any) -> None:
        self._news: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client = grpcclient.InferenceServerClient(server.grpc)
        self._client.start_stream(lambda result, error: self._news.put((result, error)))
        self._client.async_stream_infer(model, inputs(given), enable_empty_final_response=True)
        self.opened.add(self)

    def next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """The next chunk's outputs; None at the end."""
        result, error = self._news.get(timeout=120)
        if error is not None:
            raise error
        response = result.get_response()
        if response.parameters["triton_final_response"].bool_param and not response.outputs:
            return None
        return {output.name: result.as_numpy(output.name) for output in response.outputs}

    def rest(self) -> list[dict[str, np.ndarray[Any, Any]]]:
        """All chunks that are still to come."""
        try:
            return list(iter(self.next, None))
        finally:
            self.close()

    def cancel(self) -> None:
        self.close(cancel=True)

    def close(self, cancel: bool = False) -> None:
        self.opened.discard(self)
        self._client.stop_stream(cancel_requests=cancel)
        self._client.close()


def inputs(given: dict[str, Any]) -> list[Any]:
    """Tensors of a request, of the types that the documentation names."""
    from anyflow_deploy.engines.tritonserver.io_spec import INPUTS

    tensors = []
    for port in INPUTS:
        if port.name in given:
            value = given[port.name]
            if port.type == "STRING":
                array: Any = np.array(
                    [value if isinstance(value, bytes) else value.encode()], dtype=object
                )
            else:
                array = np.array(value, dtype=TYPES[port.type]).reshape(
                    [-1] if np.ndim(value) == 0 else np.shape(value)
                )
            tensor = grpcclient.InferInput(
                port.name, list(array.shape), "BYTES" if port.type == "STRING" else port.type
            )
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
    return tensors


def made(server: TritonServer, **given: Any) -> list[dict[str, np.ndarray[Any, Any]]]:
    return Stream(
        server, **{"prompt": PROMPT, "seed": 7, "num_frames": 29, "num_inference_steps": 2, **given}
    ).rest()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """What a test that failed left running would keep the next ones waiting."""
    yield
    for one in list(Stream.opened):
        one.cancel()


@pytest.fixture(scope="module")
def repository(
    far_bundle: Bundle, tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A causal and a bidirectional model, each with small limits."""
    folder = tmp_path_factory.mktemp("triton") / "models"
    limits = [
        "--threads",
        "1",
        "--max-streams",
        str(STREAMS),
        "--max-waiting",
        str(WAITING),
        "--max-steps",
        "400",
    ]
    single = ["--single-response"]
    for bundle, name, more in (
        (far_bundle, "anyflow", []),
        (tiny_bundle, "flat", []),
        (far_bundle, "whole", single),
    ):
        words = [str(bundle.path), "--output", str(folder), "--name", name, *limits, *more]
        assert triton(parse_options(TritonOptions, words)) == 0
    return folder


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    """Running and warm; at the end it stops when it is asked to, and has logged no error."""
    server = TritonServer(ENVIRONMENT, repository, repository.parent / "log")
    server.start()
    try:
        for model in ("anyflow", "flat", "whole"):
            server.wait_ready(model)
        yield server
        assert server.stop() == 0, server.text[-4000:]
        assert "Traceback" not in server.text and "Non-graceful" not in server.text
    finally:
        server.kill()


@pytest.fixture(scope="module")
def expected(far_bundle: Bundle, far_pipeline: Path) -> list[np.ndarray[Any, Any]]:
    """The chunks of `made`, by this project's own loop in this process."""
    video = far_bundle.manifest.video
    text = encode_prompts(far_pipeline, [PROMPT], video.text_tokens)
    engine = load_engine(far_bundle, threads=1)
    shape = far_bundle.manifest.latent_shape(29, None, None)
    from anyflow_deploy.engines.kv_cache import fit_chunks

    plan = fit_chunks(far_bundle.manifest.architecture.chunk_partition or (), shape[0])
    schedule = Schedule.uniform(2, far_bundle.manifest.schedule.shift)
    return [
        chunk.latents[0] for chunk in stream(engine, noise((1, *shape), 7), text, schedule, plan)
    ]


def test_memory_stays_where_it_is(server: TritonServer) -> None:
    """500 requests, four at a time, of all kinds: from the 200th on the server's processes grow by
    less than 24 MiB.

    It comes first: what other tests once took stays with a process, and would hide growth."""
    kinds: list[dict[str, Any]] = [
        {"output_type": "latents"},
        {"output_type": "frames"},
        {"output_type": "mp4"},
        {"output_type": "mp4-base64"},
        {"prompt": PROMPT + " at sea", "num_frames": 17},
        REFUSED,
    ]

    def one(number: int) -> None:
        kind = kinds[number % len(kinds)]
        given = {
            "prompt": PROMPT,
            "num_frames": 5,
            "num_inference_steps": 1,
            "seed": number,
            **kind,
        }
        with (
            pytest.raises(Exception, match="steps is 0")
            if kind is REFUSED
            else contextlib.nullcontext()
        ):
            Stream(server, **given).rest()

    grown = []
    with ThreadPoolExecutor(4) as pool:
        for hundred in range(5):
            list(pool.map(one, range(100 * hundred, 100 * hundred + 100)))
            grown.append(server.memory() / 2**20)
    assert grown[-1] - grown[1] < 24, f"MiB after each hundred: {grown}"
    with (ENVIRONMENT / "memory.txt").open("a") as file:  # for whoever keeps an eye on it
        file.write(f"{' '.join(f'{size:.0f}' for size in grown)}\n")


def test_chunks_are_those_of_the_library(
    server: TritonServer, expected: list[np.ndarray[Any, Any]]
) -> None:
    chunks = made(server, output_type="latents")
    assert len(chunks) == len(expected) > 2
    for number, (chunk, latents) in enumerate(zip(chunks, expected, strict=True)):
        # The server has another numpy, in another process.
        np.testing.assert_allclose(chunk["latents"], latents, atol=1e-5)
        assert (chunk["chunk"], chunk["steps"], chunk["seed"]) == (number, 2, 7)
        assert "deadline_met" not in chunk
    assert [int(chunk["first_frame"][0]) for chunk in chunks] == [
        0,
        *np.cumsum([4 * len(z) for z in expected])[:-1] - 3,
    ]
    seconds = [float(chunk["seconds"][0]) for chunk in chunks]
    assert seconds[0] > 0 and seconds == sorted(seconds)


def test_frames_and_mp4_show_the_same(
    server: TritonServer, expected: list[np.ndarray[Any, Any]], far_pipeline: Path, tmp_path: Path
) -> None:
    decoder = StreamingDecoder(far_pipeline)
    frames = [chunk["frames"] for chunk in made(server, output_type="frames")]
    for got, latents in zip(frames, expected, strict=True):
        wanted = decoder.decode(latents[None])
        assert got.shape == wanted.shape and np.abs(got.astype(int) - wanted.astype(int)).max() <= 1
    pieces = [chunk["mp4"][0] for chunk in made(server, output_type="mp4")]
    (tmp_path / "fox.mp4").write_bytes(b"".join(pieces))
    video = load_video(tmp_path / "fox.mp4")
    assert video.shape == np.concatenate(frames).shape == (29, *frames[0].shape[1:])


def test_over_http_the_default_is_base64_and_misspelt_fields_are_refused(
    server: TritonServer, tmp_path: Path
) -> None:
    url = f"http://{server.http}/v2/models/anyflow/generate_stream"
    body = {"id": "7", "prompt": PROMPT, "seed": 7, "num_frames": 29, "num_inference_steps": 2}
    lines = httpx.post(url, json=body, timeout=120).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    pieces = [base64.b64decode(event["mp4"], validate=True) for event in events]
    (tmp_path / "fox.mp4").write_bytes(b"".join(pieces))
    assert len(load_video(tmp_path / "fox.mp4")) == 29
    for field, message in (("steps", "Did you mean 'num_inference_steps'?"), ("zoom", "Allowed")):
        refused = httpx.post(url, json={**body, field: 1}, timeout=60)
        assert refused.status_code == 400 and message in refused.text


def test_one_response_for_tools_that_take_one(
    server: TritonServer, expected: list[np.ndarray[Any, Any]]
) -> None:
    given = {"prompt": PROMPT, "seed": 7, "num_frames": 29, "num_inference_steps": 2}
    with grpcclient.InferenceServerClient(server.grpc) as client:
        result = client.infer("whole", inputs({**given, "output_type": "latents"}))
        whole = result.as_numpy("latents")
        np.testing.assert_allclose(whole, np.concatenate(expected), atol=1e-5)
        assert result.as_numpy("steps").tolist() == [2] * len(expected)
        with pytest.raises(grpcclient.InferenceServerException, match="Did you mean"):
            client.infer("whole", inputs(given), parameters={"steps": 1})
    url = f"http://{server.http}/v2/models/whole/generate"
    answer = httpx.post(url, json=given, timeout=120).json()
    assert base64.b64decode(answer["mp4"], validate=True)[4:8] == b"ftyp"


def test_embeddings_stand_in_for_the_prompt(
    server: TritonServer,
    expected: list[np.ndarray[Any, Any]],
    far_bundle: Bundle,
    far_pipeline: Path,
) -> None:
    text = encode_prompts(far_pipeline, [PROMPT], far_bundle.manifest.video.text_tokens)
    given = {
        "prompt_embeds": text[0],
        "seed": 7,
        "num_frames": 29,
        "num_inference_steps": 2,
        "output_type": "latents",
    }
    for chunk, latents in zip(Stream(server, **given).rest(), expected, strict=True):
        np.testing.assert_allclose(chunk["latents"], latents, atol=1e-5)


def test_a_bidirectional_model(
    server: TritonServer, tiny_bundle: Bundle, tiny_pipeline: Path
) -> None:
    chunks = made(server, model="flat", num_frames=17, output_type="latents")
    manifest = tiny_bundle.manifest
    text = encode_prompts(tiny_pipeline, [PROMPT], manifest.video.text_tokens)
    start = noise((1, *manifest.latent_shape(17, None, None)), 7)
    wanted = sample(
        load_engine(tiny_bundle, threads=1),
        start,
        text,
        Schedule.uniform(2, manifest.schedule.shift),
    )
    np.testing.assert_allclose(
        np.concatenate([chunk["latents"] for chunk in chunks]), wanted[0], atol=1e-5
    )
    assert [int(chunk["steps"][0]) for chunk in chunks] == [2, *[0] * (len(chunks) - 1)]
    assert (
        sum(
            len(chunk["frames"])
            for chunk in made(server, model="flat", num_frames=17, output_type="frames")
        )
        == 17
    )


def test_deadlines(server: TritonServer) -> None:
    chunks = made(server, deadline_ms=1500.0, num_inference_steps=6)
    assert all(chunk["deadline_met"][0] for chunk in chunks) and {
        int(chunk["steps"][0]) for chunk in chunks
    } == {6}
    hasty = made(server, deadline_ms=0.001)
    assert not any(chunk["deadline_met"][0] for chunk in hasty) and {
        int(chunk["steps"][0]) for chunk in hasty
    } == {1}
    assert server.value("anyflow_deadlines_missed_total", model="anyflow") >= len(hasty)


def test_a_seed_is_chosen_and_told(server: TritonServer) -> None:
    given = {"prompt": PROMPT, "num_frames": 5, "num_inference_steps": 1, "output_type": "latents"}
    first, second = (Stream(server, **given).rest()[0] for _ in range(2))
    assert first["seed"] != second["seed"]
    again = Stream(server, **given, seed=int(first["seed"][0])).rest()[0]
    np.testing.assert_array_equal(again["latents"], first["latents"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"prompt": None},
            "a request has either prompt or prompt_embeds, and this one has neither",
        ),
        ({"prompt_embeds": np.zeros((512, 64), np.float32)}, "and this one has both"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": b"\xff\xfe"}, "prompt is not UTF-8"),
        ({"prompt": "fox " * 600}, "the prompt has 601 tokens and the model takes 512"),
        (
            {"prompt": None, "prompt_embeds": np.zeros((512, 8), np.float32)},
            "allowed is (1 to any, 64): tokens, channels",
        ),
        (
            {"prompt": None, "prompt_embeds": np.full((512, 64), np.nan, np.float32)},
            "holds NaN or infinity",
        ),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 401}, "this server allows 400"),
        ({"deadline_ms": -1.0}, "deadline_ms is -1.0"),
        ({"deadline_ms": float("nan")}, "deadline_ms is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"num_frames": 30}, "The nearest is 29"),
        ({"num_frames": 4001}, "this server allows 81"),
        ({"width": 40}, "allowed are multiples of 16"),
        ({"window": 0}, "window is 0"),
        ({"output_type": "gif"}, "allowed are mp4-base64, mp4, frames, latents"),
    ],
)
def test_bad_input_is_refused(server: TritonServer, given: dict[str, Any], message: str) -> None:
    whole = {"prompt": PROMPT, **given}
    with pytest.raises(Exception, match=re.escape(message)):
        Stream(server, **{name: value for name, value in whole.items() if value is not None}).rest()


def test_a_cancelled_stream_ends_between_two_transitions(server: TritonServer) -> None:
    before = server.value("anyflow_videos_total", end="cancelled")
    long = Stream(server, prompt=PROMPT, num_inference_steps=400, output_type="latents")
    eventually(lambda: server.value("anyflow_active_streams", model="anyflow") == 1)
    long.cancel()
    eventually(lambda: server.value("anyflow_active_streams", model="anyflow") == 0)
    eventually(lambda: server.value("anyflow_videos_total", end="cancelled") == before + 1)
    assert server.value("anyflow_cache_bytes", model="anyflow") == 0


def test_who_hangs_up_over_http_cancels(server: TritonServer) -> None:
    before = server.value("anyflow_videos_total", end="cancelled")
    body = f'{{"prompt": "{PROMPT}", "num_inference_steps": 400}}'
    url = f"http://{server.http}/v2/models/anyflow/generate_stream"
    # curl's time was up.
    assert (
        subprocess.run(["curl", "-s", "-N", "-m", "1", url, "-d", body], check=False).returncode
        == 28
    )
    eventually(lambda: server.value("anyflow_videos_total", end="cancelled") == before + 1)


def test_eight_streams_at_once(server: TritonServer, expected: list[np.ndarray[Any, Any]]) -> None:
    """More than there is room for: half of them wait; each one's chunks are what it gets alone;
    they advance side by side."""
    seen, done = [0.0], threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.append(server.value("anyflow_active_streams", model="anyflow"))

    watcher = threading.Thread(target=look)
    watcher.start()
    arrived: list[tuple[int, int]] = []

    def one(number: int) -> list[np.ndarray[Any, Any]]:
        request = Stream(
            server,
            prompt=PROMPT,
            seed=7,
            num_frames=29,
            num_inference_steps=2,
            output_type="latents",
        )
        latents = []
        for chunk in iter(request.next, None):
            arrived.append((number, int(chunk["chunk"][0])))
            latents.append(chunk["latents"])
        request.close()
        return latents

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one, range(8)))
    done.set()
    watcher.join()
    for latents in results:
        for got, wanted in zip(latents, expected, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert max(seen) == STREAMS
    before_any_end = arrived[
        : next(i for i, (_, chunk) in enumerate(arrived) if chunk == len(expected) - 1)
    ]
    # Nobody waits for another to end. How many get that far depends on the machine.
    assert len({number for number, _ in before_any_end}) > 1


def test_who_finds_the_queue_full_is_told_so(server: TritonServer) -> None:
    long = {"prompt": PROMPT, "num_inference_steps": 400, "output_type": "latents"}
    accepted = [Stream(server, **long) for _ in range(STREAMS + WAITING)]
    eventually(lambda: server.value("anyflow_waiting_requests", model="anyflow") == WAITING)
    with pytest.raises(Exception, match="the server is full: 4 videos are running and 6 wait"):
        Stream(server, **long).rest()
    answer = httpx.post(f"http://{server.http}/v2/models/anyflow/generate", json={"prompt": PROMPT})
    assert answer.status_code >= 400 and "Try again later" in answer.json()["error"]
    for one in reversed(accepted):  # those that wait, first
        one.cancel()
    for metric in ("anyflow_waiting_requests", "anyflow_active_streams", "anyflow_cache_bytes"):
        eventually(lambda metric=metric: server.value(metric, model="anyflow") == 0)
    assert len(made(server)) > 2


def test_the_examples_of_the_document(server: TritonServer, tmp_path: Path) -> None:
    ports = {
        "127.0.0.1:8000": server.http,
        "127.0.0.1:8001": server.grpc,
        "127.0.0.1:8002": server.metrics,
    }

    def here(text: str) -> str:
        return re.sub("|".join(ports), lambda found: ports[found[0]], text)

    blocks = re.findall(r"```(sh|python)\n(.*?)```", DOCUMENT, re.DOTALL)
    asking = [(kind, here(block)) for kind, block in blocks if any(port in block for port in ports)]
    assert [kind for kind, _ in asking] == ["sh", "python", "sh"]
    for kind, block in asking:
        words = (
            ["bash", "-e", "-o", "pipefail", "-c", block]
            if kind == "sh"
            else [sys.executable, "-c", block]
        )
        done = subprocess.run(
            words, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
    assert (
        len(load_video(tmp_path / "fox.mp4")) == len(load_video(tmp_path / "fox-python.mp4")) == 29
    )
    assert "anyflow_first_chunk_seconds_bucket" in done.stdout


def test_killed_and_started_again(
    repository: Path, expected: list[np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    first = TritonServer(ENVIRONMENT, repository, tmp_path / "log")
    first.start()
    try:
        first.wait_ready("anyflow")
        cut = Stream(first, prompt=PROMPT, num_inference_steps=400, output_type="latents")
        eventually(lambda: first.value("anyflow_active_streams", model="anyflow") == 1)
        first.kill()
        with pytest.raises(grpcclient.InferenceServerException):
            cut.rest()
        second = TritonServer(ENVIRONMENT, repository, tmp_path / "log2")
        second.start()
        try:
            second.wait_ready("anyflow")
            for chunk, latents in zip(made(second, output_type="latents"), expected, strict=True):
                np.testing.assert_allclose(chunk["latents"], latents, atol=1e-5)
            running = Stream(second, prompt=PROMPT, num_inference_steps=400, output_type="latents")
            eventually(lambda: second.value("anyflow_active_streams", model="anyflow") == 1)
            running.cancel()
            assert second.stop() == 0
        finally:
            second.kill()
    finally:
        first.kill()


def test_what_cannot_be_loaded_says_why(repository: Path, tmp_path: Path) -> None:
    """A changed bundle, an unknown parameter, a numpy that the wheel's Python backend cannot read,
    a plan without its backend."""
    models = tmp_path / "models"
    shutil.copytree(repository / "anyflow", models / "changed")
    shutil.copytree(repository / "anyflow", models / "misspelt")
    weights = models / "changed" / "1" / "bundle" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    for name in ("changed", "misspelt"):
        config = models / name / "config.pbtxt"
        config.write_text(config.read_text().replace('name: "anyflow"', f'name: "{name}"', 1))
    config.write_text(config.read_text().replace('"max_steps"', '"max_stepps"'))
    log = tmp_path / "log"
    server = TritonServer(ENVIRONMENT, models, log)
    server.start()
    try:
        eventually(lambda: "Started GRPCInferenceService" in server.text, 120)
        assert "weights.safetensors was changed" in server.text
        assert (
            "unknown parameter 'max_stepps'" in server.text
            and "Did you mean 'max_steps'?" in server.text
        )
    finally:
        server.kill()
    if int(np.__version__.split(".")[0]) < 2:
        pytest.skip("this Python has the older numpy itself")
    shutil.rmtree(models)
    shutil.copytree(repository / "anyflow", models / "anyflow")
    server = TritonServer(
        ENVIRONMENT, models, tmp_path / "log-numpy", python=Path(sys.executable).parent
    )
    server.start()
    try:
        eventually(lambda: "Started GRPCInferenceService" in server.text, 120)
        assert (
            "cannot read arrays of numpy 2" in server.text
            and "pip install 'numpy<2'" in server.text
        )
    finally:
        server.kill()
