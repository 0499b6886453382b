"""Check a client's request as far as possible before anything runs.

`VideoRequest` is the body of `POST /v1/videos`: OpenAI's fields (`prompt`, `model`, `seconds`,
`size`), what other clients send beside them (`width`, `height`, `fps`, `n`, `user`), and ours.
`validate_request` checks it against the bundle and the server's limits and makes a
`GenerationRequest` from it. What clients of other servers send and this one does not have is
refused by its own reason (`UNSUPPORTED_FIELDS`).
"""

from __future__ import annotations

import difflib
import re
import secrets
from collections.abc import Iterable, Mapping

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.engines.step_policy import MAX_DEADLINE_STEPS, StepSettings
from anyflow_deploy.errors import InvalidRequestError
from anyflow_deploy.pipelines.request import GenerationRequest
from anyflow_deploy.serving.default_video import default_video
from anyflow_deploy.serving.limits import Limits

_HUGE = 10**9

_NO_MEDIA = (
    "this server makes videos from words alone; describe the picture in prompt. (With"
    " anyflow-generate a causal model begins with one: --image.)"
)
_NO_GUIDANCE = (
    "guidance is distilled into this model, which takes neither a negative prompt nor a guidance"
    " scale. Leave it out, and say in prompt what should be seen."
)
_NO_CHOICE = (
    "the answer is a video object, and GET /v1/videos/ID/content is its file, mp4. Leave it out."
)

MEDIA_FIELDS = ("input_reference", "image", "image_url", "image_reference", "video", "audio")
"""Fields that hold a picture, a clip or a sound, which may be large."""

GUIDANCE_FIELDS = (
    "negative_prompt",
    "guidance_scale",
    "guidance_scale_2",
    "cfg_scale",
    "true_cfg_scale",
)
"""Fields of samplers that run the network twice a step."""

UNSUPPORTED_FIELDS = {
    **dict.fromkeys(MEDIA_FIELDS, _NO_MEDIA),
    **dict.fromkeys(GUIDANCE_FIELDS, _NO_GUIDANCE),
    **dict.fromkeys(("response_format", "output_format", "quality"), _NO_CHOICE),
}
"""What other servers take and this one does not, each with the reason. Empty, they say nothing and
are ignored, since some clients send every field they know."""

_OTHER_NAMES = {
    "steps": "num_inference_steps",
    "num_steps": "num_inference_steps",
    "inference_steps": "num_inference_steps",
    "frames": "num_frames",
    "duration": "seconds",
    "length": "seconds",
    "resolution": "size",
    "aspect_ratio": "size",
    "flow_shift": "shift",
    "frame_rate": "fps",
    "deadline": "deadline_ms",
    "text": "prompt",
    "text_input": "prompt",
    "response_format": "output_type",
    "output_format": "output_type",
}
"""What other servers call our fields."""


class VideoRequest(BaseModel):
    """The body of a request for a video; only `prompt` is required.

    `num_inference_steps` is the number of transitions of a video, or of each chunk of a causal
    model. With `deadline_ms` there are as many as fit into that time, and `num_inference_steps` is
    the largest number. `user` names the client's own user, whom this server need not know: it is
    neither used nor kept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    prompt: str
    model: str | None = None
    seconds: float | None = Field(None, gt=0, le=86400, allow_inf_nan=False)
    size: str | None = None
    width: int | None = Field(None, ge=1, le=99999)
    height: int | None = Field(None, ge=1, le=99999)
    fps: float | None = Field(None, gt=0, le=_HUGE, allow_inf_nan=False)
    n: int | None = Field(None, ge=1, le=_HUGE)
    user: str | None = None
    num_frames: int | None = Field(None, ge=1, le=_HUGE)
    num_inference_steps: int | None = Field(None, ge=1, le=_HUGE)
    first_steps: int | None = Field(None, ge=1, le=_HUGE)
    deadline_ms: float | None = Field(None, gt=0, le=1e12, allow_inf_nan=False)
    shift: float | None = Field(None, gt=0, le=1000, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    window: int | None = Field(None, ge=1, le=_HUGE)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, fields: object) -> object:
        if not isinstance(fields, Mapping):
            return fields
        for field, value in fields.items():
            if field in UNSUPPORTED_FIELDS and value not in (None, ""):
                raise unsupported_field_error(field)
        return {name: fields[name] for name in fields if name not in UNSUPPORTED_FIELDS}

    @field_validator(
        "seconds",
        "width",
        "height",
        "fps",
        "n",
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


def unsupported_field_error(field: str) -> InvalidRequestError:
    """Make the refusal of a field that other servers take and this one does not."""
    reason = UNSUPPORTED_FIELDS.get(field, _NO_MEDIA)
    return InvalidRequestError(f"{field} is not taken: {reason}", field)


def explain_unknown_field(field: str, allowed: Iterable[str]) -> str:
    """Say that a field is unknown, and which one was probably meant."""
    names = list(allowed)
    meant = _OTHER_NAMES.get(field.lower())
    near = [meant] if meant in names else difflib.get_close_matches(field, names, n=1, cutoff=0.7)
    if near:
        return f"unknown field {field!r}. Did you mean {near[0]!r}?"
    return f"unknown field {field!r}. Allowed are {', '.join(names)}."


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
    _check_rate_and_count(request, manifest)
    default = default_video(manifest, limits)
    num_frames = _count_frames(request, manifest, default[0])
    height, width = _choose_sides(request, manifest, default[1:])
    _check_limit(
        "num_frames" if request.seconds is None else "seconds", num_frames, limits.frames, "frames"
    )
    if request.width is None and request.height is None:
        _check_limit("size", height * width, limits.pixels, "pixels")
    else:
        _check_limit("width and height", height * width, limits.pixels, "pixels", "ask")
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


def _check_rate_and_count(request: VideoRequest, manifest: Manifest) -> None:
    fps = manifest.video.fps
    if request.fps not in (None, fps):
        raise InvalidRequestError(
            f"fps is {request.fps:g}; this model makes {fps} frames a second. Give that, or leave"
            " fps out.",
            "fps",
        )
    if request.n not in (None, 1):
        raise InvalidRequestError(
            f"n is {request.n}; a request is one video. Send one for each.", "n"
        )


def _check_prompt(prompt: str, limits: Limits) -> None:
    _check_limit("prompt", len(prompt), limits.prompt_characters, "characters")
    if not prompt.strip():
        raise InvalidRequestError("prompt is empty; describe the video in a sentence.", "prompt")
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in prompt):
        raise InvalidRequestError(
            "prompt holds a NUL or half a character (a lone surrogate); send text.", "prompt"
        )


def _count_frames(request: VideoRequest, manifest: Manifest, default: int) -> int:
    if request.num_frames is not None and request.seconds is not None:
        raise InvalidRequestError(
            "seconds and num_frames both say how long the video is; give one of them.", "seconds"
        )
    if request.seconds is not None:  # as near as the VAE's 4n+1 frames come
        factor = manifest.video.temporal_factor
        return round(request.seconds * manifest.video.fps / factor) * factor + 1
    return request.num_frames or default


def _choose_sides(
    request: VideoRequest, manifest: Manifest, default: tuple[int, int]
) -> tuple[int, int]:
    """Read height and width; OpenAI writes them as WIDTHxHEIGHT."""
    if request.size is None:
        return request.height or default[0], request.width or default[1]
    if request.width is not None or request.height is not None:
        raise InvalidRequestError(
            "size and width or height both say how large the video is; give one of them.", "size"
        )
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", request.size)
    if match is None:
        default_size = f"{manifest.video.width}x{manifest.video.height}"
        raise InvalidRequestError(
            f"size is {request.size[:40]!r}; allowed is WIDTHxHEIGHT in pixels, as {default_size}.",
            "size",
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


def _check_limit(field: str, value: float, limit: float, unit: str, verb: str = "asks") -> None:
    if value > limit:
        raise InvalidRequestError(
            f"{field} {verb} for {value:,.12g} {unit}; this server allows {limit:,.12g}. Ask for"
            " less.",
            field if verb == "asks" else None,
        )
