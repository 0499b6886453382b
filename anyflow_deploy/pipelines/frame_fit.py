"""Bring a frame to the size of a video: cropped, padded or stretched; or refuse another size.

crop       scaled until it covers the size; what stands over is cut off evenly
pad        scaled until it fits into the size; the rest is the background
stretch    scaled to the size, in another aspect
None       taken as it is, and refused in any other size
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.pipelines.frame_display import (
    BLACK,
    STORED,
    Color,
    Orientation,
    shown_size,
    without_alpha,
)

Fit = Literal["crop", "pad", "stretch"]
FITS: tuple[str, ...] = get_args(Fit)


@dataclass(frozen=True)
class FrameFit:
    """How frames become frames of one size.

    Attributes:
        height, width: of the result, in pixels.
        mode: see the module.
        background: behind transparent pixels, and around padded frames.
        max_upscale: frames that would be scaled up by more are refused.
    """

    height: int
    width: int
    mode: Fit | None = None
    background: Color = BLACK
    max_upscale: float | None = None

    def check(self, name: str, size: tuple[int, int]) -> None:
        """Check the height and width of frames, as shown.

        Raises:
            AnyFlowError: another size where none may be changed, or much too small.
        """
        wanted = (self.height, self.width)
        if self.mode is None and size != wanted:
            raise AnyFlowError(
                f"{name} is {format_size(size)} and the requested video is {format_size(wanted)}"
                " (height x width). Choose --height and --width, or let it be scaled with --fit"
                f" {', '.join(FITS[:-1])} or {FITS[-1]}."
            )
        rows, columns = self.scaled_size(size)
        if self.max_upscale and max(rows / size[0], columns / size[1]) > self.max_upscale + 0.01:
            raise AnyFlowError(
                f"{name} is {format_size(size)}, too small for {format_size(wanted)}."
            )

    def scaled_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size to which a frame of `size` is scaled, before it is cut or padded."""
        height, width = self.height, self.width
        ratios = (height / size[0], width / size[1])
        if self.mode == "crop":
            scale = max(ratios)
            return max(height, round(size[0] * scale)), max(width, round(size[1] * scale))
        if self.mode == "pad":
            scale = min(ratios)
            return (
                max(1, min(height, round(size[0] * scale))),
                max(1, min(width, round(size[1] * scale))),
            )
        return height, width

    def fit_frame(
        self,
        frame: Any,
        name: str,
        orientation: Orientation = STORED,
        aspect: Fraction | None = None,
    ) -> NDArray[np.uint8]:
        """Turn a decoded `av.VideoFrame` into pixels as shown, uint8 (height, width, 3).

        Args:
            frame: of any pixel format.
            name: for messages.
            orientation: how it is turned.
            aspect: of its pixels, see `shown_size`.

        Raises:
            AnyFlowError: see `check`.
        """
        size = shown_size(frame.height, frame.width, orientation, aspect)
        self.check(name, size)
        rows, columns = orientation.turn_size(self.scaled_size(size))
        frame = without_alpha(frame, self.background)
        options = {}
        if (rows, columns) != (frame.height, frame.width):
            options = {"width": columns, "height": rows, "interpolation": "BICUBIC"}
        return self._place(orientation.apply(frame.to_ndarray(format="rgb24", **options)))

    def fit_pixels(self, pixels: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
        """Bring pixels, uint8 (h, w, 3) as shown, to the size.

        Raises:
            AnyFlowError: see `check`.
        """
        import av

        if pixels.shape[:2] == (self.height, self.width):
            return pixels
        self.check(name, (pixels.shape[0], pixels.shape[1]))
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        return self.fit_frame(frame, name)

    def _place(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Cut or pad scaled pixels evenly."""
        rows, columns = pixels.shape[:2]
        top, left = abs(rows - self.height) // 2, abs(columns - self.width) // 2
        if self.mode != "pad":
            return pixels[top : top + self.height, left : left + self.width]
        result = np.empty((self.height, self.width, 3), np.uint8)
        result[:] = self.background
        result[top : top + rows, left : left + columns] = pixels
        return result


def format_size(size: tuple[int, ...]) -> str:
    """Write a height and width, as `480 x 832`."""
    return f"{size[0]} x {size[1]}"
