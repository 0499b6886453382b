"""`anyflow-generate`: a prompt becomes a video, or a list of prompts and seeds becomes many.

A bidirectional bundle makes the whole video at once (`sample`), a causal one chunk by chunk
(`stream`); they share everything else. With `--stream` each chunk is decoded and put on disk before
the next one begins. Wrong requests are refused before text encoder and engine are loaded.

However many videos a run makes, each part of the pipeline is loaded once, and the texts are encoded
first, so that the text encoder is gone when the engine comes. The first video that fails ends the
run; what was written stays.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from rich.markup import escape

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.bundle.outputs import OutputFile
from anyflow_deploy.cli.generate_options import (
    CAUSAL_FLAGS,
    GenerateOptions,
    check_options,
    context_options,
)
from anyflow_deploy.cli.json_output import print_json
from anyflow_deploy.cli.options import DONE, run
from anyflow_deploy.cli.step_options import flag_name, step_settings
from anyflow_deploy.cli.video_list import ListedVideo, check_outputs, excerpt, list_videos
from anyflow_deploy.cli.video_work import GenerationRun, VideoResult, format_seconds, make_video
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.kv_cache import check_budget
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.pipelines.context import load_context
from anyflow_deploy.pipelines.request import (
    GenerationRequest,
    cache_element_bytes,
    describe_plan,
)
from anyflow_deploy.pipelines.video import LATENTS_SUFFIX, StageTimer
from anyflow_deploy.pipelines.video_pipeline import VideoPipeline
from anyflow_deploy.progress import RichProgress, console

_MAX_NAMES = 6
"""Names that a message lists."""


def generate(options: GenerateOptions) -> int:
    """Generate the videos; return the exit status."""
    check_options(options)
    videos = list_videos(options)
    if options.seed == -1 and options.seeds is None:
        console.print(f"seed {videos[0].seed}")
    check_outputs(options, videos)
    timer = StageTimer()
    with timer.time("bundle"):
        pipe = VideoPipeline.from_bundle(
            options.bundle,
            backend=options.backend,
            provider=options.provider,
            threads=options.threads,
            engine=options.engine,
            kernel_specialization=options.kernel_specialization,
            pipeline=options.pipeline,
        )
    with pipe:
        job = _prepare(options, pipe.bundle, videos[0].seed)
        pipe.check_parts(
            text=options.prompt_embeds is None,
            vae=job.decode or job.context_frames is not None,
        )
        with timer.time("text"):
            prompt_embeds = _get_prompt_embeds(options, pipe, videos)
        with timer.time("engine"), RichProgress(console) as bars:
            pipe.load_engine(bars)
        if job.context_frames is not None:
            with timer.time("vae"):
                job = dataclasses.replace(job, context=pipe.encode_video(job.context_frames))
        _make_videos(options, pipe, job, videos, prompt_embeds, timer)
    return DONE


def _prepare(options: GenerateOptions, bundle: Bundle, seed: int) -> GenerationRun:
    """Check the request against rules, ranges and budget before anything is loaded."""
    manifest = bundle.manifest
    causal = manifest.kind == "causal"
    causal_flags = [name for name in CAUSAL_FLAGS if getattr(options, name) not in (None, False)]
    if causal_flags and not causal:
        raise AnyFlowError(
            f"--{causal_flags[0].replace('_', '-')} needs a causal bundle, and {bundle.path} is "
            f"bidirectional ({manifest.model}). Leave it out, or export a far model."
        )
    default_frames = None if options.chunks else manifest.video.frames
    request = GenerationRequest.from_manifest(
        manifest,
        num_frames=options.frames or default_frames,
        height=options.height,
        width=options.width,
        chunks=options.chunks or manifest.architecture.chunk_partition,
        window=options.window,
        steps=step_settings(options),
        seed=seed,
        name=flag_name,
    )
    if request.plan is not None:
        element = cache_element_bytes(manifest)
        if options.cache_budget is not None:
            check_budget(request.plan, element, options.cache_budget * 1e9)
        console.print(describe_plan(request.plan, element))
    request.make_policy()  # refuses numbers out of range
    context_frames = load_context(
        request,
        options.image,
        options.video,
        manifest.video.fps,
        context_options(options),
        lambda text: console.print(escape(text)),
    )
    decode = options.output.suffix != LATENTS_SUFFIX
    return GenerationRun(request, context_frames, None, decode, options.stream)


class _Embeddings:
    """Prompt embeddings of many prompts, without the zeros behind each: those are most of it."""

    def __init__(self) -> None:
        self._rows: dict[str | None, Array] = {}
        self._tokens = 0

    def add(self, prompt: str | None, embeds: Array) -> None:
        """Keep the embeddings of a prompt, float32 (B, L, D)."""
        used = np.flatnonzero(embeds.any(axis=(0, 2)))
        self._tokens = embeds.shape[1]
        self._rows[prompt] = embeds[:, : used[-1] + 1 if len(used) else 1].copy()

    def get(self, prompt: str | None) -> Array:
        """Return the embeddings of a prompt as they were, float32 (B, L, D)."""
        rows = self._rows[prompt]
        return np.pad(rows, ((0, 0), (0, self._tokens - rows.shape[1]), (0, 0)))


def _get_prompt_embeds(
    options: GenerateOptions, pipe: VideoPipeline, videos: list[ListedVideo]
) -> _Embeddings:
    """Load or compute the prompt embeddings, and save them if asked."""
    from anyflow_deploy.pipelines import text_encoder

    result = _Embeddings()
    if options.prompt_embeds is not None:
        embeds, prompts = text_encoder.load_embeddings(options.prompt_embeds)
        one_video = options.output.suffix != LATENTS_SUFFIX or pipe.manifest.kind == "causal"
        if len(embeds) != 1 and one_video:
            raise AnyFlowError(
                f"{options.prompt_embeds} holds {len(embeds)} prompts, and {options.output} takes"
                " one video. Give one prompt's embeddings; a bidirectional bundle makes several"
                " videos' latents at once (--output latents.safetensors)."
            )
        result.add(None, embeds)
        saved = embeds
    else:
        prompts = list(dict.fromkeys(str(video.prompt) for video in videos))
        _check_prompts(options, pipe, prompts)
        for prompt in prompts:
            result.add(prompt, pipe.encode_prompt(prompt))
        pipe.unload_text_encoder()
    if options.save_prompt_embeds is not None:
        if options.prompt_embeds is None:
            saved = np.concatenate([result.get(prompt) for prompt in prompts])
        with OutputFile(options.save_prompt_embeds, options.overwrite) as output:
            text_encoder.save_embeddings(output, saved, prompts)
    return result


def _check_prompts(options: GenerateOptions, pipe: VideoPipeline, prompts: list[str]) -> None:
    """Refuse what cannot be encoded, before the first prompt is."""
    for prompt in prompts:
        try:
            pipe.check_prompt(prompt)
        except AnyFlowError as error:
            if options.prompts is None:
                raise
            raise AnyFlowError(f'"{excerpt(prompt)}" in {options.prompts}: {error}') from None


def _make_videos(
    options: GenerateOptions,
    pipe: VideoPipeline,
    job: GenerationRun,
    videos: list[ListedVideo],
    prompt_embeds: _Embeddings,
    timer: StageTimer,
) -> None:
    """Make one video after the other; the first that fails ends the run."""
    results: list[VideoResult] = []
    failed: dict[str, Any] | None = None
    count = len(videos)
    try:
        for video in videos:
            bar_name = "transitions" if count == 1 else f"{video.index} of {count}"
            if count > 1:
                console.print(escape(video.describe(count)))
            try:
                embeds = prompt_embeds.get(video.prompt)
                with OutputFile(video.output, options.overwrite) as output:
                    result = make_video(pipe, job, embeds, video, output, bar_name)
            except BaseException as error:
                failed = {**video.as_json(), "error": str(error) or type(error).__name__}
                if count > 1:
                    _explain_failure(error, video, videos, results)
                raise
            results.append(result)
            result.print(timer.seconds if count == 1 else {})
            if result.was_stopped and video.index < count:
                raise KeyboardInterrupt(_describe_written(videos, results))
    finally:
        if options.json_output:
            print_json(_document(pipe.bundle, count, results, failed, timer))
    if count > 1:
        loading = format_seconds(timer.seconds)
        console.print(f"[green]wrote all {count} videos[/]; before the first: {loading}")


def _explain_failure(
    error: BaseException,
    video: ListedVideo,
    videos: list[ListedVideo],
    results: list[VideoResult],
) -> None:
    """Raise the error of one of several videos again with its name, and with what was written.

    An error that is none of ours keeps its traceback; then the name is printed.
    """
    written = _describe_written(videos, results)
    if isinstance(error, KeyboardInterrupt):
        raise KeyboardInterrupt(f"{error}; {written}" if str(error) else written) from None
    text = f"video {video.describe(len(videos))}: {error}"
    if isinstance(error, AnyFlowError | OSError):
        separator = "" if text.endswith((".", "!", "?")) else "."
        raise AnyFlowError(f"{text}{separator} {written[0].upper()}{written[1:]}.") from error
    console.print(escape(f"{text} ({type(error).__name__}); {written}."))


def _describe_written(videos: list[ListedVideo], results: list[VideoResult]) -> str:
    """Say which of the videos are there."""
    names = [str(result.video.output) for result in results]
    if not names:
        return f"none of the {len(videos)} videos is written"
    shown = ", ".join(names) if len(names) < _MAX_NAMES else f"{names[0]} to {names[-1]}"
    verb = "is" if len(names) == 1 else "are"
    return f"{len(names)} of {len(videos)} videos {verb} written, {shown}"


def _document(
    bundle: Bundle,
    count: int,
    results: list[VideoResult],
    failed: dict[str, Any] | None,
    timer: StageTimer,
) -> dict[str, Any]:
    """Make what `--json` prints; docs/reference/json.md describes it."""
    return {
        "bundle": str(bundle.path),
        "digest": bundle.digest,
        "model": bundle.manifest.model,
        "requested": count,
        "videos": [result.as_json() for result in results],
        "failed": failed,
        "seconds": timer.seconds,
    }


def main() -> None:
    """Run `anyflow-generate` with the flags of the command line."""
    run("anyflow-generate", GenerateOptions, generate)
