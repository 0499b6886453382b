"""A generated video, whole or in parts, and how it was generated.

    video.save("fox.mp4")          # or .safetensors, for the latents

`VideoPipeline` returns these objects. Legend: B videos, f latent frames, F
video frames, C channels, H W latent rows and columns.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anyflow_deploy.bundle.atomic_io import write_bytes_atomically
from anyflow_deploy.bundle.outputs import OutputFile, output_path
from anyflow_deploy.engines.adaptive_steps import AdaptiveResult
from anyflow_deploy.engines.deadline import DeadlineResult
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.pipelines.video_io import save_video

LATENTS_SUFFIX = ".safetensors"

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class VideoChunk:
    """A part of a video: a causal model's chunk, or frames of a bidirectional model's video.

    Attributes:
        index: 0 for the first.
        first_frame: index of its first frame in the video.
        frames: uint8 (frames, height, width, 3); None with `output_type="latent"`.
        latents: clean, float32 (B, f, C, H, W).
        given: whether it is context that the video began with, and was not generated.
    """

    index: int
    first_frame: int
    frames: Frames | None
    latents: Array
    given: bool


@dataclass(frozen=True)
class GenerationReport:
    """How a video was generated.

    Attributes:
        steps: transitions of each generated chunk, or of the whole video.
        results: results of deadlines or target qualities, one for each of them.
        seconds: by stage: "text", "transformer", "vae", and "engine" if it was loaded meanwhile.
    """

    steps: tuple[int, ...]
    results: tuple[DeadlineResult | AdaptiveResult, ...]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Video:
    """A finished video.

    Attributes:
        frames: uint8 (F, height, width, 3); None with `output_type="latent"`.
        latents: clean, float32 (B, f, C, H, W).
        fps: playback rate.
        report: how it was generated; None if that was not recorded.
    """

    frames: Frames | None
    latents: Array
    fps: int
    report: GenerationReport | None = None

    @classmethod
    def from_chunks(
        cls, chunks: Iterable[VideoChunk], fps: int, report: GenerationReport | None = None
    ) -> Video:
        """Join all chunks of a video, in order."""
        parts = list(chunks)
        pixels = [chunk.frames for chunk in parts if chunk.frames is not None]
        latents = np.concatenate([chunk.latents for chunk in parts], axis=1)
        return cls(np.concatenate(pixels) if pixels else None, latents, fps, report)

    def save(self, path: str | Path | OutputFile) -> None:
        """Write the video, whole or not at all.

        Args:
            path: ends in .mp4, .mkv or .mov; or in .safetensors, for the latents. An older file is
                replaced, unless an output is given that is open already.

        Raises:
            AnyFlowError: another ending, or no frames to write.
            OutputError: it cannot be written.
        """
        destination = path if isinstance(path, OutputFile) else Path(path)
        path = output_path(destination)
        if path.suffix == LATENTS_SUFFIX:
            save_latents(destination, self.latents)
        elif self.frames is None:
            raise AnyFlowError(
                f"{path} is a video, and these are latents alone. Save to a {LATENTS_SUFFIX} file,"
                ' or generate with output_type="np".'
            )
        else:
            save_video(destination, self.frames, self.fps)


class StageTimer:
    """Adds up the seconds of each stage.

    Attributes:
        seconds: by stage.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Time a stage in a `with` block; a repeated stage adds up."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds.items())


def save_latents(destination: Path | OutputFile, latents: Array) -> None:
    """Write latents as a .safetensors file, whole or not at all.

    Args:
        destination: a path, or an output that is open already.
        latents: float32 (B, F, C, H, W), under the name `latents`.

    Raises:
        OutputError: it cannot be written.
    """
    from safetensors.numpy import save

    layout = {"layout": "batch, frames, channels, height, width"}
    data = save({"latents": np.ascontiguousarray(latents)}, metadata=layout)
    write_bytes_atomically(destination, data)
