"""What `anyflow-triton` writes and its model does, without a server; test_tritonserver_real.py asks
a real one."""

from __future__ import annotations

import json
import re
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from anyflow_deploy import AnyFlowError, Bundle, Schedule, noise, stream
from anyflow_deploy.bundle.manifest import FileRecord
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.cli.tritonserver import TritonOptions, _flag_of_setting, triton
from anyflow_deploy.engines.engine_folder import DeviceRecord, EngineFolder, EngineRecord
from anyflow_deploy.engines.kv_cache import fit_chunks
from anyflow_deploy.engines.tritonserver.admission import Admission, CapacityError
from anyflow_deploy.engines.tritonserver.checks import cache_of, check_settings, check_version
from anyflow_deploy.engines.tritonserver.fair_lock import FairLock
from anyflow_deploy.engines.tritonserver.generator import (
    GeneratedChunk,
    generate_chunks,
    join_chunks,
)
from anyflow_deploy.engines.tritonserver.io_spec import INPUTS, OUTPUTS, SINGLE_OUTPUTS
from anyflow_deploy.engines.tritonserver.repository import check_plan, model_writer, write_plan
from anyflow_deploy.engines.tritonserver.request import parse_request, refuse_parameters
from anyflow_deploy.engines.tritonserver.settings import Settings, settings_from_parameters
from anyflow_deploy.pipelines.video_pipeline import VideoPipeline
from anyflow_deploy.serving.job import CancelledError
from tests.conftest import Export
from tests.fakes.serving import eventually, fake_manifest
from tests.json_reference import documented_fields

model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")

DOCUMENT = (Path(__file__).parents[2] / "docs" / "how-to" / "triton.md").read_text()
SETTINGS = Settings(max_frames=81, max_pixels=10_000)


def config_of(folder: Path) -> Any:
    """config.pbtxt, read as the server reads it."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def written(bundle: Bundle, folder: Path, *flags: str) -> Path:
    assert (
        triton(parse_options(TritonOptions, [str(bundle.path), "--output", str(folder), *flags]))
        == 0
    )
    return folder / "anyflow"


def words(bundle: Bundle, tokens: int | None = None) -> np.ndarray[Any, Any]:
    tokens = tokens or bundle.manifest.video.text_tokens
    return (
        np.random.default_rng(3)
        .standard_normal((tokens, bundle.manifest.architecture.text_dim))
        .astype(np.float32)
    )


# The repository


def test_a_repository_holds_everything(
    far_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--threads", "2", "--cache-gb", "0.5", "--json")
    model = written(far_bundle, tmp_path / "models", *flags)
    document = json.loads(capsys.readouterr().out)
    assert set(document) == documented_fields("anyflow-triton")
    assert (document["repository"], document["name"]) == (str(model.parent), "anyflow")
    assert (document["gpus"], document["parts"]) == (None, ["text", "vae"])
    config = config_of(model)
    assert (config.name, config.backend, config.max_batch_size) == ("anyflow", "python", 0)
    assert config.model_transaction_policy.decoupled
    for ports, tensors in ((INPUTS, config.input), (OUTPUTS, config.output)):
        kinds = [
            (t.name, model_config_pb2.DataType.Name(t.data_type), tuple(t.dims)) for t in tensors
        ]
        assert kinds == [(p.name, f"TYPE_{p.type}", p.shape) for p in ports]
    assert all(tensor.optional for tensor in config.input)
    (group,) = config.instance_group
    assert (group.kind, group.count) == (model_config_pb2.ModelInstanceGroup.KIND_CPU, 1)
    (warm,) = config.model_warmup
    assert (
        model / "warmup" / warm.inputs["num_inference_steps"].input_data_file
    ).read_bytes() == b"\1\0\0\0"
    settings = settings_from_parameters(
        {name: {"string_value": value.string_value} for name, value in config.parameters.items()}
    )
    assert (settings.threads, settings.cache_bytes, settings.text, settings.vae) == (
        2,
        500_000_000,
        True,
        True,
    )
    held = {
        str(path.relative_to(model / "1")) for path in (model / "1").rglob("*") if path.is_file()
    }
    assert {
        "model.py",
        "bundle/manifest.json",
        "pipeline/tokenizer/tokenizer.json",
        "pipeline/vae/config.json",
    } <= held
    weights = "bundle/weights.safetensors"
    # No second copy on one file system
    assert (model / "1" / weights).samefile(far_bundle.path / "weights.safetensors")


def test_parts_that_are_not_served_are_not_there(far_bundle: Bundle, tmp_path: Path) -> None:
    model = written(far_bundle, tmp_path, "--parts", "none")
    assert not (model / "1" / "pipeline").exists()
    written(far_bundle, tmp_path, "--parts", "vae", "--overwrite")
    assert {path.name for path in (model / "1" / "pipeline").iterdir()} == {"vae"}


def test_a_bundle_without_a_pipeline_names_the_way_out(
    small_bundle: Export, tmp_path: Path
) -> None:
    with pytest.raises(AnyFlowError, match="leave them out with --parts none"):
        written(small_bundle(), tmp_path)
    assert not (tmp_path / "anyflow").exists()


def test_gpus_become_instances(far_bundle: Bundle, tmp_path: Path) -> None:
    (group,) = config_of(
        written(far_bundle, tmp_path, "--gpus", "0,2", "--parts", "none")
    ).instance_group
    assert (group.kind, list(group.gpus)) == (model_config_pb2.ModelInstanceGroup.KIND_GPU, [0, 2])


def test_a_model_that_is_there_stays(far_bundle: Bundle, tmp_path: Path) -> None:
    model = written(far_bundle, tmp_path, "--parts", "none")
    before = (model / "config.pbtxt").stat().st_ino
    with pytest.raises(AnyFlowError, match="--overwrite"):
        written(far_bundle, tmp_path, "--parts", "none")
    assert (model / "config.pbtxt").stat().st_ino == before
    (tmp_path / "mine").mkdir()
    with pytest.raises(AnyFlowError, match="is not a Triton model"):
        written(far_bundle, tmp_path, "--parts", "none", "--overwrite", "--name", "mine")
    assert {path.name for path in tmp_path.iterdir()} == {"anyflow", "mine"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parts", "text,audio"], "allowed are text,vae, text, vae, or none"),
        (["--parts", "none,vae"], "allowed are"),
        (["--transition"], "give --backend tensorrt"),
        (
            ["--transition", "--backend", "tensorrt", "--single-response"],
            "leave --single-response out",
        ),
        (["--kernel-specialization", "eager"], "it is an option of tensorrt-rtx. Leave it out"),
        (["--engine", "fast"], "give --backend"),
        (["--name", "a/b"], "--name is 'a/b'"),
        (["--gpus", "0,x"], "--gpus"),
        (["--backend", "tensort"], "Did you mean 'tensorrt'?"),
    ],
)
def test_wrong_flags(flags: list[str], message: str) -> None:
    with pytest.raises(AnyFlowError, match=message.replace("?", r"\?")):
        parse_options(TritonOptions, ["bundle", "--output", "models", *flags])


def plan(bundle: Bundle, folder: Path, **settings: Any) -> EngineFolder:
    """A TensorRT engine's folder, with a plan that nobody can open."""
    folder.mkdir()
    (folder / "transition.plan").write_bytes(b"plan")
    record = EngineRecord(
        backend="tensorrt",
        bundle=bundle.digest,
        device=DeviceRecord(kind="cuda", name="a GPU"),
        versions={},
        settings=settings,
        ranges={},
        profiles={"transition": {"small": {}, "large": {}}},
        seconds=1.0,
        files={"transition.plan": FileRecord(bytes=4, sha256="")},
    )
    return EngineFolder(folder, record)


def test_the_bare_transition(tiny_bundle: Bundle, far_bundle: Bundle, tmp_path: Path) -> None:
    engine = plan(tiny_bundle, tmp_path / "engine")
    with model_writer(tmp_path / "models", "bare", False) as writer:
        write_plan(writer, tiny_bundle, engine, (1,))
    config = config_of(tmp_path / "models" / "bare")
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 0)
    graph = tiny_bundle.manifest.graphs["transition"]
    assert [t.name for t in config.input] == [t.name for t in graph.inputs]
    assert [len(t.dims) for t in config.input] == [len(t.shape) for t in graph.inputs]
    assert {d for t in config.input for d in t.dims if d < 0} == {-1}
    (group,) = config.instance_group
    assert (list(group.gpus), list(group.profile)) == ([1], ["0", "1"])
    assert (tmp_path / "models" / "bare" / "1" / "model.plan").read_bytes() == b"plan"
    with pytest.raises(AnyFlowError, match="is causal"):
        check_plan(far_bundle, engine)
    for setting in ("strip", "weight_streaming"):
        with pytest.raises(AnyFlowError, match="cannot open"):
            check_plan(tiny_bundle, plan(tiny_bundle, tmp_path / setting, **{setting: True}))


def test_the_document_lists_every_tensor_parameter_and_metric() -> None:
    for port in (*INPUTS, *OUTPUTS):
        assert f"| `{port.name}` | {port.type}" in DOCUMENT and f"| {port.about} |" in DOCUMENT
    for line in DOCUMENT.splitlines():
        if line.startswith("anyflow-triton"):
            parse_options(TritonOptions, shlex.split(line, comments=True)[1:])
    # These are written only by the flags that name them.
    left_out = {
        "bundle",
        "pipeline",
        "text",
        "vae",
        "backend",
        "engine",
    }
    assert not [
        name
        for name in Settings.model_fields
        if f"`{name}`" not in DOCUMENT and name not in left_out
    ]
    source = (
        Path(sys.modules["anyflow_deploy.engines.tritonserver"].__file__ or "").parent
        / "metrics.py"
    )
    for line in source.read_text().splitlines():
        if '"anyflow_' in line:
            assert line.split('"')[1] in DOCUMENT


# Settings and requests


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_stepps": "4"}, "Did you mean 'max_steps'?"),
        ({"max_steps": "many"}, "max_steps = 'many'"),
        ({"max_streams": "0"}, "max_streams = '0'"),
        ({"max_frames": None}, "lacks the parameter 'max_frames'"),
    ],
)
def test_parameters_are_read_suspiciously(changed: dict[str, str | None], message: str) -> None:
    texts = {**SETTINGS.as_parameters(), **changed}
    with pytest.raises(AnyFlowError, match=message.replace("?", r"\?")):
        settings_from_parameters(
            {name: {"string_value": text} for name, text in texts.items() if text is not None}
        )


def test_parameters_come_back() -> None:
    settings = SETTINGS.model_copy(
        update={
            "threads": 3,
            "pipeline": "pipeline",
            "text": False,
            "kernel_specialization": "eager",
        }
    )
    assert (
        settings_from_parameters(
            {name: {"string_value": text} for name, text in settings.as_parameters().items()}
        )
        == settings
    )


def test_a_request_is_read() -> None:
    manifest = fake_manifest("far-tiny")
    tensors = {
        "prompt": np.array([b"a fox"], dtype=object),
        "num_inference_steps": np.array([3], np.int32),
        "seed": np.array([9], np.int64),
        "num_frames": np.array([13], np.int32),
        "height": np.array([32], np.int32),
        "output_type": np.array([b"frames"], dtype=object),
    }
    wanted = parse_request(tensors, manifest, SETTINGS, "anyflow")
    assert (
        wanted.request.prompt,
        wanted.request.num_inference_steps,
        wanted.request.seed,
        wanted.request.num_frames,
    ) == (
        "a fox",
        3,
        9,
        13,
    )
    assert (wanted.request.height, wanted.request.width, wanted.output_type) == (
        32,
        manifest.video.width,
        "frames",
    )
    assert (
        wanted.request.plan is not None
        and wanted.cache_bytes(2) == wanted.request.plan.bytes(2) > 0
    )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"steps": 1}, "unknown field 'steps'. Did you mean 'num_inference_steps'?"),
        ({"num_frame": 5}, "Did you mean 'num_frames'?"),
        ({"text_input": "a fox"}, "Did you mean 'prompt'?"),
        ({"response_format": "mp4"}, "Did you mean 'output_type'?"),
        ({"stream": True}, "unknown field 'stream'. Allowed are prompt, "),
        ({"negative_prompt": "blurry"}, "guidance is distilled into this model"),
        ({"id": "7", "triton_final_response": True, "negative_prompt": ""}, None),
    ],
)
def test_what_is_no_input_is_refused(parameters: dict[str, object], message: str | None) -> None:
    if message is None:
        refuse_parameters(parameters)
        return
    with pytest.raises(AnyFlowError, match=re.escape(message)):
        refuse_parameters(parameters)


def test_base64_is_the_default(far_bundle: Bundle) -> None:
    """JSON cannot hold bytes, and over HTTP everything is JSON."""
    tensors = {"prompt": np.array([b"a fox"], dtype=object)}
    assert parse_request(tensors, far_bundle.manifest, SETTINGS, "a").output_type == "mp4-base64"


@pytest.mark.parametrize(
    ("output_type", "contents", "whole"),
    [
        ("mp4", [b"a", b"bc"], b"abc"),
        ("mp4-base64", [b"YQ==", b"YmM="], b"YWJj"),  # not the two, one behind the other
        ("frames", [np.zeros((1, 2, 2, 3)), np.ones((4, 2, 2, 3))], None),
    ],
)
def test_a_whole_video_is_its_chunks(output_type: str, contents: list[Any], whole: Any) -> None:
    if whole is not None:
        contents = [np.array([content], dtype=object) for content in contents]
    chunks = [GeneratedChunk(i, i, 1, None, "mp4", content) for i, content in enumerate(contents)]
    joined = join_chunks(chunks, output_type)
    if whole is None:
        assert joined.shape == (5, 2, 2, 3) and joined[0].max() == 0 and joined[1:].min() == 1
    else:
        assert joined.tolist() == [whole]


def test_what_is_not_served_is_refused() -> None:
    manifest = fake_manifest("far-tiny")
    bare = SETTINGS.model_copy(update={"text": False, "vae": False})
    with pytest.raises(AnyFlowError, match="has no text encoder; send prompt_embeds"):
        parse_request({"prompt": np.array([b"a fox"], dtype=object)}, manifest, bare, "anyflow")
    embeds = {"prompt_embeds": np.zeros((512, manifest.architecture.text_dim), np.float32)}
    assert parse_request(embeds, manifest, bare, "anyflow").output_type == "latents"
    with pytest.raises(AnyFlowError, match=r"allowed are latents \(this server has no VAE\)"):
        parse_request(
            {**embeds, "output_type": np.array([b"mp4"], dtype=object)}, manifest, bare, "anyflow"
        )
    with pytest.raises(AnyFlowError, match="seed has 2 values"):
        parse_request({**embeds, "seed": np.array([1, 2], np.int64)}, manifest, bare, "anyflow")


# What is written can be loaded


def test_settings_under_which_the_warm_up_would_fail_are_refused(far_bundle: Bundle) -> None:
    narrow = Settings(max_frames=7, max_pixels=1100, max_steps=1)
    check_settings(far_bundle.manifest, narrow)  # the default video is shorter and smaller, then
    with pytest.raises(AnyFlowError, match="--max-pixels is 256; the smallest .* Allow at least"):
        check_settings(
            far_bundle.manifest, Settings(max_frames=7, max_pixels=256), _flag_of_setting
        )
    eager = Settings(max_frames=7, max_pixels=1100, kernel_specialization="eager")
    with pytest.raises(AnyFlowError, match="it is an option of tensorrt-rtx"):
        check_settings(far_bundle.manifest, eager)


def test_a_cache_below_one_video_is_refused(far_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(AnyFlowError, match=r"--cache-gb leaves 0\.1 MB .* default size takes"):
        written(far_bundle, tmp_path, "--parts", "none", "--cache-gb", "0.0001")
    assert not list(tmp_path.iterdir())


def test_what_was_written_is_opened_before_it_gets_its_name(
    server: Any, far_bundle: Bundle, tmp_path: Path
) -> None:
    """`--max-frames 17` is below the bundle's own video."""
    assert far_bundle.manifest.video.frames > 17
    model = opened(server, far_bundle, tmp_path, "--max-frames", "17")
    warm = Sender()
    embeds, steps = words(far_bundle), np.array([1], np.int32)
    model.execute([request(warm, prompt_embeds=embeds, num_inference_steps=steps)])
    assert warm.final.wait(60) and warm.sent[0].error is None
    model.finalize()
    parameters = Settings(max_frames=17, max_pixels=10_000, vae=True, pipeline="pipeline")
    version = tmp_path / "models" / "anyflow" / "1"
    with pytest.raises(AnyFlowError, match="lacks tokenizer/ of the pipeline"):
        check_version(version, parameters.as_parameters())
    (version / "bundle" / "manifest.json").unlink()
    with pytest.raises(AnyFlowError, match="is not a bundle"):
        check_version(version, parameters.as_parameters())


# Turns and admission


def test_turns_are_taken_in_order() -> None:
    """Whoever has its turn ends it only when both others wait, so the order is the lock's and not
    the scheduler's."""
    turns, order = FairLock(), []

    def one(name: int) -> None:
        for _ in range(20):
            with turns:
                order.append(name)
                if len(order) <= 50:  # later, one may have gone for good
                    eventually(lambda: turns._next_ticket - turns._now_serving == 3)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(one, range(3)))
    midst = order[3:51]  # where all three are there
    assert all(len(set(midst[i : i + 3])) == 3 for i in range(len(midst) - 3))


@given(
    costs=st.lists(st.integers(0, 10), min_size=1, max_size=12),
    streams=st.integers(1, 4),
    room=st.integers(10, 20),
)
def test_admission_never_gives_more_than_there_is(
    costs: list[int], streams: int, room: int
) -> None:
    told: list[tuple[int, int, int]] = []
    admission = Admission(streams, room, len(costs), lambda *now: told.append(now))
    tickets = [admission.enqueue(cost) for cost in costs]
    went: list[int] = []

    def one(number: int) -> None:
        with admission.admit(tickets[number], lambda: None):
            went.append(number)

    with ThreadPoolExecutor(len(costs)) as pool:
        list(pool.map(one, range(len(costs))))
    assert sorted(went) == list(range(len(costs)))
    assert all(active <= streams and held <= room for active, _, held in told)
    assert told[-1] == (0, 0, 0)


def test_who_waits_may_give_up_and_the_next_one_goes() -> None:
    admission = Admission(1, 100, 2)
    first, second, third = (admission.enqueue(1) for _ in range(3))
    with pytest.raises(CapacityError, match="1 videos are running and 2 wait"):
        admission.enqueue(1)
    with pytest.raises(AnyFlowError, match="the cache of this video takes"):
        admission.enqueue(101)

    def unwanted() -> None:
        raise CancelledError

    with (
        admission.admit(first, lambda: None),
        pytest.raises(CancelledError),
        admission.admit(second, unwanted),
    ):
        pytest.fail("there was no room")
    with admission.admit(third, lambda: None):
        pass


def test_a_large_one_is_not_overtaken() -> None:
    admission = Admission(4, 10, 4)
    first = admission.enqueue(6)
    large = admission.enqueue(8)
    small = admission.enqueue(1)
    entered: list[str] = []

    def one(name: str, ticket: Any) -> None:
        with admission.admit(ticket, lambda: None):
            entered.append(name)
            time.sleep(0.05)

    threads = [
        threading.Thread(target=one, args=pair) for pair in (("large", large), ("small", small))
    ]
    with admission.admit(first, lambda: None):
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        assert entered == []
    for thread in threads:
        thread.join()
    assert sorted(entered) == ["large", "small"]


# The model


def test_streams_share_a_pipeline(far_bundle: Bundle) -> None:
    """Two at once, in turns: each gets what it gets alone."""
    manifest = far_bundle.manifest
    with_seed = {
        "num_frames": np.array([17], np.int32),
        "num_inference_steps": np.array([2], np.int32),
    }
    bare = SETTINGS.model_copy(update={"text": False, "vae": False})
    embeds = words(far_bundle)
    pipeline = VideoPipeline(far_bundle, threads=1, device_lock=FairLock())
    engine = pipeline.engine

    def one(seed: int) -> list[np.ndarray[Any, Any]]:
        tensors = {**with_seed, "prompt_embeds": embeds, "seed": np.array([seed], np.int64)}
        pieces = list(
            generate_chunks(
                pipeline, parse_request(tensors, manifest, bare, "anyflow"), lambda: None
            )
        )
        assert [piece.steps for piece in pieces] == [2] * len(pieces)
        return [piece.content for piece in pieces]

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(one, (1, 2)))
    shape = manifest.latent_shape(17, None, None)
    chunks = fit_chunks(manifest.architecture.chunk_partition or (), shape[0])
    for seed, latents in zip((1, 2), together, strict=True):
        alone = stream(
            engine,
            noise((1, *shape), seed),
            embeds[None],
            Schedule.uniform(2, manifest.schedule.shift),
            chunks,
        )
        for got, chunk in zip(latents, alone, strict=True):
            np.testing.assert_array_equal(got, chunk.latents[0])


class Sender:
    """Stands in for Triton's response sender."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.cancelled = False
        self.final = threading.Event()

    def send(self, response: Any = None, flags: int = 0) -> None:
        assert not self.final.is_set(), "a response after the last one"
        if response is not None:
            self.sent.append(response)
        if flags:
            self.final.set()

    def is_cancelled(self) -> bool:
        return self.cancelled


class Tensor:
    """Stands in for Triton's tensor; `broken` as the stub that cannot read this numpy."""

    broken = False

    def __init__(self, name: str, values: Any) -> None:
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._values

    def to_dlpack(self) -> Any:
        return self._values * (not self.broken)

    @staticmethod
    def from_dlpack(name: str, values: Any) -> Tensor:
        return Tensor(name, values)


class Counted:
    """Stands in for a metric of Triton's."""

    def __init__(self) -> None:
        self.value = 0.0

    def set(self, value: float) -> None:
        self.value = value

    def increment(self, by: float) -> None:
        self.value += by

    observe = increment


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in for `triton_python_backend_utils`; its metrics by name."""
    utils: Any = ModuleType("triton_python_backend_utils")
    utils.metrics = {}

    class MetricFamily:
        GAUGE, COUNTER, HISTOGRAM = "gauge", "counter", "histogram"

        def __init__(self, name: str, description: str, kind: str) -> None:
            self._name = name

        def Metric(self, labels: dict[str, str], buckets: Any = None) -> Counted:  # noqa: N802 - Triton's name
            return utils.metrics.setdefault((self._name, labels.get("end")), Counted())

    class TritonError:
        INVALID_ARG = "invalid"
        UNAVAILABLE = "unavailable"
        CANCELLED = "cancelled"
        INTERNAL = "internal"

        def __init__(self, message: str, code: str) -> None:
            self.message, self.code = message, code

    utils.MetricFamily = MetricFamily
    utils.Tensor = Tensor
    utils.TritonError = TritonError
    utils.InferenceResponse = lambda output_tensors, error=None: SimpleNamespace(
        tensors=output_tensors, error=error
    )
    utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    utils.TritonModelException = type("TritonModelException", (Exception,), {})
    logged: list[str] = []
    utils.logged = logged
    utils.Logger = SimpleNamespace(
        log_info=logged.append, log_error=logged.append, log_warn=logged.append
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    yield utils
    sys.modules.pop("anyflow_deploy.engines.tritonserver.model", None)


def opened(server: Any, far_bundle: Bundle, tmp_path: Path, *flags: str, **changed: str) -> Any:
    from anyflow_deploy.engines.tritonserver.model import TritonPythonModel

    folder = written(far_bundle, tmp_path / "models", "--parts", "none", "--threads", "1", *flags)
    parameters = {
        name: {"string_value": p.string_value} for name, p in config_of(folder).parameters.items()
    }
    parameters |= {name: {"string_value": text} for name, text in changed.items()}
    model = TritonPythonModel()
    decoupled = config_of(folder).model_transaction_policy.decoupled
    config = {
        "parameters": parameters,
        "model_transaction_policy": {"decoupled": decoupled},
    }
    model.initialize(
        {
            "model_name": "anyflow",
            "model_config": json.dumps(config),
            "model_repository": str(folder),
            "model_version": "1",
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
            "model_instance_name": "anyflow_0",
        }
    )
    return model


def request(sender: Sender, parameters: str = "", **tensors: Any) -> Any:
    sent = [Tensor(name, value) for name, value in tensors.items()]
    return SimpleNamespace(
        inputs=lambda: sent, get_response_sender=lambda: sender, parameters=lambda: parameters
    )


def test_the_model_answers_cancels_refuses_and_stops(
    server: Any, far_bundle: Bundle, tmp_path: Path
) -> None:
    model = opened(
        server,
        far_bundle,
        tmp_path,
        "--max-streams",
        "1",
        "--max-waiting",
        "1",
        "--max-steps",
        "1000",
        grace_seconds="0",
    )
    embeds, metrics = words(far_bundle), server.metrics
    frames = np.array([17], np.int32)
    short = np.array([1], np.int32)
    long = np.array([1000], np.int32)

    answered = Sender()
    model.execute(
        [request(answered, prompt_embeds=embeds, num_frames=frames, num_inference_steps=short)]
    )
    assert answered.final.wait(60)
    outputs = [
        {tensor.name(): tensor.as_numpy() for tensor in response.tensors}
        for response in answered.sent
    ]
    assert [int(output["chunk"][0]) for output in outputs] == list(range(len(outputs)))
    assert {str(output["seconds"].dtype) for output in outputs} == {
        "float32"
    } and "latents" in outputs[0]

    running, waiting, surplus, wrong = (Sender() for _ in range(4))
    for sender, steps in ((running, long), (waiting, long), (surplus, long), (wrong, long * 2)):
        model.execute([request(sender, prompt_embeds=embeds, num_inference_steps=steps)])
    assert [s.sent[0].error.code for s in (surplus, wrong)] == ["unavailable", "invalid"]
    assert surplus.final.is_set() and wrong.final.is_set() and not running.final.is_set()
    assert metrics["anyflow_waiting_requests", None].value == 1
    running.cancelled = True
    assert running.final.wait(60) and running.sent[-1].error.code == "cancelled"
    eventually(lambda: metrics["anyflow_waiting_requests", None].value == 0)
    model.finalize()  # with one still running, and no grace
    assert waiting.final.is_set() and waiting.sent[-1].error.code == "unavailable"
    ends = {
        end: metrics["anyflow_videos_total", end].value
        for end in ("completed", "cancelled", "refused", "failed")
    }
    assert ends == {"completed": 1, "cancelled": 2, "refused": 2, "failed": 0}
    assert (
        metrics["anyflow_cache_bytes", None].value
        == metrics["anyflow_active_streams", None].value
        == 0
    )


def test_a_model_of_one_response(server: Any, far_bundle: Bundle, tmp_path: Path) -> None:
    model = opened(server, far_bundle, tmp_path, "--single-response")
    tensors = config_of(tmp_path / "models" / "anyflow").output
    assert [(t.name, tuple(t.dims)) for t in tensors] == [(p.name, p.shape) for p in SINGLE_OUTPUTS]
    embeds, seed = words(far_bundle), np.array([7], np.int64)
    frames, steps = np.array([17], np.int32), np.array([2], np.int32)
    tensors = {"prompt_embeds": embeds, "num_frames": frames, "num_inference_steps": steps}
    whole, wrong = Sender(), Sender()
    model.execute([request(whole, **tensors, seed=seed, deadline_ms=np.array([1e5], np.float32))])
    model.execute([request(wrong, '{"steps": 1}', **tensors)])
    assert whole.final.wait(60) and wrong.final.is_set()
    (response,) = whole.sent
    output = {tensor.name(): tensor.as_numpy() for tensor in response.tensors}
    assert set(output) == {"steps", "seconds", "seed", "deadline_met", "latents"}
    assert (
        len(output["latents"]) == 5 and output["seed"] == [7] and output["deadline_met"] == [True]
    )
    assert output["steps"].tolist() == [2] * len(fit_chunks((1, 3, 3), 5))
    assert wrong.sent[0].error.code == "invalid"
    assert "Did you mean 'num_inference_steps'?" in wrong.sent[0].error.message
    model.finalize()


def test_a_defect_ends_one_request_and_is_logged(
    server: Any, far_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(server, far_bundle, tmp_path)

    def broken(*_: object, **__: object) -> Any:
        raise ZeroDivisionError("here")
        yield

    monkeypatch.setattr(model._pipeline, "generate", broken)
    sender = Sender()
    model.execute([request(sender, prompt_embeds=words(far_bundle))])
    assert sender.final.wait(10) and sender.sent[0].error.code == "internal"
    assert "here" not in sender.sent[0].error.message and any(
        "ZeroDivisionError: here" in line for line in server.logged
    )
    eventually(lambda: server.metrics["anyflow_active_streams", None].value == 0)
    model.finalize()


def test_a_numpy_that_the_server_cannot_read_is_refused(
    server: Any, far_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "broken", True)
    with pytest.raises(server.TritonModelException, match="pip install 'numpy<2'"):
        opened(server, far_bundle, tmp_path)


def test_the_cache_budget_is_that_of_the_streams(far_bundle: Bundle) -> None:
    element, total = cache_of(far_bundle.manifest, SETTINGS)
    assert (element, total % SETTINGS.max_streams) == (4, 0)
    assert cache_of(far_bundle.manifest, SETTINGS.model_copy(update={"cache_bytes": 5})) == (4, 5)
