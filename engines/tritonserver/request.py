"""Reads a request from its tensors, and checks it before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.tritonserver.io_spec import INPUTS, OUTPUT_TYPES
from anyflow_deploy.engines.tritonserver.settings import Settings
from anyflow_deploy.errors import InvalidRequestError, ShapeError
from anyflow_deploy.pipelines.request import GenerationRequest, check_prompt_embeds
from anyflow_deploy.serving.request import (
    GUIDANCE_FIELDS,
    MEDIA_FIELDS,
    VideoRequest,
    explain_unknown_field,
    unsupported_field_error,
    validate_request,
)

_SHARED_FIELDS = tuple(
    port.name for port in INPUTS if port.name in VideoRequest.model_fields and port.name != "prompt"
)
"""Inputs that are fields of `VideoRequest`, the prompt apart, which may be embeddings."""

_SERVERS_OWN = ("id", "binary_data_output", "sequence_id", "sequence_start", "sequence_end")
"""Parameters that are for the server itself, beside those that begin with `triton_`. `id` is one in
servers whose `generate` does not read it."""


@dataclass(frozen=True)
class ParsedRequest:
    """A request that has passed all checks.

    Attributes:
        request: what to make.
        prompt_embeds: the prompt's embeddings, float32 (1, L, D); None where the prompt is text.
        output_type: one of `OUTPUT_TYPES`.
    """

    request: GenerationRequest
    prompt_embeds: Array | None
    output_type: str

    def cache_bytes(self, element: int) -> int:
        """Return the bytes of the stream's keys and values; 0 for a bidirectional model.

        `element` is the size of one element in bytes.
        """
        return 0 if self.request.plan is None else self.request.plan.bytes(element)


def parse_request(
    tensors: Mapping[str, NDArray[Any]], manifest: Manifest, settings: Settings, name: str
) -> ParsedRequest:
    """Read and check a request.

    Args:
        tensors: by name, as `INPUTS` lists them.
        manifest: of the bundle.
        settings: of the model.
        name: of the model.

    Raises:
        AnyFlowError: naming the tensor, what was given and what is allowed.
    """
    prompt_embeds = _prompt_embeds(tensors, manifest, settings)
    fields: dict[str, Any] = {
        field: _single(tensors, field) for field in _SHARED_FIELDS if field in tensors
    }
    prompt = "" if prompt_embeds is not None else _text(tensors, "prompt")
    try:
        request = VideoRequest(prompt=prompt or "", **fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        raise InvalidRequestError(
            f"{field} is {first['input']!r}: {first['msg'].lower()}.", field
        ) from None
    generation_request = validate_request(
        request, manifest, settings.limits, name, has_embeddings=prompt_embeds is not None
    )
    return ParsedRequest(generation_request, prompt_embeds, _output_type(tensors, settings))


def refuse_parameters(parameters: Mapping[str, object]) -> None:
    """Refuse what a request holds beside its tensors.

    Triton's `generate` turns every field of the JSON that is no input into a parameter, so a
    misspelt field would be ignored.

    Raises:
        InvalidRequestError: naming the parameter, and the input that was probably meant.
    """
    names = [port.name for port in INPUTS]
    for name, value in parameters.items():
        if name in _SERVERS_OWN or name.startswith("triton_"):
            continue
        if name in (*MEDIA_FIELDS, *GUIDANCE_FIELDS):
            if value not in (None, ""):
                raise unsupported_field_error(name)
            continue
        raise InvalidRequestError(explain_unknown_field(name[:40], names), name)


def _prompt_embeds(
    tensors: Mapping[str, NDArray[Any]], manifest: Manifest, settings: Settings
) -> Array | None:
    sources = [field for field in ("prompt", "prompt_embeds") if field in tensors]
    if len(sources) != 1:
        what = "both" if sources else "neither"
        raise InvalidRequestError(
            f"a request has either prompt or prompt_embeds, and this one has {what}; send one of"
            " them."
        )
    if "prompt" in tensors:
        if not settings.text:
            raise InvalidRequestError(
                "this server has no text encoder; send prompt_embeds in place of prompt.", "prompt"
            )
        return None
    if np.ndim(tensors["prompt_embeds"]) != 2:
        shape = np.shape(tensors["prompt_embeds"])
        raise ShapeError(f"prompt_embeds has shape {shape}; allowed is (tokens, channels).")
    return check_prompt_embeds(manifest, tensors["prompt_embeds"])


def _output_type(tensors: Mapping[str, NDArray[Any]], settings: Settings) -> str:
    output_type = _text(tensors, "output_type")
    if output_type is None:
        # JSON cannot hold bytes, and a request does not say whether it came over HTTP
        return "mp4-base64" if settings.vae else "latents"
    allowed = [name for name in OUTPUT_TYPES if settings.vae or name == "latents"]
    if output_type not in allowed:
        why = "" if settings.vae else " (this server has no VAE)"
        raise InvalidRequestError(
            f"output_type is {output_type[:40]!r}; allowed are {', '.join(allowed)}{why}.",
            "output_type",
        )
    return output_type


def _single(tensors: Mapping[str, NDArray[Any]], name: str) -> Any:
    """Return the number in a tensor; None where it was not sent."""
    if name not in tensors:
        return None
    if np.size(tensors[name]) != 1:
        raise InvalidRequestError(
            f"{name} has {np.size(tensors[name])} values; allowed is one.", name
        )
    return tensors[name].reshape(-1).tolist()[0]


def _text(tensors: Mapping[str, NDArray[Any]], name: str) -> str | None:
    value = _single(tensors, name)
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{name} is not UTF-8 ({error.reason} at byte {error.start}); send text.", name
        ) from None
