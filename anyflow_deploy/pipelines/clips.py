"""Read clips of any container that PyAV opens, frame by frame, as a player shows them.

    with ClipReader(path) as clip:
        print(clip.describe())                               # one frame was decoded for that
        frames = clip.read_first(16, 81, FrameFit(480, 832, "crop"))

Clips have rates of their own, and those of phones and screen recordings no even one. Frames are
taken at even times at the rate of the model, so that a clip keeps its speed: the frame at time t is
the last one that begins at or before t. Time is counted from the first frame.

Only what is used is decoded, and only what is returned is kept: memory does not grow with the
length of a clip.
"""

from __future__ import annotations

import io
import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.models import FPS
from anyflow_deploy.pipelines.frame_display import (
    BLACK,
    STORED,
    Color,
    orientation_from_frame,
    shown_size,
)
from anyflow_deploy.pipelines.frame_fit import FrameFit, format_size

CLIP_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mkv", ".mk3d", ".webm", ".ogv"),
    *(".avi", ".divx", ".wmv", ".asf", ".flv", ".mxf", ".gif", ".y4m"),
    *(".mpg", ".mpeg", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".m2t"),
)
"""Endings of clips in folders and shards. A file that is named by the user may have any."""

_ROUNDING_S = 0.00051
"""Most that times are rounded by: files in milliseconds, and what was made from them."""

_SEEK_MARGIN_S = 1.0
"""Seconds before the wanted frames at which reading begins."""

_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""ffmpeg's own decoders of these drop the alpha of a clip that has it."""


class ClipReader:
    """An open clip; see the module.

    Args:
        source: a file, its bytes, or an open file.
        name: for messages; None for the path.

    Attributes:
        name: for messages.
        size: height and width, as shown.
        orientation: how stored frames are turned.
        aspect: width of a stored pixel by its height.
        rate: frames a second in the mean; None where the file does not say.
        seconds: length; None where the file does not say.
        decoded: number of frames decoded so far.
        end: length in seconds of the frames themselves, once the last one was decoded.

    Raises:
        AnyFlowError: no such file, none that PyAV can decode, or one without pictures.
    """

    def __init__(self, source: Path | bytes | BinaryIO, name: str | None = None) -> None:
        self.name = name or (str(source) if isinstance(source, Path) else "the clip")
        self.decoded = 0
        self.end: float | None = None
        if isinstance(source, Path):
            source = open_readable(source, "a video", self.name)
        self._source = io.BytesIO(source) if isinstance(source, bytes) else source
        self._open()
        try:
            stream = self._stream
            self.aspect: Fraction | None = stream.sample_aspect_ratio
            average = stream.average_rate or stream.guessed_rate
            self.rate = float(average) if average else None
            self.seconds = _length(self._container, stream)
            self.orientation = STORED
            self._first_time: float | None = None
            first = next(self._decode(), None)
            if first is None:
                raise AnyFlowError(f"{self.name} cannot be read as a video: it has no frames.")
            self._first_time = first.time
            self.orientation = orientation_from_frame(first, self.name)
            self.size = shown_size(first.height, first.width, self.orientation, self.aspect)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ClipReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def describe(self) -> str:
        """Say what the clip is, as `a.mp4 is 720 x 1280, turned by 90 degrees, 30 fps, 2.00 s`."""
        parts = [format_size(self.size)]
        if self.orientation != STORED:
            parts.append(str(self.orientation))
        if self.aspect and self.aspect != 1:
            parts.append(f"pixels {self.aspect.numerator}:{self.aspect.denominator}")
        if self.rate is not None:
            parts.append(f"{self.rate:.4g} fps")
        if self.seconds is not None:
            parts.append(f"{self.seconds:.2f} s")
        return f"{self.name} is {', '.join(parts)}"

    def count_frames(self, fps: int) -> int | None:
        """Return how many frames it has at a rate, by its header; None where that does not say."""
        return None if self.seconds is None else math.ceil(self.seconds * fps - 0.05)

    def read_all(self, background: Color = BLACK) -> NDArray[np.uint8]:
        """Read every frame once, at whatever times, uint8 (frames, height, width, 3)."""
        fit = FrameFit(*self.size, background=background)
        self._rewind()
        return np.stack([self._show(frame, fit) for frame in self._decode()])

    def read_first(self, fps: int, count: int, fit: FrameFit) -> NDArray[np.uint8]:
        """Read the first frames at a rate.

        Args:
            fps: rate at which frames are taken.
            count: the most frames to return; a short clip has less.
            fit: how they become frames of one size.

        Returns:
            uint8 (frames, height, width, 3).

        Raises:
            AnyFlowError: frames that cannot be decoded, or of a size that `fit` refuses.
        """
        self._rewind()
        frames = np.empty((count, fit.height, fit.width, 3), np.uint8)
        number = 0
        for pixels in islice(self._sample(fps, 0, fit), count):
            frames[number] = pixels
            number += 1
        return frames[:number]

    def read_last(self, fps: int, count: int, fit: FrameFit) -> NDArray[np.uint8]:
        """Read the last frames at a rate; as `read_first`, at the same times."""
        start = 0
        if self.seconds is not None and self._first_time is not None:
            start = max(0, math.floor((self.seconds - _SEEK_MARGIN_S) * fps) - count)
        frames = self._read_from(start, fps, count, fit)
        if len(frames) < count and start:  # the header was wrong about the length
            frames = self._read_from(0, fps, count, fit)
        return frames

    def _read_from(self, start: int, fps: int, count: int, fit: FrameFit) -> NDArray[np.uint8]:
        self._rewind()
        if start:
            self._seek(start / fps - _SEEK_MARGIN_S)
        frames = deque(self._sample(fps, start, fit), maxlen=count)
        if not frames:
            return np.empty((0, fit.height, fit.width, 3), np.uint8)
        return np.stack(frames)

    def _sample(self, fps: int, first: int, fit: FrameFit) -> Iterator[NDArray[np.uint8]]:
        """Yield the pixels shown at the times first / fps, (first + 1) / fps, …"""
        number = first
        for frame, is_last, end in self._timed_frames(first / fps):
            # The end of the last one is a sum of two rounded numbers
            rounding = 2 * _ROUNDING_S if is_last else _ROUNDING_S
            pixels = None
            while number / fps < end - rounding:
                pixels = self._show(frame, fit) if pixels is None else pixels
                yield pixels
                number += 1

    def _timed_frames(self, near: float) -> Iterator[tuple[Any, bool, float]]:
        """Yield (frame, whether it is the last one, its end in seconds) of the frames ahead.

        Args:
            near: time of the first frame ahead, where frames have no times.
        """
        frame = None
        start = gap = 0.0
        for number, ahead in enumerate(self._decode()):
            step = self._step(gap)
            time = self._time(ahead)
            if time is None:
                time = near + number * step
            if frame is not None:
                time = max(time, start)  # times that go back: joined files
                gap = time - start
                yield frame, False, time
            frame, start = ahead, time
        if frame is None:
            return
        duration = float((getattr(frame, "duration", None) or 0) * (frame.time_base or 0))
        self.end = start + (duration or self._step(gap))
        yield frame, True, self.end

    def _step(self, gap: float) -> float:
        """Seconds that a frame is shown: by the mean rate, or the last gap, or the model's rate."""
        return 1 / self.rate if self.rate else gap or 1 / FPS

    def _time(self, frame: Any) -> float | None:
        """Seconds from the clip's first frame."""
        if frame.time is None or self._first_time is None:
            return None
        return float(frame.time - self._first_time)

    def _show(self, frame: Any, fit: FrameFit) -> NDArray[np.uint8]:
        return fit.fit_frame(frame, self.name, self.orientation, self.aspect)

    # The file

    def _open(self) -> None:
        import av

        source = self._source
        with _decoding(self.name):
            if not isinstance(source, Path):
                source.seek(0)
            # Without "file:", a colon in a name would look like a protocol
            self._container = av.open(f"file:{source}" if isinstance(source, Path) else source, "r")
            stream = self._container.streams.best("video")
            if stream is None:
                self._container.close()
                raise AnyFlowError(f"{self.name} cannot be read as a video: it has no pictures.")
        self._stream: Any = stream
        self._make_decoder()

    def _make_decoder(self) -> None:
        import av

        codec = self._stream.codec_context.name
        self._alpha_decoder: Any = None
        if self._stream.metadata.get("alpha_mode") == "1" and codec in _ALPHA_DECODERS:
            self._alpha_decoder = av.CodecContext.create(_ALPHA_DECODERS[codec], "r")

    def _rewind(self) -> None:
        """Go back to the first frame."""
        self.close()
        self._open()

    def _seek(self, seconds: float) -> None:
        """Go to the key frame before a time."""
        assert self._first_time is not None
        with _decoding(self.name):
            place = (seconds + self._first_time) / float(self._stream.time_base)
            self._container.seek(math.floor(place), stream=self._stream)

    def _decode(self) -> Iterator[Any]:
        """Yield the frames ahead as they are stored."""
        with _decoding(self.name):
            if self._alpha_decoder is None:
                for frame in self._container.decode(self._stream):
                    self.decoded += 1
                    yield frame
                return
            for packet in self._container.demux(self._stream):
                for frame in self._alpha_decoder.decode(packet if packet.size else None):
                    self.decoded += 1
                    yield frame


def open_readable(path: Path, kind: str, name: str) -> Path | bytes:
    """Refuse a path that is no file with bytes in it, by its own reason.

    Args:
        path: of the file.
        kind: what it should be, as "a video".
        name: for messages.

    Returns:
        The path; the bytes of a pipe, which can be read once.

    Raises:
        AnyFlowError: no such file, a broken link, a folder, an empty file, or no permission.
    """
    try:
        with path.open("rb") as file:
            data = file.read(1 if path.is_file() else -1)
            if data:
                return path if path.is_file() else data
            reason = "it is empty"
    except FileNotFoundError:
        reason = "there is no such file"
        if path.is_symlink():
            reason = f"it is a link to {path.readlink()}, which does not exist"
    except PermissionError:
        reason = "you may not read it"
    except IsADirectoryError:
        reason = "it is a folder"
    except OSError as error:
        reason = str(error.strerror or error)
    raise AnyFlowError(f"{name} cannot be read as {kind}: {reason}.")


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Within it, a failure of PyAV is that of a file."""
    import av

    try:
        yield
    except (OSError, IndexError, av.error.FFmpegError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise AnyFlowError(f"{name} cannot be read as a video: {reason}.") from None


def _length(container: Any, stream: Any) -> float | None:
    """Seconds, by the header."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if container.duration:
        return float(container.duration) / 1e6
    return None
