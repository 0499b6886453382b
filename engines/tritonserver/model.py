"""Triton's side: the class that its Python backend loads, by the `model.py` of a repository.

Triton calls `execute` from one thread and expects it back at once; every request goes on in a
thread of its own and answers through its response sender. Closing the sender is what ends a
request, so it happens whatever else does.
"""

from __future__ import annotations

import json
import threading
import time
import traceback
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as server
from numpy.typing import NDArray

from anyflow_deploy.bundle.bundle import Bundle, load_bundle
from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.engines.kv_cache import cache_plan
from anyflow_deploy.engines.tritonserver.admission import Admission, CapacityError, Ticket
from anyflow_deploy.engines.tritonserver.fair_lock import FairLock
from anyflow_deploy.engines.tritonserver.generator import GeneratedChunk, generate_chunks
from anyflow_deploy.engines.tritonserver.io_spec import OUTPUTS
from anyflow_deploy.engines.tritonserver.metrics import TRITON_API_LOCK, Metrics
from anyflow_deploy.engines.tritonserver.request import ParsedRequest, parse_request
from anyflow_deploy.engines.tritonserver.settings import Settings, settings_from
from anyflow_deploy.errors import AnyFlowError, BackendError
from anyflow_deploy.pipelines.request import cache_element_bytes
from anyflow_deploy.pipelines.video_pipeline import VideoPipeline
from anyflow_deploy.serving.job import CancelledError

_NUMPY = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32, "BOOL": np.bool_}
_TYPES: dict[str, Any] = {port.name: _NUMPY[port.type] for port in OUTPUTS if port.type in _NUMPY}
"""Of the outputs that are sent with every chunk."""


class ResponseStream:
    """Where the chunks of one request go: Triton's response sender, used by one thread of this
    process at a time.

    Args:
        sender: of the request.
    """

    def __init__(self, sender: Any) -> None:
        self._sender = sender

    @property
    def cancelled(self) -> bool:
        """Nobody waits for it any more."""
        with TRITON_API_LOCK:
            return bool(self._sender.is_cancelled())

    def send(self, tensors: list[tuple[str, NDArray[Any]]]) -> None:
        """Send a chunk."""
        with TRITON_API_LOCK:
            self._sender.send(
                server.InferenceResponse(
                    output_tensors=[server.Tensor(*tensor) for tensor in tensors]
                )
            )

    def end(self) -> None:
        """There are no more chunks."""
        with TRITON_API_LOCK:
            self._sender.send(flags=server.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def fail(self, message: str, code: Any) -> None:
        """It ends with an error."""
        with TRITON_API_LOCK:
            response = server.InferenceResponse(
                output_tensors=[], error=server.TritonError(message, code)
            )
            self._sender.send(response, flags=server.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def refuse(self, error: AnyFlowError) -> None:
        """It ends with what was wrong with it."""
        full = isinstance(error, CapacityError)
        self.fail(
            str(error), server.TritonError.UNAVAILABLE if full else server.TritonError.INVALID_ARG
        )


class TritonPythonModel:
    """See the module."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load everything; the server reports the model as not ready until then, and until it is
        warm."""
        try:
            check_arrays()
            self._open(args)
        except AnyFlowError as error:
            raise server.TritonModelException(str(error)) from None

    def _open(self, args: dict[str, str]) -> None:
        self._name = args["model_name"]
        self._settings = settings = settings_from(json.loads(args["model_config"])["parameters"])
        folder = Path(args["model_repository"]) / args["model_version"]
        gpu = (
            int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        )
        bundle = load_bundle(folder / settings.bundle)
        self._pipeline = load_pipeline(bundle, folder, settings, gpu)
        self._metrics = Metrics(server, self._name, args["model_instance_name"])
        self._element, most = cache_of(bundle.manifest, settings)
        self._admission = Admission(
            settings.max_streams, most, settings.max_waiting, self._metrics.streams
        )
        self._threads: set[threading.Thread] = set()
        self._stopping = threading.Event()
        server.Logger.log_info(
            f"{self._name}: {self._pipeline.engine.description}, bundle {bundle.digest[:16]}"
        )

    def execute(self, requests: list[Any]) -> None:
        """Take requests; see the module."""
        for request in requests:
            began = time.perf_counter()
            with TRITON_API_LOCK:
                answer = ResponseStream(request.get_response_sender())
            try:
                with TRITON_API_LOCK:
                    tensors = {
                        tensor.name(): np.array(tensor.as_numpy()) for tensor in request.inputs()
                    }
                wanted = parse_request(tensors, self._pipeline.manifest, self._settings, self._name)
                if wanted.prompt_embeds is None:
                    self._pipeline.check_prompt(wanted.request.prompt)
                ticket = self._admission.ask(wanted.cache_bytes(self._element))
            except AnyFlowError as error:
                answer.refuse(error)
                self._metrics.ended("refused")
                continue
            except Exception:  # noqa: BLE001 - this request is lost, the next may do better
                self._fail(answer)
                continue
            thread = threading.Thread(
                target=self._run, args=(wanted, ticket, answer, began), daemon=True
            )
            self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError:  # no more threads
                self._threads.discard(thread)
                self._admission.leave(ticket)
                self._fail(answer)

    def finalize(self) -> None:
        """Let running videos finish for a while, then end them before their next transition."""
        end = time.monotonic() + self._settings.grace_seconds
        for thread in list(self._threads):
            thread.join(max(0.0, end - time.monotonic()))
        self._stopping.set()
        for thread in list(self._threads):
            thread.join()
        self._pipeline.close()

    def _run(
        self, wanted: ParsedRequest, ticket: Ticket, answer: ResponseStream, began: float
    ) -> None:
        """One request."""

        def check() -> None:
            if self._stopping.is_set() or answer.cancelled:
                raise CancelledError

        try:
            with (
                self._admission.within(ticket, check),
                closing(generate_chunks(self._pipeline, wanted, check)) as pieces,
            ):
                before = began
                for made in pieces:
                    now = time.perf_counter()
                    answer.send(_tensors(made, wanted, now - began))
                    self._metrics.chunk(made.index, now - before, made.steps, made.deadline_met)
                    before = now
            answer.end()
            self._metrics.ended("completed")
        except CancelledError:
            stopped = self._stopping.is_set()
            code = server.TritonError.UNAVAILABLE if stopped else server.TritonError.CANCELLED
            answer.fail(
                (
                    "the server is being stopped; ask again later."
                    if stopped
                    else "cancelled on request."
                ),
                code,
            )
            self._metrics.ended("cancelled")
        except AnyFlowError as error:
            answer.refuse(error)
            self._metrics.ended("refused")
        except Exception:  # noqa: BLE001 - the other streams go on
            self._fail(answer)
        finally:
            self._threads.discard(threading.current_thread())

    def _fail(self, answer: ResponseStream) -> None:
        """A defect of ours: the log has all of it."""
        server.Logger.log_error(f"{self._name}: {traceback.format_exc()}")
        answer.fail("an error of the server; its log has it.", server.TritonError.INTERNAL)
        self._metrics.ended("failed")


def check_arrays() -> None:
    """Refuse a numpy that this server's Python backend cannot read: it would take the whole server
    down with the first text.

    Raises:
        BackendError: naming the version, and what to install.
    """
    sent = np.arange(6, dtype=np.float32).reshape(2, 3)
    received = server.Tensor.from_dlpack(
        "received", server.Tensor("sent", sent).to_dlpack()
    ).as_numpy()
    if not np.array_equal(sent, received):
        raise BackendError(
            "this server's Python backend was built before numpy 2 and cannot read arrays of numpy"
            f" {np.__version__}. Where the server runs: pip install 'numpy<2', or take a newer"
            " server."
        )


def load_pipeline(
    bundle: Bundle, folder: Path, settings: Settings, gpu: int | None
) -> VideoPipeline:
    """Load the engine, and text encoder and VAE where they are served.

    Args:
        bundle: to serve.
        folder: of the model's version in the repository.
        settings: of the model.
        gpu: its number; None for the CPU.

    Raises:
        AnyFlowError: config.pbtxt names no pipeline, or something cannot be loaded.
    """
    if (settings.text or settings.vae) and settings.pipeline is None:
        raise AnyFlowError(
            "config.pbtxt serves text or vae and names no pipeline. Write it again with"
            " anyflow-triton."
        )
    pipeline = VideoPipeline(
        bundle,
        backend=settings.backend,
        provider="cpu" if gpu is None else "cuda",
        threads=settings.threads,
        engine=settings.engine,
        pipeline=None if settings.pipeline is None else folder / settings.pipeline,
        gpu=gpu or 0,
        torch_device="cpu" if gpu is None else f"cuda:{gpu}",
        device_lock=FairLock(),
    )
    pipeline.load(text=settings.text, vae=settings.vae)
    if settings.text:
        pipeline.encode_prompt("a red fox")  # warms the text encoder up
    return pipeline


def cache_of(manifest: Manifest, settings: Settings) -> tuple[int, int]:
    """Bytes of an element of the cache, and of all caches together at most; (0, 0) for a
    bidirectional model, which has none."""
    if manifest.kind == "bidirectional":
        return 0, 0
    element = cache_element_bytes(manifest)
    _, _, rows, columns = manifest.latent_shape(None, None, None)
    plan = cache_plan(manifest.architecture, None, rows, columns, None, manifest.video.text_tokens)
    return element, settings.cache_bytes or settings.max_streams * plan.bytes(element)


def _tensors(
    made: GeneratedChunk, wanted: ParsedRequest, seconds: float
) -> list[tuple[str, NDArray[Any]]]:
    numbers = {
        "chunk": made.index,
        "first_frame": made.first_frame,
        "steps": made.steps,
        "seconds": seconds,
        "deadline_met": made.deadline_met,
        "seed": wanted.request.seed,
    }
    tensors = [
        (name, np.array([n], dtype=_TYPES[name])) for name, n in numbers.items() if n is not None
    ]
    return [*tensors, (made.output, made.content)]
