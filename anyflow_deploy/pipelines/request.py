"""What a video request asks for, checked once against the bundle before anything is loaded.

`GenerationRequest.from_manifest` is where every user of a bundle (the command line, the servers,
the profiler, Python) turns sizes into latent shapes, chooses the chunks of a causal model and
refuses what the bundle does not take. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from numpy.typing import ArrayLike

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.dtypes import DTYPES
from anyflow_deploy.engines.adaptive_steps import AdaptiveResult
from anyflow_deploy.engines.deadline import DeadlineResult, StepTimer
from anyflow_deploy.engines.engine import Array, prepare_array
from anyflow_deploy.engines.kv_cache import CachePlan, cache_plan, fit_chunks
from anyflow_deploy.engines.step_policy import StepPolicy, StepSettings, ignore_result
from anyflow_deploy.errors import AnyFlowError, InvalidRequestError, ShapeError
from anyflow_deploy.shape_ranges import latent_frames

Naming = Callable[[str], str]
"""Turns a field of a request into what the user calls it: `num_frames` into `--frames`, say."""


@dataclass(frozen=True)
class GenerationRequest:
    """A video that a bundle can make. Build it with `from_manifest`, which checks it.

    Attributes:
        shape: (F, C, H, W) of the latents.
        num_frames, height, width: of the video, in frames and pixels.
        plan: chunks and cache of a causal model; None for a bidirectional one.
        steps: what the request says about its steps.
        default_steps, default_shift: of the bundle, where `steps` does not say.
        seed: of the noise.
        temporal_factor: video frames of every latent frame after the first.
        prompt: what to show; empty where embeddings say it.
    """

    shape: tuple[int, int, int, int]
    num_frames: int
    height: int
    width: int
    plan: CachePlan | None
    steps: StepSettings
    default_steps: int
    default_shift: float
    seed: int
    temporal_factor: int
    prompt: str = ""
    _name: Naming = field(default=str, repr=False, compare=False)

    @classmethod
    def from_manifest(
        cls,
        manifest: Manifest,
        *,
        prompt: str = "",
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        chunks: Sequence[int] | None = None,
        window: int | None = None,
        steps: StepSettings | None = None,
        seed: int = 0,
        batch: int = 1,
        name: Naming = str,
    ) -> GenerationRequest:
        """Check a request against a bundle.

        Args:
            manifest: of the bundle.
            prompt: what to show, where it is known; the text encoder checks it.
            num_frames: 4n+1; None for as many as `chunks` make, or the bundle's default.
            height, width: pixels, multiples of 16; None for the bundle's default.
            chunks: latent frames of each chunk of a causal model; None for the model's own, cut
                short or its longest chunk repeated.
            window: of a causal model's cache, see `cache_plan`.
            steps: what the user says about the steps.
            seed: of the noise.
            batch: videos made at once.
            name: what the user calls a field, for the messages.

        Raises:
            InvalidRequestError: naming the field, what was given and what is allowed.
        """
        steps = steps or StepSettings()
        steps.check(name)
        _check_whole("seed", seed, 0, name)
        causal = manifest.kind == "causal"
        if not causal:
            _refuse_causal(manifest, name, chunks, window, steps.first_steps)
        size = _choose_size(manifest, num_frames, height, width, chunks, name)
        shape = _latent_shape(manifest, *size)
        plan = _plan_chunks(manifest, shape, chunks, window, name) if causal else None
        _check_ranges(manifest, shape, plan, batch)
        defaults = (manifest.schedule.steps, manifest.schedule.shift)
        factor = manifest.video.temporal_factor
        return cls(shape, *size, plan, steps, *defaults, seed, factor, prompt, name)

    @property
    def num_samples(self) -> int:
        """How many samples are made one after the other: chunks, or the whole video."""
        return 1 if self.plan is None else len(self.plan.chunks)

    @property
    def num_inference_steps(self) -> int:
        """Transitions of a sample; with a deadline or a quality, what the request says, if it
        does."""
        steps = self.steps.num_inference_steps
        return self.default_steps if steps is None else steps

    def make_policy(
        self,
        step_timer: StepTimer | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_end: Callable[[DeadlineResult | AdaptiveResult], None] = ignore_result,
    ) -> StepPolicy:
        """Make what decides the steps of this video; see `StepSettings.make_policy`.

        Raises:
            AnyFlowError: a number out of range.
        """
        defaults = (self.default_steps, self.default_shift)
        return self.steps.make_policy(*defaults, step_timer, should_stop, on_end)

    def check_context(self, frames: int, given_as: str = "video") -> int:
        """Check how many frames a video may begin with.

        Args:
            frames: of the clip, 4n+1; 1 for a picture.
            given_as: "image" or "video", for the message.

        Returns:
            How many chunks they fill.

        Raises:
            InvalidRequestError: frames that end inside a chunk or fill the whole video; a
                bidirectional model.
            ShapeError: a clip whose length is not 4n+1.
        """
        if self.plan is None:
            raise InvalidRequestError(
                f"{self._name(given_as)} is for causal models, and this one is bidirectional. Leave"
                " it out.",
                given_as,
            )
        count = latent_frames(frames, self.temporal_factor)
        ends = self._chunk_ends()
        if count not in ends:
            raise InvalidRequestError(self._misfit(given_as, frames, count, ends), given_as)
        return ends.index(count) + 1

    def context_lengths(self) -> list[int]:
        """Return the numbers of frames that a video may begin with, shortest first."""
        return [(end - 1) * self.temporal_factor + 1 for end in self._chunk_ends()]

    def name_field(self, field_name: str) -> str:
        """Return what the user calls a field, for messages."""
        return self._name(field_name)

    def _chunk_ends(self) -> list[int]:
        """Latent frames after which a chunk ends, but for the last one."""
        if self.plan is None:
            return []
        return [self.plan.first_frame(chunk) for chunk in range(1, len(self.plan.chunks))]

    def _misfit(self, given_as: str, frames: int, count: int, ends: list[int]) -> str:
        """Say why so many given latent frames do not suit the plan."""
        assert self.plan is not None
        flag = self._name(given_as)
        given = f"{flag} gives one latent frame"
        if count > 1:
            given = f"{flag} has {frames} frames, which are {count} latent frames"
        if count >= self.plan.frames:
            return (
                f"{given}, and the video asked for has {self.plan.frames}: nothing would be left to"
                f" make. Raise {self._name('num_frames')}."
            )
        rest = fit_chunks(self.plan.chunks, self.plan.frames - count)
        advice = f"{self._name('chunks')} {count},{','.join(map(str, rest))}"
        where = ", ".join(map(str, ends)) or "the last frame"
        cut = ""
        if given_as == "video" and ends:
            lengths = " or ".join(map(str, self.context_lengths()))
            cut = f", or a clip of {lengths} frames ({self._name('take')} first cuts it)"
        return (
            f"{given}; the first chunks of the plan {_shown(self.plan.chunks)} end after {where}. "
            f"What is given has to fill whole chunks: try {advice}{cut}."
        )


def check_prompt_embeds(manifest: Manifest, prompt_embeds: ArrayLike) -> Array:
    """Check prompt embeddings against a bundle.

    Args:
        manifest: of the bundle.
        prompt_embeds: floats, (B, L, D), or (L, D) for one video.

    Returns:
        A float32 copy, (B, L, D).

    Raises:
        ShapeError: another shape than the bundle takes.
        AnyFlowError: not floats, or not finite.
    """
    embeds = prepare_array("prompt_embeds", prompt_embeds)
    shape = embeds.shape
    if embeds.ndim == 2:
        embeds = embeds[None]
    tokens = manifest.shape_ranges.text
    channels = manifest.architecture.text_dim
    if embeds.ndim != 3 or embeds.shape[1] not in tokens or embeds.shape[2] != channels:
        allowed = f"({tokens}, {channels}): tokens, channels"
        if len(shape) != 2:
            allowed = f"(videos, {tokens}, {channels}): videos, tokens, channels"
        raise ShapeError(f"prompt_embeds has shape {shape}; allowed is {allowed}.")
    return embeds


def cache_element_bytes(manifest: Manifest) -> int:
    """Return the bytes of one number in a causal model's cache, read from the graph that fills
    it."""
    outputs = manifest.graphs["chunk"].outputs
    return next(DTYPES[tensor.dtype].bytes for tensor in outputs if tensor.name == "key.0")


def describe_plan(plan: CachePlan, element_bytes: int) -> str:
    """Describe a plan, such as `3 chunks (1, 3, 3), cache of 168 tokens, 0.4 MB`."""
    megabytes = plan.bytes(element_bytes) / 1e6
    noun = "chunk" if len(plan.chunks) == 1 else "chunks"
    count = len(plan.chunks)
    return (
        f"{count} {noun} {_shown(plan.chunks)}, cache of {plan.capacity:,} tokens,"
        f" {megabytes:,.1f} MB"
    )


class _Blame:
    """Within it a refusal becomes that of a request, with its field."""

    def __init__(self, param: str) -> None:
        self._param = param

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, AnyFlowError) and not isinstance(error, InvalidRequestError):
            raise InvalidRequestError(str(error), self._param) from None


def _check_whole(field_name: str, value: object, least: int, name: Naming) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidRequestError(
            f"{name(field_name)} is {value!r}; allowed are whole numbers from {least} on.",
            field_name,
        )


def _refuse_causal(
    manifest: Manifest,
    name: Naming,
    chunks: Sequence[int] | None,
    window: int | None,
    first_steps: int | None,
) -> None:
    """Refuse of a bidirectional model what only a causal one has."""
    for field_name, value in (
        ("chunks", chunks),
        ("window", window),
        ("first_steps", first_steps),
    ):
        if value is not None:
            raise InvalidRequestError(
                f"{name(field_name)} is for causal models, and {manifest.model!r} is"
                " bidirectional. Leave it out.",
                field_name,
            )


def _choose_size(
    manifest: Manifest,
    num_frames: int | None,
    height: int | None,
    width: int | None,
    chunks: Sequence[int] | None,
    name: Naming,
) -> tuple[int, int, int]:
    """Frames, height and width: those given, or the bundle's."""
    video = manifest.video
    if num_frames is None:
        num_frames = video.frames
        if chunks:
            num_frames = (sum(chunks) - 1) * video.temporal_factor + 1
    height = video.height if height is None else height
    width = video.width if width is None else width
    for field_name, value in (("num_frames", num_frames), ("height", height), ("width", width)):
        _check_whole(field_name, value, 1, name)
    return num_frames, height, width


def _latent_shape(
    manifest: Manifest, num_frames: int, height: int, width: int
) -> tuple[int, int, int, int]:
    """(F, C, H, W) of the latents."""
    with _Blame("num_frames"):
        manifest.latent_shape(num_frames, None, None)
    with _Blame("size"):
        return manifest.latent_shape(num_frames, height, width)


def _check_ranges(
    manifest: Manifest, shape: tuple[int, int, int, int], plan: CachePlan | None, batch: int
) -> None:
    """Hold what the network will see, the whole video or each chunk, against the bundle's
    ranges."""
    text = (batch, manifest.video.text_tokens, manifest.architecture.text_dim)
    with _Blame("size"):
        for count in sorted(set(plan.chunks)) if plan else shape[:1]:
            manifest.shape_ranges.check((batch, count, *shape[1:]), text)


def _plan_chunks(
    manifest: Manifest,
    shape: tuple[int, int, int, int],
    chunks: Sequence[int] | None,
    window: int | None,
    name: Naming,
) -> CachePlan:
    """Choose the chunks of a video and the cache they need."""
    a, video = manifest.architecture, manifest.video
    own = a.chunk_partition or (1,)
    wanted = fit_chunks(own, shape[0]) if chunks is None else tuple(chunks)
    with _Blame("size" if chunks is None else "chunks"):
        plan = cache_plan(a, wanted, shape[2], shape[3], window, video.text_tokens)
    if plan.frames == shape[0]:
        return plan
    factor = video.temporal_factor
    which = "the model's own chunk plan" if wanted == tuple(own) else "the chunk plan"
    fitting = ",".join(map(str, fit_chunks(plan.chunks, shape[0])))
    raise InvalidRequestError(
        f"{which} {_shown(plan.chunks)} has {plan.frames} latent frames, and "
        f"{(shape[0] - 1) * factor + 1} frames are {shape[0]} latent frames. Give "
        f"{name('num_frames')} {(plan.frames - 1) * factor + 1}, or {name('chunks')} that sum to "
        f"{shape[0]}, such as {fitting}.",
        "chunks",
    )


def _shown(chunks: Sequence[int]) -> str:
    return f"({', '.join(map(str, chunks))})"
