"""Frames to a video file and back, by PyAV: the ffmpeg libraries in a wheel, so no program has to
be installed.

`save_video` writes a video that is there whole or not at all. `VideoWriter` writes one that grows:
every piece is an encoder run of its own, so it begins with a keyframe and nothing of it is held
back, and a fragment of its own (ISO 14496-12, movie fragments), so players read it while the next
piece is made. Fragments of later runs are put behind the first file's header, which is the same for
all of them; only their times and numbers differ.
"""

from __future__ import annotations

import io
import itertools
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from anyflow_deploy.bundle.atomic_io import atomic_file
from anyflow_deploy.errors import AnyFlowError

_MUXERS = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov"}
"""Ending of a file -> ffmpeg's name of the container."""

SUFFIXES = tuple(_MUXERS)
GROWING_SUFFIXES = (".mp4",)

_FRAGMENTS = "frag_keyframe+empty_moov+default_base_moof+frag_discont+skip_trailer"
_HEADER_BOXES = (b"ftyp", b"moov")
_LONGEST_HEADER = 1 << 16  # bytes; ours have less than 2 KiB


def save_video(path: Path, frames: NDArray[np.uint8], fps: int) -> None:
    """Encode frames as H.264, whole or not at all.

    Args:
        path: destination; its ending chooses the container.
        frames: (frames, height, width, 3), even height and width.
        fps: playback rate.

    Raises:
        AnyFlowError: another ending, or no H.264 encoder in this PyAV.
    """
    import av

    check_suffix(path)
    try:
        with (
            atomic_file(path) as partial,
            av.open(str(partial), "w", format=_MUXERS[path.suffix.lower()]) as container,
        ):
            _encode(container, frames, fps)
    except av.error.FFmpegError as error:
        raise AnyFlowError(f"{path} could not be encoded: {error}.") from None


class Mp4Pieces:
    """Makes the bytes of a video that grows: H.264 in fragmented mp4. All pieces, one behind the
    other, are the file.

    Args:
        fps: playback rate.
        size: height and width, both even.

    Attributes:
        frames: how many were encoded.

    Raises:
        AnyFlowError: an odd size.
    """

    def __init__(self, fps: int, size: tuple[int, int]) -> None:
        if size[0] % 2 or size[1] % 2 or min(size) < 2:
            raise AnyFlowError(
                f"a video of {_shown(size)} cannot be encoded as H.264; allowed are even heights"
                " and widths."
            )
        self.fps, self.size, self.frames = fps, size, 0
        self._fragments = 0

    def encode(self, frames: NDArray[np.uint8]) -> bytes:
        """The next piece: the first one with the file's header, the others without.

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
            wanted = f"uint8 (frames, {self.size[0]}, {self.size[1]}, 3)"
            raise AnyFlowError(
                f"frames are {frames.dtype} {frames.shape}; this video takes {wanted}, at least one"
                " frame."
            )
        memory = io.BytesIO()
        # Without avoid_negative_ts, ffmpeg would shift every piece to time zero.
        options = {
            "movflags": _FRAGMENTS,
            "fragment_index": str(self._fragments + 1),
            "avoid_negative_ts": "disabled",
        }
        try:
            with av.open(memory, "w", format="mp4", options=options) as container:
                # Without B-frames decoding order is display order, so that pieces join without
                # overlapping times.
                _encode(container, frames, self.fps, self.frames, {"bf": "0"})
        except av.error.FFmpegError as error:
            raise AnyFlowError(f"frames could not be encoded: {error}.") from None
        boxes = list(_boxes(memory.getvalue()))
        header = () if self._fragments else _HEADER_BOXES
        self._fragments += sum(kind == b"moof" for kind, _ in boxes)
        self.frames += len(frames)
        return b"".join(data for kind, data in boxes if kind in header or kind not in _HEADER_BOXES)


class VideoWriter:
    """A video file that grows piece by piece and can be played meanwhile, see `Mp4Pieces`.

        with VideoWriter(Path("fox.mp4"), fps=16, size=(480, 832)) as writer:
            for piece in pieces:
                writer.append(piece)

    The file is made (or replaced) by the first `append`. After an exception it keeps the pieces
    that were appended.

    Args:
        path: destination, ending in .mp4.
        fps: playback rate.
        size: height and width, both even.

    Raises:
        AnyFlowError: another ending, or an odd size.
    """

    def __init__(self, path: Path, fps: int, size: tuple[int, int]) -> None:
        check_suffix(path, GROWING_SUFFIXES)
        self.path = path
        self._pieces = Mp4Pieces(fps, size)
        self._file: BinaryIO | None = None
        self._closed = False

    @property
    def frames(self) -> int:
        """How many were appended."""
        return self._pieces.frames

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, frames: NDArray[np.uint8]) -> int:
        """Put frames behind those already there; they are in the file when this returns.

        Args:
            frames: uint8 (frames, height, width, 3), at least one.

        Returns:
            Bytes by which the file grew.

        Raises:
            AnyFlowError: frames of another size or type, a closed writer, or an encoder that fails.
        """
        if self._closed:
            raise AnyFlowError(
                f"the writer of {self.path} is closed; open another for another file."
            )
        piece = self._pieces.encode(frames)
        if self._file is None:
            self._file = self.path.open("wb")
        self._file.write(piece)
        self._file.flush()
        return len(piece)

    def close(self) -> None:
        """Close the file; nothing is written here, every piece is already whole."""
        self._closed = True
        if self._file is not None:
            self._file.close()
            self._file = None


def load_video(path: Path) -> NDArray[np.uint8]:
    """All frames of a video file, uint8 (frames, height, width, 3).

    Raises:
        AnyFlowError: no such file, or none that PyAV can decode.
    """
    return np.stack(_decode_frames(path, "a video", None))


def load_image(path: Path) -> NDArray[np.uint8]:
    """A picture (png, jpg and whatever else PyAV decodes), uint8 (1, height, width, 3).
    Transparency is dropped.

    Raises:
        AnyFlowError: no such file, or none that PyAV can decode.
    """
    return np.stack(_decode_frames(path, "an image", 1))


def piece_frames(path: Path, start: int, end: int) -> NDArray[np.uint8]:
    """The frames of one piece of a video that `VideoWriter` writes, also while it grows.

    Args:
        path: the file.
        start, end: where the piece lies in it, in bytes; pieces lie one behind the other, the first
            one at 0.

    Returns:
        uint8 (frames, height, width, 3).

    Raises:
        AnyFlowError: no such piece.
    """
    with path.open("rb") as file:
        first = file.read(min(start, _LONGEST_HEADER))
        header = b"".join(
            data
            for _, data in itertools.takewhile(lambda box: box[0] in _HEADER_BOXES, _boxes(first))
        )
        file.seek(start)
        piece = header + file.read(end - start)
    return np.stack(
        _decode_frames(
            io.BytesIO(piece), "a piece of a video", None, f"{path}, bytes {start} to {end},"
        )
    )


def check_size(name: str, frames: NDArray[np.uint8], height: int, width: int) -> None:
    """Refuse frames of another size than the video's: what to crop is the user's choice.

    Args:
        name: what they are, for the message.
        frames: (frames, height, width, 3).
        height, width: of the video asked for, in pixels.

    Raises:
        AnyFlowError: naming both sizes.
    """
    if frames.shape[1:3] != (height, width):
        given = _shown(frames.shape[1:3])
        asked = _shown((height, width))
        raise AnyFlowError(
            f"{name} is {given} and the video asked for is {asked} (height x width). "
            "Crop or scale the file, or choose --height and --width."
        )


def check_suffix(path: Path, allowed: tuple[str, ...] = SUFFIXES) -> None:
    """Refuse an ending that is not a video container's."""
    if path.suffix.lower() not in allowed:
        raise AnyFlowError(
            f"{path} ends in {path.suffix or 'nothing'}; allowed are {', '.join(allowed)}."
        )


def _encode(
    container: Any,
    frames: NDArray[np.uint8],
    fps: int,
    first: int = 0,
    options: dict[str, str] | None = None,
) -> None:
    """Encode frames as the only stream of a container; `first` is the number of the first one."""
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


def _decode_frames(
    source: Path | BinaryIO, wanted: str, limit: int | None, name: str = ""
) -> list[NDArray[np.uint8]]:
    import av

    path = name or source

    frames: list[NDArray[np.uint8]] = []
    try:
        with av.open(str(source) if isinstance(source, Path) else source, "r") as container:
            for frame in container.decode(video=0):
                frames.append(np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8))
                if len(frames) == limit:
                    break
    except (OSError, IndexError, av.error.FFmpegError) as error:
        raise AnyFlowError(f"{path} cannot be read as {wanted}: {error}.") from None
    if not frames:
        raise AnyFlowError(f"{path} cannot be read as {wanted}: it has no frames.")
    return frames


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The top-level boxes of an mp4: their kind, and all their bytes."""
    start = 0
    while start < len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        if length == 1:  # the length follows the kind, in 64 bits
            (length,) = struct.unpack_from(">Q", data, start + 8)
        yield kind, data[start : start + length]
        start += length


def _shown(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]}"
