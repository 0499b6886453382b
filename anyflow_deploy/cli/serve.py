"""`anyflow-serve`: one bundle over HTTP, in the shape of OpenAI's `/v1/videos`.

This file reads and checks the flags, listens, and loads the bundle meanwhile; the server is
`anyflow_deploy/serving/`.
"""

from __future__ import annotations

import os
import re
import socket
from contextlib import closing
from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator
from rich.markup import escape

from anyflow_deploy.bundle.bundle import Bundle, load_bundle
from anyflow_deploy.cli.engine_flags import (
    BackendFlag,
    EngineFlag,
    KernelSpecializationFlag,
    PipelineFlag,
    ProviderFlag,
    ThreadsFlag,
)
from anyflow_deploy.cli.options import Options, Words, run
from anyflow_deploy.cli.step_options import flag_name
from anyflow_deploy.engines.registry import DEFAULT_BACKEND
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.pipelines.video_pipeline import VideoPipeline
from anyflow_deploy.progress import RichProgress, console
from anyflow_deploy.serving.access import AccessRules
from anyflow_deploy.serving.default_video import default_video
from anyflow_deploy.serving.limits import Limits
from anyflow_deploy.serving.loopback import is_local

TOKEN_VARIABLE = "ANYFLOW_TOKEN"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@,\s]+")
_TOKEN = re.compile(r"[A-Za-z0-9._~-]{16,256}")


class ServeOptions(Options):
    """Serve a bundle over HTTP with OpenAI's /v1/videos.

    It has a WebSocket for the chunks, /health, /metrics, and a page to try it. One video is made at
    a time; the others wait in a queue of limited length. Every request chooses its steps, or a
    deadline.

    Without a token the server is for this machine only (127.0.0.1). For other machines give --host
    and a token of at least 16 letters, digits or ._~- in a file (--token-file) or in the variable
    ANYFLOW_TOKEN; put TLS in front of it.

    The server listens at once and loads the model meanwhile: until then /health is 503 and says
    loading, and requests for videos are answered 503. --cors-origin lets other web pages send
    requests; --root-path is the prefix of a proxy in front.

    Ctrl-C lets the running video finish; a second one cancels it. Finished videos stay in --folder,
    and the next server serves them again, until they are too old or too many.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("bundle",)
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "anyflow-serve bundle",
        "anyflow-serve bundle --port 9000 --queue 4 --max-steps 8",
        "anyflow-serve bundle --host 0.0.0.0 --token-file token.txt --folder /var/lib/anyflow",
    )

    bundle: Path = Field(description="the bundle's folder")
    host: str = Field(
        "127.0.0.1",
        description="address to listen on; another than this machine's own needs a token",
    )
    port: int = Field(8000, ge=0, le=65535, description="0 for a free one")
    token_file: Path | None = Field(
        None, description="file with the token that clients have to send"
    )
    cors_origin: Words = Field(
        (),
        description=(
            "origins of other web pages that may send requests, as https://example.org (several"
            " with commas; * for all, with a token)"
        ),
    )
    root_path: str = Field(
        "",
        pattern=r"^(/[A-Za-z0-9._~-]+)*/?$",
        description="prefix of the paths behind a proxy, such as /anyflow",
    )
    public_metrics: bool = Field(False, description="let /metrics be read without the token")
    folder: Path = Field(Path("anyflow-videos"), description="where videos are kept")
    keep_gb: float = Field(10.0, gt=0, description="finished videos in --folder, at most")
    keep_hours: float = Field(24.0, gt=0, description="age of a finished video, at most")
    queue: int = Field(
        8, ge=1, le=10000, description="videos that may wait; more are refused with 429"
    )
    max_steps: int = Field(50, ge=1, le=1000, description="steps of a video or chunk, at most")
    max_frames: int | None = Field(
        None, ge=1, description="frames of a video, at most (default: the manifest's)"
    )
    max_pixels: int | None = Field(
        None, ge=256, description="height times width, at most (default: the manifest's)"
    )
    max_deadline: float = Field(600.0, gt=0, description="deadline in seconds, at most")
    max_prompt: int = Field(4000, ge=1, description="characters of a prompt, at most")
    grace: float = Field(
        60.0, ge=0, description="seconds that the running video has when the server is stopped"
    )
    name: str | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="what clients call the model (default: the manifest's)",
    )
    warm_up: bool = Field(
        False, description="make one video of default size in one step before taking requests"
    )
    backend: BackendFlag = DEFAULT_BACKEND
    provider: ProviderFlag = None
    threads: ThreadsFlag = None
    engine: EngineFlag = None
    kernel_specialization: KernelSpecializationFlag = None
    pipeline: PipelineFlag = None
    device: str = Field(
        "cpu", pattern="^(cpu|cuda)$", description="where text encoder and VAE run: cpu or cuda"
    )

    @field_validator("cors_origin")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"--cors-origin is {origin!r}; allowed are a scheme and a host, as a browser"
                    " sends them in Origin (https://example.org, http://localhost:3000), or *."
                )
        return origins


def serve(options: ServeOptions) -> int:
    """Serve until a signal; return the exit status."""
    rules = rules_from_options(options)
    _check_packages()
    bundle = load_bundle(options.bundle)
    limits = limits_from_options(options, bundle)
    listener = _open_listener(options.host, options.port)
    from anyflow_deploy.serving.app import make_app
    from anyflow_deploy.serving.generator import VideoGenerator
    from anyflow_deploy.serving.loading import BackgroundLoader
    from anyflow_deploy.serving.logs import log_to_stderr
    from anyflow_deploy.serving.metrics import Metrics
    from anyflow_deploy.serving.server import Server, configure_uvicorn
    from anyflow_deploy.serving.service import Service
    from anyflow_deploy.serving.video_store import VideoStore
    from anyflow_deploy.serving.warmup import warm_up

    log_to_stderr()
    manifest = bundle.manifest
    name = options.name or manifest.model
    host, port = listener.getsockname()[:2]
    address = escape(f"http://{f'[{host}]' if ':' in host else host}:{port}{rules.root_path}")
    pipeline = _make_pipeline(options, bundle)
    generator = VideoGenerator(pipeline)
    metrics = Metrics()

    def load() -> None:
        _load_pipeline(options, pipeline)
        engine = pipeline.engine.description
        metrics.describe(model=name, bundle=bundle.digest[:16], engine=engine)

    def prepare() -> None:
        if options.warm_up:
            warm_up(generator, manifest, limits, name)
        engine = escape(pipeline.engine.description)
        console.print(f"[green]serving[/] [bold]{escape(name)}[/] on {address} ({engine})")

    with (
        listener,
        closing(VideoStore(options.folder, limits.disk_bytes, limits.keep_seconds)) as store,
        pipeline,
    ):
        service = Service(generator, manifest, store, limits, name, metrics, is_loading=True)
        app = make_app(service, rules)
        server = Server(configure_uvicorn(app, host, port, limits), service, options.grace)
        loader = BackgroundLoader(service, server, load, prepare)
        console.print(f"listening on {address}; loading {escape(name)} …")
        loader.start()
        server.run([listener])
        service.drain(0)
        console.print("stopped; finished videos stay in " + escape(str(options.folder)))
        loader.finish()
    return 0


def rules_from_options(options: ServeOptions) -> AccessRules:
    """Say who may send requests.

    Raises:
        AnyFlowError: a token that is missing or wrong, or every web page without one.
    """
    token = _read_token(options)
    if "*" in options.cors_origin and token is None:
        raise AnyFlowError(
            "--cors-origin * lets every web page that this machine's user opens send requests, and"
            " there is no token. Name the origins, or give --token-file."
        )
    return AccessRules(
        token, options.cors_origin, options.public_metrics, options.root_path.rstrip("/")
    )


def limits_from_options(options: ServeOptions, bundle: Bundle) -> Limits:
    """Make the limits from the flags; the defaults are the bundle's own video size.

    Raises:
        AnyFlowError: a limit below everything that the bundle makes.
    """
    video = bundle.manifest.video
    limits = Limits(
        frames=options.max_frames or video.frames,
        pixels=options.max_pixels or video.height * video.width,
        queue=options.queue,
        steps=options.max_steps,
        deadline_seconds=options.max_deadline,
        prompt_characters=options.max_prompt,
        disk_bytes=int(options.keep_gb * 1e9),
        keep_seconds=options.keep_hours * 3600,
    )
    default_video(bundle.manifest, limits, flag_name)
    return limits


def _read_token(options: ServeOptions) -> str | None:
    """Read the token from its file or the environment; other machines need one."""
    where = TOKEN_VARIABLE
    token = os.environ.get(TOKEN_VARIABLE)
    if options.token_file is not None:
        where = str(options.token_file)
        try:
            token = options.token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise AnyFlowError(
                f"{where} cannot be read as a token: {error}. Write one: openssl rand -hex 32 >"
                f" {where}"
            ) from None
    if token is not None and not _TOKEN.fullmatch(token):
        raise AnyFlowError(
            f"the token in {where} has to be 16 to 256 of A-Z a-z 0-9 . _ ~ -. Make one: openssl"
            " rand -hex 32"
        )
    if token is None and not is_local(options.host):
        raise AnyFlowError(
            f"--host {options.host} lets other machines connect, and there is no token. Give"
            f" --token-file FILE (openssl rand -hex 32 > FILE) or set {TOKEN_VARIABLE}; or leave"
            " --host at 127.0.0.1."
        )
    return token


def _check_packages() -> None:
    import importlib.util

    missing = [
        name
        for name in ("fastapi", "uvicorn", "websockets", "prometheus_client", "multipart")
        if not importlib.util.find_spec(name)
    ]
    if missing:
        raise AnyFlowError(
            f"serving needs {', '.join(missing)}, which are not installed. Run: pip install"
            " 'anyflow-deploy[serve]'"
        )


def _open_listener(host: str, port: int) -> socket.socket:
    """Bind the socket before anything is loaded, so that a taken port is known at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise AnyFlowError(
            f"cannot listen on {host} port {port}: {error.strerror}. Choose another --port (0: a"
            " free one) or --host."
        ) from None
    return listener


def _make_pipeline(options: ServeOptions, bundle: Bundle) -> VideoPipeline:
    """Make the pipeline, of which nothing is loaded yet."""
    return VideoPipeline(
        bundle,
        backend=options.backend,
        provider=options.provider,
        threads=options.threads,
        engine=options.engine,
        kernel_specialization=options.kernel_specialization,
        pipeline=options.pipeline,
        torch_device=options.device,
    )


def _load_pipeline(options: ServeOptions, pipeline: VideoPipeline) -> None:
    """Load text encoder, VAE and engine."""
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise AnyFlowError(
                "--device cuda: PyTorch finds no GPU here (anyflow-doctor says why). Leave it at"
                " cpu."
            )
    with RichProgress(console) as bars:
        pipeline.load(progress=bars)


def main() -> None:
    """Run `anyflow-serve` with the flags of the command line."""
    run("anyflow-serve", ServeOptions, serve)
