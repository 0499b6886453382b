"""`anyflow-triton`: a model repository for Triton Inference Server."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, model_validator
from rich.markup import escape

from anyflow_deploy.bundle.bundle import Bundle, load_bundle
from anyflow_deploy.cli.engine_flags import (
    BackendFlag,
    EngineFlag,
    KernelSpecializationFlag,
    PipelineFlag,
    ThreadsFlag,
)
from anyflow_deploy.cli.json_output import print_json
from anyflow_deploy.cli.options import DONE, JsonFlag, Options, Words, run
from anyflow_deploy.cli.step_options import flag_name
from anyflow_deploy.engines.engine_folder import EngineFolder, find_engine
from anyflow_deploy.engines.registry import (
    BACKENDS,
    DEFAULT_BACKEND,
    check_backend,
    check_kernel_specialization,
)
from anyflow_deploy.engines.tritonserver.checks import check_settings
from anyflow_deploy.engines.tritonserver.repository import (
    check_plan,
    model_writer,
    write_plan,
    write_streaming,
)
from anyflow_deploy.engines.tritonserver.settings import PARTS, Settings
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.progress import console

_Gpus = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...],
    BeforeValidator(lambda v: v.split(",") if isinstance(v, str) else v),
]


class TritonOptions(Options):
    """Write a bundle into a model repository that the stock Triton Inference Server loads.

    The model is decoupled: a request (prompt or embeddings; steps or a deadline; a seed) is
    answered chunk by chunk. With --single-response it answers with the whole video at once, for
    /infer, /generate and tools of KServe's protocol, which take one response. Several requests run
    at once in bounded memory. It runs in the server's Python backend: install anyflow-deploy there.
    With --transition it serves one transition instead, as a TensorRT plan for the server's own
    tensorrt backend.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("bundle",)
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "anyflow-triton bundle --output models",
        "anyflow-triton bundle --output models --max-streams 4 --cache-gb 8 --parts text,vae",
        "anyflow-triton bundle --output models --backend tensorrt --gpus 0,1",
        (
            "anyflow-triton bundle --output models --backend tensorrt --transition --name"
            " anyflow_transition"
        ),
    )

    bundle: Path = Field(description="the bundle's folder")
    output: Path = Field(
        description="model repository; created if missing, and may hold other models"
    )
    name: str = Field(
        "anyflow",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$",
        description="what clients call the model",
    )
    overwrite: bool = Field(False, description="replace a model of that name")
    transition: bool = Field(
        False, description="serve one transition as a TensorRT plan, without text, VAE, sampling"
    )
    single_response: bool = Field(
        False, description="answer with one response, the whole video, in place of chunks"
    )
    parts: Words = Field(
        tuple(PARTS),
        description="what is served with it: text (prompts), vae (frames, mp4), or none",
    )
    pipeline: PipelineFlag = None
    backend: BackendFlag = DEFAULT_BACKEND
    engine: EngineFlag = None
    gpus: _Gpus | None = Field(
        None,
        description=(
            "one instance on each, as 0 or 0,1 (default: the CPU where the backend has it, else 0)"
        ),
    )
    threads: ThreadsFlag = None
    kernel_specialization: KernelSpecializationFlag = None
    max_streams: int = Field(8, ge=1, le=1000, description="videos that an instance makes at once")
    max_waiting: int = Field(
        32, ge=0, le=10000, description="requests that may wait for a place; more are refused"
    )
    cache_gb: float | None = Field(
        None,
        gt=0,
        description=(
            "causal: keys and values of all streams, at most (default: --max-streams of default"
            " size)"
        ),
    )
    max_steps: int = Field(50, ge=1, le=1000, description="steps of a video or chunk, at most")
    max_frames: int | None = Field(
        None, ge=1, description="frames of a video, at most (default: the manifest's)"
    )
    max_pixels: int | None = Field(
        None, ge=256, description="height times width, at most (default: the manifest's)"
    )
    json_output: JsonFlag = False

    @model_validator(mode="after")
    def _check_consistency(self) -> TritonOptions:
        try:
            check_backend(self.backend)
            check_kernel_specialization(self.backend, self.kernel_specialization)
        except AnyFlowError as error:
            raise ValueError(str(error)) from None
        unknown = [part for part in self.parts if part not in (*PARTS, "none")]
        if unknown or ("none" in self.parts and len(self.parts) > 1):
            raise ValueError(
                f"--parts is {','.join(self.parts)!r}; allowed are text,vae, text, vae, or none."
            )
        if self.transition and self.backend != "tensorrt":
            raise ValueError(
                "--transition serves a TensorRT plan; give --backend tensorrt with it."
            )
        if self.transition and self.single_response:
            raise ValueError(
                "--transition answers with one response already; leave --single-response out."
            )
        if self.engine is not None and BACKENDS[self.backend].build_settings is None:
            raise ValueError(
                f"--engine names a built engine, and {self.backend} runs the bundle itself; give"
                " --backend, too."
            )
        return self

    @property
    def devices(self) -> tuple[int, ...] | None:
        """GPUs, or None for the CPU."""
        return self.gpus or ((0,) if BACKENDS[self.backend].gpu_only else None)


def triton(options: TritonOptions) -> int:
    """Write the model repository; return the exit status."""
    bundle = load_bundle(options.bundle)
    needs_engine = BACKENDS[options.backend].build_settings is not None
    engine = find_engine(bundle, options.backend, options.engine) if needs_engine else None
    devices = options.devices
    if options.transition:
        assert engine is not None
        check_plan(bundle, engine)
    settings = None if options.transition else settings_from_options(options, bundle, engine)
    if settings is not None:
        check_settings(bundle.manifest, settings, _flag_of_setting)
    writer = model_writer(options.output, options.name, options.overwrite)
    pipeline = (
        None
        if settings is None or not settings.folders
        else _find_pipeline(options, bundle, settings.folders)
    )
    _check_room(options.output, bundle, pipeline)
    with writer:
        if settings is None:
            assert engine is not None and devices is not None
            write_plan(writer, bundle, engine, devices)
        else:
            decoupled = not options.single_response
            write_streaming(writer, bundle, engine, pipeline, settings, devices, decoupled)
    repository = escape(str(options.output))
    where = "the CPU" if devices is None else f"GPU {', '.join(map(str, devices))}"
    console.print(f"[green]wrote[/] [bold]{escape(options.name)}[/] for {where} into {repository}")
    console.print(
        f"serve it, where anyflow-deploy is installed: tritonserver --model-repository {repository}"
    )
    if options.json_output:
        print_json(
            {
                "repository": str(options.output),
                "name": options.name,
                "backend": options.backend,
                "engine": None if engine is None else engine.path.name,
                "gpus": None if devices is None else list(devices),
                "parts": [] if settings is None else sorted(set(options.parts) & set(PARTS)),
                "transition": options.transition,
            }
        )
    return DONE


def settings_from_options(
    options: TritonOptions, bundle: Bundle, engine: EngineFolder | None
) -> Settings:
    """Make the parameters of config.pbtxt from the flags."""
    video = bundle.manifest.video
    parts = set(options.parts) & set(PARTS)
    return Settings(
        pipeline="pipeline" if parts else None,
        text="text" in parts,
        vae="vae" in parts,
        backend=options.backend,
        engine=None if engine is None else engine.path.name,
        threads=options.threads,
        kernel_specialization=options.kernel_specialization,
        max_streams=options.max_streams,
        max_waiting=options.max_waiting,
        cache_bytes=None if options.cache_gb is None else int(options.cache_gb * 1e9),
        max_steps=options.max_steps,
        max_frames=options.max_frames or video.frames,
        max_pixels=options.max_pixels or video.height * video.width,
    )


def _flag_of_setting(setting: str) -> str:
    return "--cache-gb" if setting == "cache_bytes" else flag_name(setting)


def _find_pipeline(options: TritonOptions, bundle: Bundle, folders: list[str]) -> Path:
    from anyflow_deploy.pipelines.pipeline_folder import find_pipeline

    return find_pipeline(
        bundle.manifest, options.pipeline, folders, ", or leave them out with --parts none"
    )


def _check_room(repository: Path, bundle: Bundle, pipeline: Path | None) -> None:
    """Refuse a full disk: where files cannot be linked, they are copied."""
    folders = [bundle.path, *([] if pipeline is None else [pipeline])]
    if all(folder.stat().st_dev == repository.stat().st_dev for folder in folders):
        return
    size = sum(file.bytes for file in bundle.manifest.files.values())
    size += (
        0
        if pipeline is None
        else sum(_size(pipeline / name) for part in PARTS.values() for name in part)
    )
    free = shutil.disk_usage(repository).free
    if free < size:
        raise AnyFlowError(
            f"{repository} has {free / 1e9:.1f} GB free, and the model takes up to {size / 1e9:.1f}"
            " GB there, since it is on another file system than the bundle. Make room, or choose"
            " another --output."
        )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Run `anyflow-triton` with the flags of the command line."""
    run("anyflow-triton", TritonOptions, triton)
