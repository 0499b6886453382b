"""What can be known about a served model before the server loads it.

`anyflow-triton` asks before and after it writes a model, and the model asks again when it is
loaded, since config.pbtxt may have been changed by hand. So a limit that would refuse the server's
own warm-up is found where it was set.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from anyflow_deploy.bundle.bundle import load_bundle
from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.engines.engine_folder import find_engine
from anyflow_deploy.engines.registry import check_backend, check_kernel_specialization
from anyflow_deploy.engines.tritonserver.request import parse_request
from anyflow_deploy.engines.tritonserver.settings import Settings, settings_from_parameters
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.pipelines.request import GenerationRequest, Naming, cache_element_bytes
from anyflow_deploy.serving.default_video import default_video


def cache_of(manifest: Manifest, settings: Settings) -> tuple[int, int]:
    """Return the bytes of a cache element, and the most bytes of all caches together.

    Both are 0 for a bidirectional model, which has no cache.
    """
    if manifest.kind == "bidirectional":
        return 0, 0
    element = cache_element_bytes(manifest)
    frames, height, width = default_video(manifest, settings.limits)
    request = GenerationRequest.from_manifest(
        manifest, num_frames=frames, height=height, width=width
    )
    assert request.plan is not None
    return element, settings.cache_bytes or settings.max_streams * request.plan.bytes(element)


def check_settings(manifest: Manifest, settings: Settings, name: Naming = str) -> None:
    """Refuse settings under which a request that names only its prompt could not be carried out.

    The server's warm-up is such a request.

    Args:
        manifest: of the bundle.
        settings: of the model.
        name: what the user calls a setting, for the messages.

    Raises:
        AnyFlowError: naming the setting, what was given and what is allowed.
    """
    check_backend(settings.backend)
    check_kernel_specialization(settings.backend, settings.kernel_specialization)
    default_video(manifest, settings.limits, name)
    embeds = np.zeros((manifest.video.text_tokens, manifest.architecture.text_dim), np.float32)
    warm_up = {"prompt_embeds": embeds, "num_inference_steps": np.array([1], np.int32)}
    request = parse_request(warm_up, manifest, settings, "the model")
    element, most = cache_of(manifest, settings)
    cost = request.cache_bytes(element)
    if cost > most:
        setting = name("cache_bytes")
        raise AnyFlowError(
            f"{setting} leaves {most / 1e6:,.1f} MB for the caches of all videos, and one of"
            f" default size takes {cost / 1e6:,.1f} MB. Allow at least that, or shorter videos with"
            f" {name('max_frames')}."
        )


def check_version(folder: Path, parameters: dict[str, str]) -> None:
    """Open what was written as the server will, but for the weights.

    Args:
        folder: of the model's version, as `1/`.
        parameters: that config.pbtxt will have.

    Raises:
        AnyFlowError: what the server could not load, and why.
    """
    texts = {name: {"string_value": text} for name, text in parameters.items()}
    settings = settings_from_parameters(texts)
    bundle = load_bundle(folder / settings.bundle, verify=False)  # these files were checked
    check_settings(bundle.manifest, settings)
    if settings.engine is not None:
        find_engine(bundle, settings.backend, settings.engine, verify=False)
    for part in settings.folders:
        if settings.pipeline is None or not (folder / settings.pipeline / part).is_dir():
            raise AnyFlowError(
                f"{folder} lacks {part}/ of the pipeline, which config.pbtxt serves. Write it again"
                " with anyflow-triton."
            )
