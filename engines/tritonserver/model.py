"""The class that Triton's Python backend loads, through the `model.py` of a repository.

Triton calls `execute` from one thread, and the call must return at once. Every request runs in a
thread of its own and answers through its response sender. A request ends when its sender is closed,
so the sender is closed in every case.
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
from anyflow_deploy.engines.tritonserver.admission import Admission, CapacityError, Ticket
from anyflow_deploy.engines.tritonserver.checks import cache_of, check_settings
from anyflow_deploy.engines.tritonserver.fair_lock import FairLock
from anyflow_deploy.engines.tritonserver.generator import (
    GeneratedChunk,
    generate_chunks,
    join_chunks,
)
from anyflow_deploy.engines.tritonserver.io_spec import OUTPUTS
from anyflow_deploy.engines.tritonserver.metrics import TRITON_API_LOCK, Metrics
from anyflow_deploy.engines.tritonserver.request import (
    ParsedRequest,
    parse_request,
    refuse_parameters,
)
from anyflow_deploy.engines.tritonserver.settings import Settings, settings_from_parameters
from anyflow_deploy.errors import AnyFlowError, BackendError
from anyflow_deploy.pipelines.video_pipeline import VideoPipeline
from anyflow_deploy.serving.job import CancelledError

_NUMPY = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32, "BOOL": np.bool_}
_TYPES: dict[str, Any] = {port.name: _NUMPY[port.type] for port in OUTPUTS if port.type in _NUMPY}
"""Of the outputs that are sent with every chunk."""


class ResponseStream:
    """The chunks that go to the client of one request, through Triton's response sender.

    One thread of this process uses it at a time.

    Args:
        sender: of the request.
    """

    def __init__(self, sender: Any) -> None:
        self._sender = sender

    @property
    def cancelled(self) -> bool:
        """Whether the client no longer waits for it."""
        with TRITON_API_LOCK:
            return bool(self._sender.is_cancelled())

    def send(self, tensors: list[tuple[str, NDArray[Any]]], is_last: bool = False) -> None:
        """Send the tensors of a chunk; after the last one, nothing more may be sent."""
        flags = server.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0
        with TRITON_API_LOCK:
            response = server.InferenceResponse(
                output_tensors=[server.Tensor(*tensor) for tensor in tensors]
            )
            self._sender.send(response, flags=flags)

    def end(self) -> None:
        """Close the stream: no more chunks follow."""
        with TRITON_API_LOCK:
            self._sender.send(flags=server.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def fail(self, message: str, code: Any) -> None:
        """End the stream with an error."""
        with TRITON_API_LOCK:
            response = server.InferenceResponse(
                output_tensors=[], error=server.TritonError(message, code)
            )
            self._sender.send(response, flags=server.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def refuse(self, error: AnyFlowError) -> None:
        """End the stream with the error of an invalid or rejected request."""
        over_capacity = isinstance(error, CapacityError)
        self.fail(
            str(error),
            server.TritonError.UNAVAILABLE if over_capacity else server.TritonError.INVALID_ARG,
        )


class TritonPythonModel:
    """The served model: Triton calls `initialize`, `execute` and `finalize` by name."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load engine, text encoder and VAE; the server reports the model as not ready until then.

        Raises:
            TritonModelException: with the reason why something cannot be loaded.
        """
        try:
            check_arrays()
            self._open(args)
        except AnyFlowError as error:
            raise server.TritonModelException(str(error)) from None

    def _open(self, args: dict[str, str]) -> None:
        self._name = args["model_name"]
        config = json.loads(args["model_config"])
        self._settings = settings = settings_from_parameters(config["parameters"])
        policy = config.get("model_transaction_policy", {})
        self._decoupled = bool(policy.get("decoupled", True))
        folder = Path(args["model_repository"]) / args["model_version"]
        gpu = (
            int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        )
        bundle = load_bundle(folder / settings.bundle)
        check_settings(bundle.manifest, settings)
        self._pipeline = load_pipeline(bundle, folder, settings, gpu)
        self._metrics = Metrics(server, self._name, args["model_instance_name"])
        self._element, most = cache_of(bundle.manifest, settings)
        self._admission = Admission(
            settings.max_streams, most, settings.max_waiting, self._metrics.set_streams
        )
        self._threads: set[threading.Thread] = set()
        self._stopping = threading.Event()
        server.Logger.log_info(
            f"{self._name}: {self._pipeline.engine.description}, bundle {bundle.digest[:16]}"
        )

    def execute(self, requests: list[Any]) -> None:
        """Check each request, and start a thread that generates its video."""
        for request in requests:
            start_time = time.perf_counter()
            with TRITON_API_LOCK:
                responses = ResponseStream(request.get_response_sender())
            try:
                with TRITON_API_LOCK:
                    tensors = {
                        tensor.name(): np.array(tensor.as_numpy()) for tensor in request.inputs()
                    }
                    parameters = json.loads(request.parameters() or "{}")
                refuse_parameters(parameters)
                parsed = parse_request(tensors, self._pipeline.manifest, self._settings, self._name)
                if parsed.prompt_embeds is None:
                    self._pipeline.check_prompt(parsed.request.prompt)
                ticket = self._admission.enqueue(parsed.cache_bytes(self._element))
            except AnyFlowError as error:
                responses.refuse(error)
                self._metrics.count_end("refused")
                continue
            except Exception:  # noqa: BLE001 - one request fails, the server continues
                self._fail(responses)
                continue
            thread = threading.Thread(
                target=self._run, args=(parsed, ticket, responses, start_time), daemon=True
            )
            self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError:  # no more threads
                self._threads.discard(thread)
                self._admission.release(ticket)
                self._fail(responses)

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
        self, parsed: ParsedRequest, ticket: Ticket, responses: ResponseStream, start_time: float
    ) -> None:
        """Generate and send the video of one request."""

        def check() -> None:
            if self._stopping.is_set() or responses.cancelled:
                raise CancelledError

        try:
            with (
                self._admission.admit(ticket, check),
                closing(generate_chunks(self._pipeline, parsed, check)) as chunks,
            ):
                previous = start_time
                kept: list[GeneratedChunk] = []
                for chunk in chunks:
                    now = time.perf_counter()
                    if self._decoupled:
                        responses.send(_tensors(chunk, parsed, now - start_time))
                    else:
                        kept.append(chunk)
                    self._metrics.count_chunk(
                        chunk.index, now - previous, chunk.steps, chunk.deadline_met
                    )
                    previous = now
            if self._decoupled:
                responses.end()
            else:
                seconds = time.perf_counter() - start_time
                responses.send(_whole_tensors(kept, parsed, seconds), is_last=True)
            self._metrics.count_end("completed")
        except CancelledError:
            is_stopping = self._stopping.is_set()
            code = server.TritonError.UNAVAILABLE if is_stopping else server.TritonError.CANCELLED
            responses.fail(
                (
                    "the server is stopping; try again later."
                    if is_stopping
                    else "cancelled on request."
                ),
                code,
            )
            self._metrics.count_end("cancelled")
        except AnyFlowError as error:
            responses.refuse(error)
            self._metrics.count_end("refused")
        except Exception:  # noqa: BLE001 - one request fails, the other streams continue
            self._fail(responses)
        finally:
            self._threads.discard(threading.current_thread())

    def _fail(self, responses: ResponseStream) -> None:
        """Log an unexpected error, and end the request with it."""
        server.Logger.log_error(f"{self._name}: {traceback.format_exc()}")
        responses.fail("internal error; the server's log has it.", server.TritonError.INTERNAL)
        self._metrics.count_end("failed")


def check_arrays() -> None:
    """Refuse a numpy that this server's Python backend cannot read.

    Such a numpy would crash the whole server at the first text.

    Raises:
        BackendError: naming the version, and what to install.
    """
    original = np.arange(6, dtype=np.float32).reshape(2, 3)
    copy = server.Tensor.from_dlpack(
        "received", server.Tensor("sent", original).to_dlpack()
    ).as_numpy()
    if not np.array_equal(original, copy):
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
        gpu: index of the GPU; None for the CPU.

    Raises:
        AnyFlowError: config.pbtxt names no pipeline, or something cannot be loaded.
    """
    if (settings.text or settings.vae) and settings.pipeline is None:
        raise AnyFlowError(
            "config.pbtxt serves text or vae but names no pipeline. Write it again with"
            " anyflow-triton."
        )
    pipeline = VideoPipeline(
        bundle,
        backend=settings.backend,
        provider="cpu" if gpu is None else "cuda",
        threads=settings.threads,
        engine=settings.engine,
        kernel_specialization=settings.kernel_specialization,
        pipeline=None if settings.pipeline is None else folder / settings.pipeline,
        gpu=gpu or 0,
        torch_device="cpu" if gpu is None else f"cuda:{gpu}",
        device_lock=FairLock(),
    )
    pipeline.load(text=settings.text, vae=settings.vae)
    if settings.text:
        pipeline.encode_prompt("a red fox")  # warm-up
    return pipeline


def _tensors(
    chunk: GeneratedChunk, parsed: ParsedRequest, seconds: float
) -> list[tuple[str, NDArray[Any]]]:
    numbers = {
        "chunk": chunk.index,
        "first_frame": chunk.first_frame,
        "steps": chunk.steps,
        "seconds": seconds,
        "deadline_met": chunk.deadline_met,
        "seed": parsed.request.seed,
    }
    tensors = [
        (name, np.array([n], dtype=_TYPES[name])) for name, n in numbers.items() if n is not None
    ]
    return [*tensors, (chunk.output, chunk.content)]


def _whole_tensors(
    chunks: list[GeneratedChunk], parsed: ParsedRequest, seconds: float
) -> list[tuple[str, NDArray[Any]]]:
    """The tensors of the one response of a model that is not decoupled."""
    met = [chunk.deadline_met for chunk in chunks if chunk.deadline_met is not None]
    tensors: list[tuple[str, NDArray[Any]]] = [
        ("steps", np.array([chunk.steps for chunk in chunks if chunk.steps], np.int32)),
        ("seconds", np.array([seconds], np.float32)),
        ("seed", np.array([parsed.request.seed], np.int64)),
    ]
    if met:
        tensors.append(("deadline_met", np.array([all(met)])))
    return [*tensors, (chunks[0].output, join_chunks(chunks, parsed.output_type))]
