"""Generates the chunks of a request with a `VideoPipeline` that all requests share.

Nothing here depends on Triton. Any number of threads may generate; they take turns on the device.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyflow_deploy.engines.adaptive_steps import AdaptiveResult
from anyflow_deploy.engines.deadline import DeadlineResult
from anyflow_deploy.engines.tritonserver.io_spec import OUTPUT_TYPES
from anyflow_deploy.engines.tritonserver.request import ParsedRequest
from anyflow_deploy.pipelines.video import VideoChunk
from anyflow_deploy.pipelines.video_io import Mp4FragmentEncoder
from anyflow_deploy.pipelines.video_pipeline import VideoPipeline
from anyflow_deploy.schedule import Step


@dataclass(frozen=True)
class GeneratedChunk:
    """A part of a video, as a client gets it.

    Attributes:
        index: 0 for the first.
        first_frame: of the video.
        steps: number of its transitions; the first part of a bidirectional video has all of them.
        deadline_met: None without a deadline.
        output: name of the tensor, one of `OUTPUTS`.
        content: the tensor.
    """

    index: int
    first_frame: int
    steps: int
    deadline_met: bool | None
    output: str
    content: NDArray[Any]


def generate_chunks(
    pipeline: VideoPipeline,
    parsed: ParsedRequest,
    check: Callable[[], None],
) -> Generator[GeneratedChunk, None, None]:
    """Generate a video, chunk by chunk.

    Args:
        pipeline: with a lock, where several threads make videos.
        parsed: the request.
        check: called before every operation; an exception it raises ends the video.

    Returns:
        An iterator over the chunks; closing it releases the cache.
    """
    request = parsed.request
    check()
    prompt_embeds = parsed.prompt_embeds
    if prompt_embeds is None:
        prompt_embeds = pipeline.encode_prompt(request.prompt)
    results: list[DeadlineResult | AdaptiveResult] = []
    policy = request.make_policy(pipeline.step_timer, on_end=results.append)
    steps = 0

    def on_step(step: Step) -> None:
        nonlocal steps
        steps = step.index + 1
        check()

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[None]:
        check()
        yield

    output = OUTPUT_TYPES[parsed.output_type]
    encoder = None
    if parsed.output_type in ("mp4", "mp4-base64"):
        encoder = Mp4FragmentEncoder(pipeline.manifest.video.fps, (request.height, request.width))
    decode = parsed.output_type != "latents"
    chunks = pipeline.generate(
        request, prompt_embeds, policy, decode=decode, on_step=on_step, stage=stage
    )
    with closing(chunks):
        for chunk in chunks:
            last = results[-1] if results else None
            deadline_met = last.slack >= 0 if isinstance(last, DeadlineResult) else None
            content = _pack(chunk, encoder, parsed.output_type)
            yield GeneratedChunk(
                chunk.index, chunk.first_frame, steps, deadline_met, output, content
            )
            steps = 0
            check()


def join_chunks(chunks: list[GeneratedChunk], output_type: str) -> NDArray[Any]:
    """Join the tensors of a video's chunks into one, as a single response has it.

    Args:
        chunks: all of one video, in order.
        output_type: of the request.
    """
    contents = [chunk.content for chunk in chunks]
    if output_type not in ("mp4", "mp4-base64"):
        return np.concatenate(contents)
    pieces = [bytes(content[0]) for content in contents]
    if output_type == "mp4":
        return np.array([b"".join(pieces)], dtype=object)
    # Each piece was encoded by itself, with padding of its own
    data = b"".join(base64.b64decode(piece) for piece in pieces)
    return np.array([base64.b64encode(data)], dtype=object)


def _pack(chunk: VideoChunk, encoder: Mp4FragmentEncoder | None, output_type: str) -> NDArray[Any]:
    """Return the tensor of a chunk that is sent to the client."""
    if chunk.frames is None:
        return np.ascontiguousarray(chunk.latents[0])
    if encoder is None:
        return chunk.frames
    fragment = encoder.encode(chunk.frames)
    encoded = base64.b64encode(fragment) if output_type == "mp4-base64" else fragment
    return np.array([encoded], dtype=object)
