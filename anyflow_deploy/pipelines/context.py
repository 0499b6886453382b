"""Read the picture or clip that a causal video begins with, and check it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np

from anyflow_deploy.errors import AnyFlowError, InvalidRequestError, ShapeError
from anyflow_deploy.pipelines.clips import ClipReader
from anyflow_deploy.pipelines.frame_display import BLACK, Color, parse_color
from anyflow_deploy.pipelines.frame_fit import FITS, Fit, FrameFit
from anyflow_deploy.pipelines.pictures import load_picture, pixels_from_image
from anyflow_deploy.pipelines.request import GenerationRequest
from anyflow_deploy.pipelines.video import Frames

Take = Literal["first", "last"]
TAKES: tuple[str, ...] = get_args(Take)


@dataclass(frozen=True)
class ContextOptions:
    """What may be done to a picture or clip so that it suits the video.

    Attributes:
        fit: how it is brought to the size; None: it must have the size. See `frame_fit`.
        background: behind transparent pixels, and around padded frames.
        take: take the first or the last frames of a clip that fill whole chunks; None: all of its
            frames, which must fill them.
    """

    fit: Fit | None = None
    background: Color = BLACK
    take: Take | None = None

    @classmethod
    def parse(
        cls, fit: str | None = None, background: str | Color = BLACK, take: str | None = None
    ) -> ContextOptions:
        """Check what a user gives.

        Raises:
            InvalidRequestError: naming what was given and what is allowed.
        """
        for field, value, allowed in (("fit", fit, FITS), ("take", take, TAKES)):
            if value is not None and value not in allowed:
                raise InvalidRequestError(
                    f"{field} is {value!r}; allowed are {' and '.join(allowed)}.", field
                )
        try:
            color = parse_color(background) if isinstance(background, str) else background
        except AnyFlowError as error:
            raise InvalidRequestError(str(error), "background") from None
        return cls(fit, color, take)  # type: ignore[arg-type]  # checked above


def load_context(
    request: GenerationRequest,
    image: Any,
    video: Any,
    fps: int,
    options: ContextOptions | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Frames | None:
    """Read the frames that a video begins with, and check them.

    Args:
        request: the video.
        image: a path, bytes or an open file of a picture, a PIL picture, or uint8 (height, width,
            3); or None.
        video: a path, bytes or an open file of a clip, or uint8 (4n+1, height, width, 3) at the
            model's rate; or None.
        fps: rate of the model, at which frames of a file are taken.
        options: what may be done to them.
        tell: called with a sentence about what was read.

    Returns:
        uint8 (frames, height, width, 3); None when neither is given.

    Raises:
        InvalidRequestError: both, another size or type, or frames that do not suit the chunks.
        AnyFlowError: a file that cannot be read.
    """
    options = options or ContextOptions()
    if image is None and video is None:
        return None
    if image is not None and video is not None:
        raise InvalidRequestError("give one of image and video: a video begins with one.", "image")
    field = "image" if image is not None else "video"
    source = _open_source(image if image is not None else video)
    fit = FrameFit(request.height, request.width, options.fit, options.background)
    if request.plan is None:
        request.check_context(1, field)  # refuses it, before a long clip is read
    if not isinstance(source, Path | bytes) and not hasattr(source, "read"):
        frames = _frames_from_array(source, field, fit)
        if options.take is not None and field == "video":
            frames = _take(request, frames, options.take, "video")
    elif field == "image":
        frames = load_picture(source, fit, name=_name(source, field))
    else:
        frames = _load_clip(request, source, fps, fit, options.take, tell)
    request.check_context(len(frames), field)
    return frames


def _open_source(source: Any) -> Any:
    return Path(source) if isinstance(source, str) else source


def _name(source: Any, field: str) -> str:
    return str(source) if isinstance(source, Path) else field


def _frames_from_array(source: Any, field: str, fit: FrameFit) -> Frames:
    if hasattr(source, "getexif"):  # a PIL picture
        frames = pixels_from_image(source, fit.background, field)
    else:
        frames = np.asarray(source)
    if field == "image" and frames.ndim == 3:
        frames = frames[None]
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise InvalidRequestError(
            f"{field} is {frames.dtype} {frames.shape}; allowed is uint8 (frames, height,"
            " width, 3).",
            field,
        )
    fit.check(field, frames.shape[1:3])
    if frames.shape[1:3] == (fit.height, fit.width):
        return frames
    return np.stack([fit.fit_pixels(frame, field) for frame in frames])


def _load_clip(
    request: GenerationRequest,
    source: Path | bytes | BinaryIO,
    fps: int,
    fit: FrameFit,
    take: Take | None,
    tell: Callable[[str], None],
) -> Frames:
    """Read what is used of a clip; nothing but its first frame before its size is checked."""
    name = _name(source, "video")
    longest = max(request.context_lengths(), default=0)
    if not longest:
        request.check_context(request.num_frames, "video")  # refuses a video of one chunk
    with ClipReader(source, name) as clip:
        fit.check(name, clip.size)
        count = clip.count_frames(fps)
        if take == "last":
            frames = clip.read_last(fps, longest, fit)
        elif take == "first":
            frames = clip.read_first(fps, longest, fit)
        else:
            if count is not None and count > longest + 1:
                raise _too_long(request, clip, count, fps, longest)
            frames = clip.read_first(fps, longest + 1, fit)
            if len(frames) > longest:
                raise _too_long(request, clip, count or len(frames), fps, longest)
    frames = _take(request, frames, take, name) if take else _check_length(request, frames)
    used = f"the {take} {len(frames)}" if take else str(len(frames))
    seconds = len(frames) / fps
    tell(f"{clip.describe()}; {used} frames are used, {fps} a second ({seconds:.2f} s)")
    return frames


def _take(request: GenerationRequest, frames: Frames, take: Take, name: str) -> Frames:
    """Keep as many frames of one end as fill whole chunks."""
    lengths = request.context_lengths()
    usable = [length for length in lengths if length <= len(frames)]
    if not usable:
        shown = " or ".join(map(str, lengths)) or "none"
        raise InvalidRequestError(
            f"{name} has {len(frames)} frames; the first chunks of the video take {shown}. Give a"
            " longer clip or other chunks.",
            "video",
        )
    return frames[: usable[-1]] if take == "first" else frames[-usable[-1] :]


def _check_length(request: GenerationRequest, frames: Frames) -> Frames:
    try:
        request.check_context(len(frames), "video")
    except ShapeError as error:  # not 4n+1
        raise InvalidRequestError(f"{error} {_advice(request)}", "video") from None
    return frames


def _advice(request: GenerationRequest) -> str:
    name = request.name_field("take")
    return f"Cut the clip, or take frames that fill chunks with {name} first or {name} last."


def _too_long(
    request: GenerationRequest, clip: ClipReader, count: int, fps: int, longest: int
) -> InvalidRequestError:
    return InvalidRequestError(
        f"{clip.describe()}: at least {count} frames at {fps} a second; the video asked for has"
        f" {request.num_frames} and can begin with {longest}. {_advice(request)}",
        "video",
    )
