"""A call of `VideoPipeline`, checked: everything that making its video needs.

Nothing is loaded here but the picture or clip that the video begins with. What only the parts of a
pipeline can say, such as the text encoder about a prompt, is asked afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import ArrayLike

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.engines.adaptive_steps import AdaptiveResult
from anyflow_deploy.engines.deadline import DeadlineResult
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.step_policy import StepPolicy, StepSettings
from anyflow_deploy.errors import AnyFlowError, InvalidRequestError
from anyflow_deploy.pipelines.context import ContextOptions, load_context
from anyflow_deploy.pipelines.frame_display import BLACK, Color
from anyflow_deploy.pipelines.request import GenerationRequest, check_prompt_embeds
from anyflow_deploy.pipelines.video import Frames, GenerationReport, StageTimer
from anyflow_deploy.schedule import Step

if TYPE_CHECKING:
    from anyflow_deploy.pipelines.video_pipeline import VideoPipeline

OutputType = Literal["np", "latent"]

StepCallback = Callable[["VideoPipeline", int, float, dict[str, Any]], dict[str, Any] | None]
"""diffusers' `callback_on_step_end`: (pipeline, step index, timestep, {"step": `Step`})."""


@dataclass(frozen=True)
class VideoJob:
    """A checked request with everything that it needs, and what is noted while it is carried out.

    Attributes:
        request: what to make.
        prompt: what to show; None where `prompt_embeds` say it.
        prompt_embeds: float32 (B, L, D), or None.
        context: uint8 (frames, height, width, 3) that the video begins with, or None.
        policy: decides the steps; None for what the request says of them.
        decode: make frames of the latents.
        callback: called after each step.
        results: of deadlines or qualities, one a sample.
        steps: transitions of each sample that was kept.
        timer: seconds by stage.
    """

    request: GenerationRequest
    prompt: str | None
    prompt_embeds: Array | None
    context: Frames | None
    policy: StepPolicy | None
    decode: bool
    callback: StepCallback | None
    results: list[DeadlineResult | AdaptiveResult] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    timer: StageTimer = field(default_factory=StageTimer)

    @classmethod
    def from_manifest(
        cls,
        manifest: Manifest,
        prompt: str | None,
        *,
        prompt_embeds: ArrayLike | None = None,
        num_inference_steps: int | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        image: Any = None,
        video: Any = None,
        policy: StepPolicy | None = None,
        callback_on_step_end: StepCallback | None = None,
        output_type: OutputType = "np",
        deadline_s: float | None = None,
        target_psnr: float | None = None,
        sigmas: Iterable[float] | None = None,
        shift: float | None = None,
        first_steps: int | None = None,
        chunks: Iterable[int] | None = None,
        window: int | None = None,
        fit: str | None = None,
        background: str | Color = BLACK,
        take: str | None = None,
    ) -> VideoJob:
        """Check a call against a bundle; its arguments are those of `VideoPipeline`."""
        _check_choices(prompt, prompt_embeds, output_type)
        context_options = ContextOptions.parse(fit, background, take)
        decode = output_type == "np"
        levels = None if sigmas is None else tuple(sigmas)
        steps = StepSettings(
            num_inference_steps, first_steps, shift, levels, deadline_s, target_psnr
        )
        _check_policy(policy, steps)
        embeds = _check_embeds(manifest, prompt_embeds, decode)
        request = GenerationRequest.from_manifest(
            manifest,
            num_frames=num_frames,
            height=height,
            width=width,
            chunks=None if chunks is None else tuple(chunks),
            window=window,
            steps=steps,
            seed=seed,
            batch=1 if embeds is None else len(embeds),
        )
        request.make_policy()  # a number out of range is refused here
        context = load_context(request, image, video, manifest.video.fps, context_options)
        return cls(request, prompt, embeds, context, policy, decode, callback_on_step_end)

    def tell_step(self, pipeline: VideoPipeline, step: Step) -> None:
        """Call back after a step.

        Raises:
            AnyFlowError: the callback returned latents.
        """
        if self.callback is None:
            return
        answer = self.callback(pipeline, step.index, step.t, {"step": step})
        if answer and "latents" in answer:
            raise AnyFlowError(
                "callback_on_step_end returned latents; an engine's latents cannot be replaced"
                " between steps. Return None."
            )

    def report(self) -> GenerationReport:
        """Say how the video was made."""
        return GenerationReport(tuple(self.steps), tuple(self.results), dict(self.timer.seconds))


def _check_choices(prompt: str | None, prompt_embeds: ArrayLike | None, output_type: str) -> None:
    if (prompt is None) == (prompt_embeds is None):
        raise InvalidRequestError("give one of prompt and prompt_embeds.", "prompt")
    if output_type not in ("np", "latent"):
        raise InvalidRequestError(
            f'output_type is {output_type!r}; allowed are "np" and "latent".', "output_type"
        )


def _check_policy(policy: StepPolicy | None, steps: StepSettings) -> None:
    if policy is not None and steps != StepSettings():
        raise InvalidRequestError(
            "policy decides the steps alone; leave every other setting of them out.", "policy"
        )


def _check_embeds(
    manifest: Manifest, prompt_embeds: ArrayLike | None, decode: bool
) -> Array | None:
    """Check embeddings against the bundle, and how many videos they are of."""
    if prompt_embeds is None:
        return None
    embeds = check_prompt_embeds(manifest, prompt_embeds)
    batch = len(embeds)
    if batch > 1 and (decode or manifest.kind == "causal"):
        raise InvalidRequestError(
            f"prompt_embeds are of {batch} videos, and this makes one. Give one prompt's; a "
            'bidirectional bundle makes the latents of several at once (output_type="latent").',
            "prompt_embeds",
        )
    return embeds
