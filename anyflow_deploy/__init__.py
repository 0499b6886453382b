"""anyflow_deploy: AnyFlow video models from a checkpoint to production.

    from anyflow_deploy import Schedule, load_bundle, load_engine, sample

    engine = load_engine(load_bundle("bundle"))
    latents = sample(engine, noise((1, 21, 16, 60, 104), seed=0), text, Schedule.uniform(4))

The names below are the whole public interface of the device side; they need numpy and a backend's runtime, no torch.
Exporting (`anyflow_deploy.export`) and generating from prompts (`anyflow_deploy.pipelines`) need the `export` extra.

A name is imported when it is first asked for, so that `anyflow-doctor` can speak where numpy cannot be imported.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyflow_deploy._version import __version__ as __version__

for _link in ("engines", "export", "training"):
    if not (Path(__file__).parent / _link).is_dir():
        raise ImportError(
            f"anyflow_deploy/{_link} is not the link to {_link}/ that it has to be: this copy was made "
            "without symbolic links (as a zip archive or on Windows). Clone the repository with git on "
            "Linux, or install the wheel."
        )

if TYPE_CHECKING:
    from anyflow_deploy.bundle.bundle import Bundle, load_bundle
    from anyflow_deploy.engines.adaptive_steps import AdaptiveResult, AdaptiveSteps
    from anyflow_deploy.engines.deadline import Deadline, StepTimer
    from anyflow_deploy.engines.engine import Engine, Run
    from anyflow_deploy.engines.registry import load_engine
    from anyflow_deploy.engines.sampler import Chunk, noise, sample, stream
    from anyflow_deploy.errors import AnyFlowError, BackendError, BundleError, CheckpointError, ShapeError
    from anyflow_deploy.models import MODELS, Architecture, Model
    from anyflow_deploy.schedule import Schedule, Step

__all__ = [
    "MODELS",
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
    "Engine",
    "Model",
    "Run",
    "Schedule",
    "ShapeError",
    "Step",
    "StepTimer",
    "load_bundle",
    "load_engine",
    "noise",
    "sample",
    "stream",
]  # fmt: skip

_HOMES = {
    "bundle.bundle": ("Bundle", "load_bundle"),
    "engines.deadline": ("Deadline", "StepTimer"),
    "engines.engine": ("Engine", "Run"),
    "engines.registry": ("load_engine",),
    "engines.adaptive_steps": ("AdaptiveResult", "AdaptiveSteps"),
    "engines.sampler": ("Chunk", "noise", "sample", "stream"),
    "errors": ("AnyFlowError", "BackendError", "BundleError", "CheckpointError", "ShapeError"),
    "models": ("MODELS", "Architecture", "Model"),
    "schedule": ("Schedule", "Step"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
