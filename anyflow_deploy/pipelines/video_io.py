"""Frames to a video file and back, through PyAV.

PyAV has the ffmpeg libraries in its wheel, so no program has to be installed.

`save_video` writes a whole video or nothing. `VideoWriter` writes one that grows: every fragment is
an encoder run of its own, so it begins with a keyframe and the encoder holds no frame back, and a
movie fragment of its own (ISO 14496-12), so players read it while the next one is made. Fragments
of later runs follow the first run's header, which is the same for all of them; only their times and
numbers differ.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import struct
from collections.abc import Iterator
from fractions import Fraction
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyflow_deploy.bundle.atomic_io import atomic_file
from anyflow_deploy.bundle.outputs import OutputFile, output_path
from anyflow_deploy.errors import AnyFlowError, OutputError
from anyflow_deploy.pipelines.clips import ClipReader
from anyflow_deploy.pipelines.frame_fit import format_size

_MUXERS = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov"}
"""Suffix of a file -> ffmpeg's name of the container."""

SUFFIXES = tuple(_MUXERS)
GROWING_SUFFIXES = (".mp4",)

_FRAGMENTS = "frag_keyframe+empty_moov+default_base_moof+frag_discont+skip_trailer"
_HEADER_BOXES = (b"ftyp", b"moov")
_LONGEST_HEADER = 1 << 16  # bytes; ours have less than 2 KiB


def save_video(destination: Path | OutputFile, frames: NDArray[np.uint8], fps: int) -> None:
    """Encode frames as H.264, whole or not at all.

    Args:
        destination: a path, or an output that is open already; its suffix chooses the container.
        frames: (frames, height, width, 3), even height and width.
        fps: playback rate.

    Raises:
        AnyFlowError: another suffix, or no H.264 encoder in this PyAV.
        OutputError: it cannot be written.
    """
    import av

    path = output_path(destination)
    check_suffix(path)
    muxer = _MUXERS[path.suffix.lower()]
    with atomic_file(destination) as partial:
        try:
            # An absolute path, in which ffmpeg sees no protocol before a colon
            with av.open(str(partial), "w", format=muxer) as container:
                _encode(container, frames, fps)
        except av.error.FFmpegError as error:
            if error.errno in errno.errorcode:
                raise OSError(error.errno, error.strerror) from None
            raise AnyFlowError(f"{path} could not be encoded: {error}.") from None


class Mp4FragmentEncoder:
    """Encodes the fragments of a video that grows: H.264 in fragmented mp4.

    All fragments in order are the file.

    Args:
        fps: playback rate.
        size: height and width, both even.

    Attributes:
        frames: number of frames encoded so far.

    Raises:
        AnyFlowError: an odd size.
    """

    def __init__(self, fps: int, size: tuple[int, int]) -> None:
        if size[0] % 2 or size[1] % 2 or min(size) < 2:
            raise AnyFlowError(
                f"a video of {format_size(size)} cannot be encoded as H.264; allowed are even"
                " heights and widths."
            )
        self.fps = fps
        self.size = size
        self.frames = 0
        self._moof_count = 0

    def encode(self, frames: NDArray[np.uint8]) -> bytes:
        """Encode the next fragment; the first one has the file's header, the others have not.

        Args:
            frames: uint8 (frames, height, width, 3), at least one.

        Raises:
            AnyFlowError: frames of another size or type, or an encoder that fails.
        """
        import av

        if (
            frames.ndim != 4
            or frames.shape[1:] != (*self.size, 3)
            or not len(frames)
            or frames.dtype != np.uint8
        ):
            expected = f"uint8 (frames, {self.size[0]}, {self.size[1]}, 3)"
            raise AnyFlowError(
                f"frames are {frames.dtype} {frames.shape}; this video takes {expected}, at least"
                " one frame."
            )
        memory = io.BytesIO()
        # Without avoid_negative_ts, ffmpeg would shift every fragment to time zero.
        options = {
            "movflags": _FRAGMENTS,
            "fragment_index": str(self._moof_count + 1),
            "avoid_negative_ts": "disabled",
        }
        try:
            with av.open(memory, "w", format="mp4", options=options) as container:
                # Without B-frames, decoding order is display order, so that fragments join without
                # overlapping times.
                _encode(container, frames, self.fps, self.frames, {"bf": "0"})
        except av.error.FFmpegError as error:
            raise AnyFlowError(f"frames could not be encoded: {error}.") from None
        boxes = list(_boxes(memory.getvalue()))
        header = () if self._moof_count else _HEADER_BOXES
        self._moof_count += sum(kind == b"moof" for kind, _ in boxes)
        self.frames += len(frames)
        return b"".join(data for kind, data in boxes if kind in header or kind not in _HEADER_BOXES)


class VideoWriter:
    """A video file that grows fragment by fragment and can be played meanwhile.

        with VideoWriter(Path("fox.mp4"), fps=16, size=(480, 832)) as writer:
            for frames in parts:
                writer.append(frames)

    The first `append` gives the file its name; what is there keeps it until then. After an
    exception the file keeps the fragments that were appended.

    Args:
        destination: with the suffix .mp4; a path, whose file is replaced, or an output that is open
            already.
        fps: playback rate.
        size: height and width, both even.

    Attributes:
        frames: number of frames appended so far.

    Raises:
        AnyFlowError: another suffix, or an odd size.
        OutputError: it cannot be written.
    """

    def __init__(self, destination: Path | OutputFile, fps: int, size: tuple[int, int]) -> None:
        self._cleanup = contextlib.ExitStack()
        check_suffix(output_path(destination), GROWING_SUFFIXES)
        self.frames = 0
        self._encoder = Mp4FragmentEncoder(fps, size)
        self._output = (
            destination
            if isinstance(destination, OutputFile)
            else self._cleanup.enter_context(OutputFile(destination, overwrite=True))
        )
        self._file: FileIO | None = self._output.partial.open("r+b", buffering=0)

    @property
    def path(self) -> Path:
        """The file, once there is one."""
        return self._output.path

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, frames: NDArray[np.uint8]) -> int:
        """Append frames as one fragment; they are in the file when this returns.

        Args:
            frames: uint8 (frames, height, width, 3), at least one.

        Returns:
            Bytes by which the file grew.

        Raises:
            AnyFlowError: frames of another size or type, a closed writer, or an encoder that fails.
            OutputError: it cannot be written.
        """
        if self._file is None:
            raise AnyFlowError(
                f"the writer of {self.path} is closed; open another for another file."
            )
        fragment = self._encoder.encode(frames)
        end = self._file.tell()
        try:
            with self._output.explain_errors():
                view = memoryview(fragment)
                while len(view):
                    view = view[self._file.write(view) :]
        except OutputError:  # what is in the file stays whole
            with contextlib.suppress(OSError):
                self._file.truncate(end)
                self._file.seek(end)
            raise
        is_first = self.frames == 0
        self.frames += len(frames)
        if is_first:
            self._output.commit()
        return len(fragment)

    def close(self) -> None:
        """Close the file, durably; every fragment in it is already whole."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
        self._cleanup.close()


def load_video(path: Path) -> NDArray[np.uint8]:
    """Read all frames of a video file as shown, uint8 (frames, height, width, 3).

    Raises:
        AnyFlowError: no such file, or none that PyAV can decode.
    """
    with ClipReader(path) as clip:
        return clip.read_all()


def load_fragment(path: Path, start: int, end: int) -> NDArray[np.uint8]:
    """Read the frames of one fragment of a `VideoWriter`'s file, also while it grows.

    Args:
        path: the file.
        start, end: position of the fragment in the file, in bytes; the first one starts at 0.

    Returns:
        uint8 (frames, height, width, 3).

    Raises:
        AnyFlowError: no such fragment.
    """
    with path.open("rb") as file:
        first = file.read(min(start, _LONGEST_HEADER))
        header = b"".join(
            data
            for _, data in itertools.takewhile(lambda box: box[0] in _HEADER_BOXES, _boxes(first))
        )
        file.seek(start)
        fragment = header + file.read(end - start)
    with ClipReader(fragment, f"{path}, bytes {start} to {end},") as clip:
        return clip.read_all()


def check_suffix(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Refuse a suffix that is not one of a video container's."""
    if path.suffix.lower() not in suffixes:
        raise AnyFlowError(
            f"{path} ends in {path.suffix or 'nothing'}; allowed are {', '.join(suffixes)}."
        )


def _encode(
    container: Any,
    frames: NDArray[np.uint8],
    fps: int,
    first: int = 0,
    options: dict[str, str] | None = None,
) -> None:
    """Encode frames as the only stream of a container, numbered from `first`."""
    import av

    stream = container.add_stream("libx264", rate=Fraction(fps))
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    stream.options = {"crf": "16", **(options or {})}
    for number, frame in enumerate(frames, start=first):
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts, picture.time_base = number, Fraction(1, fps)
        container.mux(stream.encode(picture))
    container.mux(stream.encode())


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the top-level boxes of an mp4: their kind, and all their bytes."""
    start = 0
    while start < len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        if length == 1:  # the length follows the kind, in 64 bits
            (length,) = struct.unpack_from(">Q", data, start + 8)
        yield kind, data[start : start + length]
        start += length
