"""Writes a model into a model repository, whole or not at all.

    REPOSITORY/NAME/config.pbtxt          written last: what the server looks for
    REPOSITORY/NAME/warmup/steps
    REPOSITORY/NAME/1/model.py            imports the model from this package
    REPOSITORY/NAME/1/bundle/             the bundle, with the engine that is served
    REPOSITORY/NAME/1/pipeline/           tokenizer, text encoder and VAE, where they are served

Everything the server needs is inside, so that a repository can be mounted or copied. Files of a
bundle are never changed in place, so they are hard links where the file system allows it, and take
no space.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from anyflow_deploy.bundle.atomic_io import ArtifactKind, AtomicFolderWriter, link_or_copy
from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.bundle.manifest import MANIFEST, GraphTensor
from anyflow_deploy.dtypes import DTYPES
from anyflow_deploy.engines.engine_folder import ENGINES, EngineFolder
from anyflow_deploy.engines.tritonserver.checks import check_version
from anyflow_deploy.engines.tritonserver.config import plan_config, streaming_config
from anyflow_deploy.engines.tritonserver.io_spec import TensorSpec
from anyflow_deploy.engines.tritonserver.settings import Settings
from anyflow_deploy.errors import AnyFlowError, BackendError

CONFIG = "config.pbtxt"
VERSION = "1"
_KIND = ArtifactKind(
    "Triton model", CONFIG, CONFIG, "--name", "Write it again with anyflow-triton."
)
_TYPES = {name: row.triton for name, row in DTYPES.items() if row.triton}
_MODEL = '''\
"""Written by anyflow-triton. The model is in the package anyflow_deploy.

Install that package where the server's Python finds it.
"""

from anyflow_deploy.engines.tritonserver.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def write_streaming(
    writer: AtomicFolderWriter,
    bundle: Bundle,
    engine: EngineFolder | None,
    pipeline: Path | None,
    settings: Settings,
    gpus: Sequence[int] | None,
    decoupled: bool = True,
) -> None:
    """Write the model that takes prompts and answers with chunks, or with the whole video.

    Args:
        writer: from `model_writer`, entered.
        bundle: opened and verified.
        engine: that is served; None for a backend that needs none.
        pipeline: diffusers' folder; None where neither text encoder nor VAE is served.
        settings: of the model.
        gpus: one instance on each; None for the CPU.
        decoupled: answer with a response for every chunk; else with one.

    Raises:
        AnyFlowError: what was written could not be loaded; nothing of it stays.
    """
    version = writer.folder / VERSION
    for name in [MANIFEST, *bundle.manifest.files]:
        _link(bundle.path / name, version / settings.bundle / name)
    if engine is not None:
        _link_all(engine.path, version / settings.bundle / ENGINES / engine.path.name)
    if pipeline is not None and settings.pipeline is not None:
        for name in settings.folders:
            _link_all(pipeline / name, version / settings.pipeline / name)
    (version / "model.py").write_text(_MODEL)
    (writer.folder / "warmup").mkdir()
    (writer.folder / "warmup" / "steps").write_bytes(struct.pack("<i", 1))
    prompt_embeds = (bundle.manifest.video.text_tokens, bundle.manifest.architecture.text_dim)
    parameters = settings.as_parameters()
    check_version(version, parameters)
    writer.finish_folder(
        streaming_config(writer.path.name, parameters, gpus, prompt_embeds, "steps", decoupled)
    )


def write_plan(
    writer: AtomicFolderWriter, bundle: Bundle, engine: EngineFolder, gpus: Sequence[int]
) -> None:
    """Write a TensorRT plan of the bare transition, for the server's own `tensorrt` backend.

    Args:
        writer: from `model_writer`, entered.
        bundle: a bidirectional one.
        engine: a TensorRT engine of it, that `check_plan` did not refuse.
        gpus: one instance on each.
    """
    graph = bundle.manifest.graphs["transition"]
    inputs, outputs = (
        [_port(tensor) for tensor in tensors] for tensors in (graph.inputs, graph.outputs)
    )
    _link(engine.file("transition.plan"), writer.folder / VERSION / "model.plan")
    profiles = len(engine.record.profiles["transition"])
    writer.finish_folder(plan_config(writer.path.name, inputs, outputs, gpus, profiles))


def check_plan(bundle: Bundle, engine: EngineFolder) -> None:
    """Refuse an engine that the server's own `tensorrt` backend cannot run.

    Raises:
        AnyFlowError: a causal bundle, or an engine that is not TensorRT's.
        BackendError: a plan without weights, or one that streams them.
    """
    if bundle.manifest.kind != "bidirectional":
        raise AnyFlowError(
            f"{bundle.path} is causal: three graphs around a cache, which the server's tensorrt"
            " backend does not keep between requests. Leave --transition out: the streaming model"
            " keeps it."
        )
    if engine.record.backend != "tensorrt":
        raise AnyFlowError(
            f"{engine.path} is an engine of backend {engine.record.backend}; --transition serves"
            " TensorRT plans."
        )
    for setting, flag in (("strip", "--strip"), ("weight_streaming", "--weight-streaming")):
        if engine.record.settings.get(setting):
            raise BackendError(
                f"{engine.path} was built with {flag}, which the server's tensorrt backend cannot"
                f" open. Build it without: anyflow-build {bundle.path} --backend tensorrt"
            )


def model_writer(repository: Path, name: str, overwrite: bool) -> AtomicFolderWriter:
    """Return the writer of a model's folder.

    The repository is made where it is missing, and may hold other models.

    Raises:
        OutputError: the model is there already, or the repository cannot be written to.
    """
    repository.mkdir(parents=True, exist_ok=True)
    return AtomicFolderWriter(repository / name, _KIND, overwrite)


def _port(tensor: GraphTensor) -> TensorSpec:
    return TensorSpec(
        tensor.name,
        _TYPES[tensor.dtype],
        tuple(-1 if isinstance(n, str) else n for n in tensor.shape),
        "",
    )


def _link_all(source: Path, destination: Path) -> None:
    for path in sorted(source.rglob("*")):
        if path.is_file():
            _link(path, destination / path.relative_to(source))


def _link(source: Path, destination: Path) -> None:
    """Make a hard link, or a copy on another file system, in a folder that may be new."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    link_or_copy(str(source), str(destination))
