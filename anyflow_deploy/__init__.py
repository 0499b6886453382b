"""anyflow_deploy: AnyFlow video models from a checkpoint to production.

    from anyflow_deploy import VideoPipeline

    with VideoPipeline.from_bundle("my-bundle") as pipe:
        pipe("a red fox in the snow", num_inference_steps=4, seed=0).save("fox.mp4")

The names below are the whole public interface. Running a bundle (`load_engine`, `sample`, `stream`,
and `VideoPipeline` with saved prompt embeddings and `output_type="latent"`) needs numpy and a
backend's runtime, no torch. Prompts and frames, `export_bundle` and some builds need the `export`
extra.

A name is imported when it is first used, so importing this package is quick, and `anyflow-doctor`
works where numpy cannot be imported.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyflow_deploy._version import __version__ as __version__

for _link in ("engines", "export", "training"):
    if not (Path(__file__).parent / _link).is_dir():
        raise ImportError(
            f"anyflow_deploy/{_link} is not the link to {_link}/ that it has to be: this copy was"
            " made without symbolic links (as a zip archive or on Windows). Clone the repository"
            " with git on Linux, or install the wheel."
        )

if TYPE_CHECKING:
    from anyflow_deploy.bundle.bundle import Bundle, load_bundle
    from anyflow_deploy.engines.adaptive_steps import (
        AdaptiveResult,
        AdaptiveSteps,
        ReuseFirstChunkSteps,
    )
    from anyflow_deploy.engines.build import build_engine
    from anyflow_deploy.engines.deadline import Deadline, DeadlineResult, StepTimer
    from anyflow_deploy.engines.engine import Engine, Run
    from anyflow_deploy.engines.registry import load_engine
    from anyflow_deploy.engines.sampler import Chunk, noise, sample, stream
    from anyflow_deploy.engines.step_policy import FirstChunkPolicy, StepPolicy, StepSettings
    from anyflow_deploy.engines.validation import validate
    from anyflow_deploy.errors import (
        AnyFlowError,
        BackendError,
        BundleError,
        CheckpointError,
        InvalidRequestError,
        OutputError,
        ShapeError,
        UnavailableError,
    )
    from anyflow_deploy.export.exporter import export_bundle
    from anyflow_deploy.models import MODELS, Architecture, Model
    from anyflow_deploy.pipelines.request import GenerationRequest
    from anyflow_deploy.pipelines.video import GenerationReport, Video, VideoChunk
    from anyflow_deploy.pipelines.video_pipeline import VideoPipeline
    from anyflow_deploy.schedule import Schedule, Step
    from anyflow_deploy.targets import TARGETS

__all__ = [
    "MODELS",
    "TARGETS",
    "AdaptiveResult",
    "AdaptiveSteps",
    "AnyFlowError",
    "Architecture",
    "BackendError",
    "Bundle",
    "BundleError",
    "CheckpointError",
    "Chunk",
    "Deadline",
    "DeadlineResult",
    "Engine",
    "FirstChunkPolicy",
    "GenerationReport",
    "GenerationRequest",
    "InvalidRequestError",
    "Model",
    "OutputError",
    "ReuseFirstChunkSteps",
    "Run",
    "Schedule",
    "ShapeError",
    "Step",
    "StepPolicy",
    "StepSettings",
    "StepTimer",
    "UnavailableError",
    "Video",
    "VideoChunk",
    "VideoPipeline",
    "build_engine",
    "export_bundle",
    "load_bundle",
    "load_engine",
    "noise",
    "sample",
    "stream",
    "validate",
]

_HOMES = {
    "bundle.bundle": ("Bundle", "load_bundle"),
    "engines.adaptive_steps": ("AdaptiveResult", "AdaptiveSteps", "ReuseFirstChunkSteps"),
    "engines.build": ("build_engine",),
    "engines.deadline": ("Deadline", "DeadlineResult", "StepTimer"),
    "engines.engine": ("Engine", "Run"),
    "engines.registry": ("load_engine",),
    "engines.sampler": ("Chunk", "noise", "sample", "stream"),
    "engines.step_policy": ("FirstChunkPolicy", "StepPolicy", "StepSettings"),
    "engines.validation": ("validate",),
    "errors": (
        "AnyFlowError",
        "BackendError",
        "BundleError",
        "CheckpointError",
        "InvalidRequestError",
        "OutputError",
        "ShapeError",
        "UnavailableError",
    ),
    "export.exporter": ("export_bundle",),
    "models": ("MODELS", "Architecture", "Model"),
    "pipelines.request": ("GenerationRequest",),
    "pipelines.video": ("GenerationReport", "Video", "VideoChunk"),
    "pipelines.video_pipeline": ("VideoPipeline",),
    "schedule": ("Schedule", "Step"),
    "targets": ("TARGETS",),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
