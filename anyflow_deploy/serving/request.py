"""What a client asks for, checked as far as it can be before anything runs.

`VideoRequest` is the body of `POST /v1/videos`: OpenAI's fields (`prompt`, `model`, `seconds`, `size`) and ours. `ordered` holds
it against the bundle and the server's limits and makes an `Order`: shapes, chunks and what decides the number of steps.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, field_validator

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.engines.adaptive_steps import AdaptiveResult
from anyflow_deploy.engines.deadline import DeadlineResult, StepTimer
from anyflow_deploy.engines.kv_cache import CachePlan, cache_plan, fit_chunks
from anyflow_deploy.engines.step_policy import MAX_DEADLINE_STEPS, StepPolicy, StepSettings
from anyflow_deploy.errors import AnyFlowError, InvalidRequestError
from anyflow_deploy.serving.limits import Limits

_HUGE = 10**9


class VideoRequest(BaseModel):
    """The body of a request for a video. Only `prompt` is needed.

    `num_inference_steps` is how many transitions a video (a chunk, of a causal model) gets; with `deadline_ms` in its place
    there are as many as fit into that time, and `num_inference_steps` is then the most there may be.
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
        "seconds", "num_frames", "num_inference_steps", "first_steps", "deadline_ms", "shift", "seed", "window", mode="before"
    )
    @classmethod
    def _no_truth_values(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("is true or false; allowed is a number")
        return value


@dataclass(frozen=True)
class Order:
    """A request that can be carried out.

    Attributes:
        prompt: what to show.
        seed: of the noise.
        shape: (F, C, H, W) of the latents.
        frames, height, width: of the video.
        plan: of a causal model's chunks and cache; None for a bidirectional one.
        steps, first_steps, deadline_seconds, shift: as asked for, defaults filled in; see `policy`.
    """

    prompt: str
    seed: int
    shape: tuple[int, int, int, int]
    frames: int
    height: int
    width: int
    plan: CachePlan | None
    steps: int
    first_steps: int | None
    deadline_seconds: float | None
    shift: float

    @property
    def samples(self) -> int:
        """How many are made one after the other: chunks, or the whole video."""
        return 1 if self.plan is None else len(self.plan.chunks)

    def policy(
        self,
        step_timer: StepTimer,
        should_stop: Callable[[], bool],
        on_end: Callable[[DeadlineResult | AdaptiveResult], None],
    ) -> StepPolicy:
        """Make what decides the steps.

        Args:
            step_timer: what is known of the engine's pace, shared by all requests.
            should_stop, on_end: see `Deadline`.
        """
        settings = StepSettings(self.steps, self.first_steps, self.shift, deadline_s=self.deadline_seconds)
        return settings.make_policy(self.steps, self.shift, step_timer, should_stop, on_end)


def ordered(request: VideoRequest, manifest: Manifest, limits: Limits, name: str, *, embedded: bool = False) -> Order:
    """Check a request.

    Args:
        request: parsed, so that types are right.
        manifest: of the bundle.
        limits: of this server.
        name: what the model is called here.
        embedded: the prompt comes as embeddings, and its text is empty.

    Raises:
        InvalidRequestError: naming the field, what was given and what is allowed.
    """
    if request.model not in (None, name):
        raise InvalidRequestError(
            f"model is {request.model!r}; this server has {name!r}. Give that, or leave model out.", "model"
        )
    if not embedded:
        _check_prompt(request.prompt, limits)
    causal = manifest.kind == "causal"
    for field in ("first_steps", "window"):
        if getattr(request, field) is not None and not causal:
            raise InvalidRequestError(f"{field} is for causal models, and {name!r} is bidirectional. Leave it out.", field)
    frames = _frames(request, manifest)
    height, width = _sides(request.size, manifest)
    _most("num_frames" if request.seconds is None else "seconds", frames, limits.frames, "frames")
    _most("size", height * width, limits.pixels, "pixels")
    with _about("num_frames"):
        manifest.latent_shape(frames, None, None)
    with _about("size"):
        shape = manifest.latent_shape(frames, height, width)
        plan = _plan(request, manifest, shape) if causal else None
        count = shape[0] if plan is None else max(plan.chunks)
        manifest.shape_ranges.check((1, count, *shape[1:]), (1, manifest.video.text_tokens, manifest.architecture.text_dim))
    steps, seconds = _steps(request, manifest, limits)
    seed = secrets.randbelow(1 << 31) if request.seed is None else request.seed
    shift = request.shift or manifest.schedule.shift
    return Order(request.prompt, seed, shape, frames, height, width, plan, steps, request.first_steps, seconds, shift)


def _check_prompt(prompt: str, limits: Limits) -> None:
    _most("prompt", len(prompt), limits.prompt_characters, "characters")
    if not prompt.strip():
        raise InvalidRequestError("prompt is empty; describe the video in a sentence.", "prompt")
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in prompt):
        raise InvalidRequestError("prompt holds a NUL or half a character (a lone surrogate); send text.", "prompt")


def _frames(request: VideoRequest, manifest: Manifest) -> int:
    if request.num_frames is not None and request.seconds is not None:
        raise InvalidRequestError("seconds and num_frames both say how long the video is; give one of them.", "seconds")
    if request.seconds is not None:  # as near as the VAE's 4n+1 frames come
        factor = manifest.video.temporal_factor
        return round(request.seconds * manifest.video.fps / factor) * factor + 1
    return request.num_frames or manifest.video.frames


def _sides(size: str | None, manifest: Manifest) -> tuple[int, int]:
    """Height and width; a size is written the other way round, as in OpenAI's interface."""
    if size is None:
        return manifest.video.height, manifest.video.width
    found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", size)
    if found is None:
        shown = f"{manifest.video.width}x{manifest.video.height}"
        raise InvalidRequestError(f"size is {size[:40]!r}; allowed is WIDTHxHEIGHT in pixels, as {shown}.", "size")
    return int(found[2]), int(found[1])


def _plan(request: VideoRequest, manifest: Manifest, shape: tuple[int, int, int, int]) -> CachePlan:
    """The model's own chunks, cut short or the longest of them repeated."""
    own = manifest.architecture.chunk_partition or (1,)
    chunks = fit_chunks(own, shape[0])
    return cache_plan(manifest.architecture, chunks, shape[2], shape[3], request.window, manifest.video.text_tokens)


def _steps(request: VideoRequest, manifest: Manifest, limits: Limits) -> tuple[int, float | None]:
    """Transitions (under a deadline: the most there may be), and the deadline in seconds."""
    for field in ("num_inference_steps", "first_steps"):
        _most(field, getattr(request, field) or 1, limits.steps, "steps")
    if request.deadline_ms is None:
        return min(request.num_inference_steps or manifest.schedule.steps, limits.steps), None
    _most("deadline_ms", request.deadline_ms, limits.deadline_seconds * 1000, "milliseconds")
    return request.num_inference_steps or min(MAX_DEADLINE_STEPS, limits.steps), request.deadline_ms / 1000


def _most(field: str, given: float, most: float, unit: str) -> None:
    if given > most:
        raise InvalidRequestError(f"{field} asks for {given:,.12g} {unit}; this server allows {most:,.12g}. Ask for less.", field)


@contextlib.contextmanager
def _about(field: str) -> Iterator[None]:
    """What is refused within it is the fault of this field."""
    try:
        yield
    except AnyFlowError as error:
        raise InvalidRequestError(str(error), field) from None
