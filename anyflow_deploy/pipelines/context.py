"""Read the picture or clip that a causal video begins with, and check it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from anyflow_deploy.errors import InvalidRequestError
from anyflow_deploy.pipelines.request import GenerationRequest
from anyflow_deploy.pipelines.video import Frames
from anyflow_deploy.pipelines.video_io import check_size, load_image, load_video


def load_context(request: GenerationRequest, image: Any, video: Any) -> Frames | None:
    """Read the frames that a video begins with, and check them.

    Args:
        request: the video.
        image: a path, or uint8 (height, width, 3) (a PIL picture serves); or None.
        video: a path, or uint8 (4n+1, height, width, 3); or None.

    Returns:
        uint8 (frames, height, width, 3); None when neither is given.

    Raises:
        InvalidRequestError: both, another size or type, or frames that do not suit the chunks.
        AnyFlowError: a file that cannot be read.
    """
    if image is None and video is None:
        return None
    if image is not None and video is not None:
        raise InvalidRequestError("give one of image and video: a video begins with one.", "image")
    field = "image" if image is not None else "video"
    source = image if image is not None else video
    if isinstance(source, str | Path):
        load = load_image if image is not None else load_video
        frames = load(Path(source))
    else:
        frames = np.asarray(source)
        if image is not None and frames.ndim == 3:
            frames = frames[None]
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise InvalidRequestError(
                f"{field} is {frames.dtype} {frames.shape}; allowed is uint8 (frames, height,"
                " width, 3).",
                field,
            )
    name = str(source) if isinstance(source, str | Path) else field
    check_size(name, frames, request.height, request.width)
    request.check_context(len(frames), field)
    return frames
