"""Check a client's request as far as possible before anything runs.

`VideoRequest` is the body of `POST /v1/videos`: OpenAI's fields (`prompt`, `model`, `seconds`,
`size`) and ours. `validate_request` checks it against the bundle and the server's limits and makes
a `GenerationRequest` from it.
"""

from __future__ import annotations

import re
import secrets

from pydantic import BaseModel, ConfigDict, Field, field_validator

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.engines.step_policy import MAX_DEADLINE_STEPS, StepSettings
from anyflow_deploy.errors import InvalidRequestError
from anyflow_deploy.pipelines.request import GenerationRequest
from anyflow_deploy.serving.limits import Limits

_HUGE = 10**9


class VideoRequest(BaseModel):
    """The body of a request for a video; only `prompt` is required.

    `num_inference_steps` is the number of transitions of a video, or of each chunk of a causal
    model. With `deadline_ms` there are as many as fit into that time, and `num_inference_steps` is
    the largest number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    prompt: str
    model: str | None = None
    seconds: float | None = Field(None, gt=0, le=86400, allow_inf_nan=False)
    size: str | None = None
    num_frames: int | None = Field(None, ge=1, le=_HUGE)
    num_inference_steps: int | None = Field(None, ge=1, le=_HUGE)
    first_steps: int | None = Field(None, ge=1, le=_HUGE)
    deadline_ms: float | None = Field(None, gt=0, le=1e12, allow_inf_nan=False)
    shift: float | None = Field(None, gt=0, le=1000, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    window: int | None = Field(None, ge=1, le=_HUGE)

    @field_validator(
        "seconds",
        "num_frames",
        "num_inference_steps",
        "first_steps",
        "deadline_ms",
        "shift",
        "seed",
        "window",
        mode="before",
    )
    @classmethod
    def _refuse_booleans(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("is true or false; allowed is a number")
        return value


def validate_request(
    request: VideoRequest,
    manifest: Manifest,
    limits: Limits,
    name: str,
    *,
    has_embeddings: bool = False,
) -> GenerationRequest:
    """Check a request against the bundle and the server's limits.

    Args:
        request: parsed, so that types are right.
        manifest: of the bundle.
        limits: of this server.
        name: this server's name of the model.
        has_embeddings: whether the prompt comes as embeddings, and its text is empty.

    Raises:
        InvalidRequestError: naming the field, what was given and what is allowed.
    """
    if request.model not in (None, name):
        raise InvalidRequestError(
            f"model is {request.model!r}; this server has {name!r}. Give that, or leave model out.",
            "model",
        )
    if not has_embeddings:
        _check_prompt(request.prompt, limits)
    num_frames = _count_frames(request, manifest)
    height, width = _parse_size(request.size, manifest)
    _check_limit(
        "num_frames" if request.seconds is None else "seconds", num_frames, limits.frames, "frames"
    )
    _check_limit("size", height * width, limits.pixels, "pixels")
    return GenerationRequest.from_manifest(
        manifest,
        prompt=request.prompt,
        num_frames=num_frames,
        height=height,
        width=width,
        window=request.window,
        steps=_step_settings(request, manifest, limits),
        seed=secrets.randbelow(1 << 31) if request.seed is None else request.seed,
    )


def _check_prompt(prompt: str, limits: Limits) -> None:
    _check_limit("prompt", len(prompt), limits.prompt_characters, "characters")
    if not prompt.strip():
        raise InvalidRequestError("prompt is empty; describe the video in a sentence.", "prompt")
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in prompt):
        raise InvalidRequestError(
            "prompt holds a NUL or half a character (a lone surrogate); send text.", "prompt"
        )


def _count_frames(request: VideoRequest, manifest: Manifest) -> int:
    if request.num_frames is not None and request.seconds is not None:
        raise InvalidRequestError(
            "seconds and num_frames both say how long the video is; give one of them.", "seconds"
        )
    if request.seconds is not None:  # as near as the VAE's 4n+1 frames come
        factor = manifest.video.temporal_factor
        return round(request.seconds * manifest.video.fps / factor) * factor + 1
    return request.num_frames or manifest.video.frames


def _parse_size(size: str | None, manifest: Manifest) -> tuple[int, int]:
    """Parse a size into height and width; OpenAI writes it as WIDTHxHEIGHT."""
    if size is None:
        return manifest.video.height, manifest.video.width
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", size)
    if match is None:
        default_size = f"{manifest.video.width}x{manifest.video.height}"
        raise InvalidRequestError(
            f"size is {size[:40]!r}; allowed is WIDTHxHEIGHT in pixels, as {default_size}.", "size"
        )
    return int(match[2]), int(match[1])


def _step_settings(request: VideoRequest, manifest: Manifest, limits: Limits) -> StepSettings:
    """Read the fields that decide the steps; their defaults stay below the limits."""
    for field in ("num_inference_steps", "first_steps"):
        _check_limit(field, getattr(request, field) or 1, limits.steps, "steps")
    default = manifest.schedule.steps
    deadline_s = None
    if request.deadline_ms is not None:
        max_milliseconds = limits.deadline_seconds * 1000
        _check_limit("deadline_ms", request.deadline_ms, max_milliseconds, "milliseconds")
        default = MAX_DEADLINE_STEPS
        deadline_s = request.deadline_ms / 1000
    return StepSettings(
        num_inference_steps=request.num_inference_steps or min(default, limits.steps),
        first_steps=request.first_steps,
        shift=request.shift,
        deadline_s=deadline_s,
    )


def _check_limit(field: str, value: float, limit: float, unit: str) -> None:
    if value > limit:
        raise InvalidRequestError(
            f"{field} asks for {value:,.12g} {unit}; this server allows {limit:,.12g}. Ask for"
            " less.",
            field,
        )
