"""Make one video of a run of `anyflow-generate`, write it, and say how it went."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape

from anyflow_deploy.bundle.outputs import OutputFile
from anyflow_deploy.cli.step_report import StepReport
from anyflow_deploy.cli.video_list import ListedVideo
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.pipelines.request import GenerationRequest
from anyflow_deploy.pipelines.video import StageTimer, Video, VideoChunk
from anyflow_deploy.pipelines.video_pipeline import VideoPipeline
from anyflow_deploy.progress import RichProgress, console
from anyflow_deploy.schedule import Step


@dataclass(frozen=True)
class GenerationRun:
    """What all videos of a run have in common, checked.

    Attributes:
        request: of the first video; the others differ in the seed.
        context_frames: uint8 (frames, height, width, 3) that each video begins with.
        context: their latents, float32 (1, f, C, H, W), once they are encoded.
        decode: whether the VAE makes frames of the latents.
        stream: whether each chunk is written before the next one begins.
    """

    request: GenerationRequest
    context_frames: NDArray[np.uint8] | None
    context: Array | None
    decode: bool
    stream: bool

    @property
    def samples(self) -> int:
        """How many samples are generated: chunks, or the whole video."""
        if self.context_frames is None:
            return self.request.num_samples
        return self.request.num_samples - self.request.check_context(len(self.context_frames))


@dataclass(frozen=True)
class VideoResult:
    """A video that was written.

    Attributes:
        video: what it is.
        job: what it has in common with the others.
        fps: its rate.
        report: how a deadline or a target quality was met.
        steps: transitions of each generated chunk, or of the whole video.
        seconds: by stage: "transformer", "vae", "write".
        first_frame_seconds: from the first transition to the first generated frame on disk; None
            where only latents are written.
    """

    video: ListedVideo
    job: GenerationRun
    fps: int
    report: StepReport
    steps: list[int]
    seconds: dict[str, float]
    first_frame_seconds: float | None

    @property
    def was_stopped(self) -> bool:
        """Whether Ctrl-C under a deadline finished it with a single step."""
        return self.report.stop_event.is_set()

    def print(self, shared_seconds: Mapping[str, float]) -> None:
        """Say that it is written.

        Args:
            shared_seconds: of stages before it, by stage, where they belong to no other video.
        """
        for line in self.report.summary_lines():
            console.print(line)
        plan = self.job.request.plan
        if plan is not None and self.first_frame_seconds is not None:
            console.print(f"first generated frame on disk after {self.first_frame_seconds:.2f} s")
        seconds = dict(shared_seconds)
        for stage, duration in self.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + duration
        label = self.report.stage if plan is None else f"{len(plan.chunks)} chunks"
        timer = format_seconds(seconds, label)
        console.print(f"[green]wrote[/] [bold]{escape(str(self.video.output))}[/] ({timer})")

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` says of a finished video."""
        request = self.job.request
        return {
            **self.video.as_json(),
            "frames": request.num_frames,
            "height": request.height,
            "width": request.width,
            "fps": self.fps,
            "steps": self.steps,
            "deadline_met": _all_or_none(result.slack >= 0 for result in self.report.deadlines),
            "quality_reached": _all_or_none(result.reached for result in self.report.qualities),
            "first_frame_seconds": self.first_frame_seconds,
            "seconds": self.seconds,
        }


def format_seconds(seconds: Mapping[str, float], transformer: str = "transformer") -> str:
    """Format times by stage, such as `text 0.42 s, 4 steps 1.20 s`.

    Args:
        seconds: by stage.
        transformer: what the sampling is called.
    """
    labels = {"transformer": transformer, "vae": "VAE", "write": "file"}
    return ", ".join(f"{labels.get(stage, stage)} {s:.2f} s" for stage, s in seconds.items())


def make_video(
    pipe: VideoPipeline,
    job: GenerationRun,
    prompt_embeds: Array,
    video: ListedVideo,
    output: OutputFile,
    bar_name: str,
) -> VideoResult:
    """Generate a video and write it.

    Args:
        pipe: with its engine loaded.
        job: what the run's videos have in common.
        prompt_embeds: float32 (B, L, D).
        video: which one.
        output: its destination, open.
        bar_name: of the progress bar.
    """
    request = dataclasses.replace(job.request, seed=video.seed)
    report = StepReport(
        request.steps, request.default_steps, request.default_shift, pipe.step_timer
    )
    stages = _Stages()

    def on_step(step: Step) -> None:
        stages.count(step)
        bar.update(step)

    start = time.perf_counter()
    with (
        RichProgress(console) as bars,
        report.show(bars, job.samples, bar_name) as bar,
        closing(
            pipe.generate(
                request,
                prompt_embeds,
                report.policy,
                context=job.context,
                decode=job.decode,
                on_step=on_step,
                stage=stages.enter,
            )
        ) as chunks,
    ):
        if job.stream:
            first_frame = _stream_to_file(output, pipe, request, chunks, stages.timer)
        else:
            made = Video.from_chunks(chunks, pipe.manifest.video.fps)
    if not job.stream:
        with stages.timer.time("write"):
            made.save(output)
        first_frame = time.perf_counter() - start if job.decode else None
    return VideoResult(
        video,
        job,
        pipe.manifest.video.fps,
        report,
        stages.steps,
        stages.timer.seconds,
        first_frame,
    )


class _Stages:
    """Times the stages of a video, and counts the transitions of each sample."""

    def __init__(self) -> None:
        self.timer = StageTimer()
        self.steps: list[int] = []
        self._last = 0

    def count(self, step: Step) -> None:
        """Take note of a transition."""
        self._last = step.index + 1

    @contextmanager
    def enter(self, name: str) -> Iterator[None]:
        """Time a stage; a sample's has its transitions counted."""
        self._last = 0
        with self.timer.time(name):
            yield
        if name == "transformer" and self._last:  # a given chunk has none
            self.steps.append(self._last)


def _stream_to_file(
    output: OutputFile,
    pipe: VideoPipeline,
    request: GenerationRequest,
    chunks: Iterable[VideoChunk],
    timer: StageTimer,
) -> float | None:
    """Write each chunk to disk before the next one begins; return the time of the first frame."""
    from anyflow_deploy.pipelines.video_io import VideoWriter

    start = time.perf_counter()
    first_frame = None
    writer = VideoWriter(output, pipe.manifest.video.fps, (request.height, request.width))
    try:
        with writer:
            for chunk in chunks:
                assert chunk.frames is not None
                with timer.time("write"):
                    writer.append(chunk.frames)
                if first_frame is None and not chunk.given:
                    first_frame = time.perf_counter() - start
    except BaseException as error:
        message = f"{writer.path} holds the first {writer.frames} frames, whole and playable"
        if isinstance(error, KeyboardInterrupt):
            raise (KeyboardInterrupt(message) if writer.frames else error) from None
        if writer.frames:
            console.print(f"{escape(message)}.")
        raise
    return first_frame


def _all_or_none(values: Iterable[bool]) -> bool | None:
    """Whether all are true; None where there are none."""
    found = list(values)
    return all(found) if found else None
