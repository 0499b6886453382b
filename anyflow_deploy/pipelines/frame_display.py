"""Show a stored frame or picture as a viewer does: turned, mirrored, in its aspect, without alpha.

A camera that is held upright stores its rows sideways and writes beside them how to turn them: a
photo in its EXIF data (eight values), a clip in a display matrix. Anamorphic clips have pixels that
are not square. Transparent pixels have colours, too, which nobody has seen. Everything that reads
pictures or clips goes through here, so that all of them agree on what is to be seen.

Legend: h w rows and columns as stored; a size is (height, width) as shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyflow_deploy.errors import AnyFlowError

Color = tuple[int, int, int]
BLACK: Color = (0, 0, 0)

_OBLIQUE = 0.02
"""Part of a display matrix that may be off its axes: a turn of about one degree."""

_COMPOSITE_ROWS = 256


@dataclass(frozen=True)
class Orientation:
    """What turns stored rows into shown ones: first transpose, then mirror, then flip.

    Attributes:
        transpose: rows become columns.
        mirror: left and right change places.
        flip: top and bottom change places.
    """

    transpose: bool = False
    mirror: bool = False
    flip: bool = False

    def apply(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Turn (h, w, channels) into what is shown, a view."""
        if self.transpose:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if self.flip else 1, :: -1 if self.mirror else 1]

    def turn_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Turn a height and width; the same in both directions."""
        return (size[1], size[0]) if self.transpose else size

    def __str__(self) -> str:
        return _NAMES[self]


STORED = Orientation()

ORIENTATION_FROM_EXIF = {
    1: STORED,
    2: Orientation(mirror=True),
    3: Orientation(mirror=True, flip=True),
    4: Orientation(flip=True),
    5: Orientation(transpose=True),
    6: Orientation(transpose=True, mirror=True),
    7: Orientation(transpose=True, mirror=True, flip=True),
    8: Orientation(transpose=True, flip=True),
}
"""The values of EXIF's tag 274, Orientation."""

_NAMES = dict(
    zip(
        ORIENTATION_FROM_EXIF.values(),
        (
            "as stored",
            "mirrored",
            "turned by 180 degrees",
            "flipped",
            "turned by 90 degrees and mirrored",
            "turned by 90 degrees",
            "turned by 270 degrees and mirrored",
            "turned by 270 degrees",
        ),
        strict=True,
    )
)


def orientation_from_matrix(matrix: Sequence[int], name: str) -> Orientation:
    """Read a display matrix: nine numbers (a b u, c d v, x y w), as in ISO 14496-12.

    A stored point (x, y) is shown at (a x + c y, b x + d y), y pointing down.

    Args:
        matrix: the numbers; their scale does not matter.
        name: of the clip, for the message.

    Raises:
        AnyFlowError: it turns by something between quarters.
    """
    a, b, c, d = (float(matrix[place]) for place in (0, 1, 3, 4))
    straight = abs(a) + abs(d)
    crossed = abs(b) + abs(c)
    if straight + crossed == 0:  # written by some tools for "nothing"
        return STORED
    if min(straight, crossed) > _OBLIQUE * max(straight, crossed):
        angle = math.degrees(math.atan2(b, a))
        raise AnyFlowError(
            f"{name} is to be shown turned by {angle:.0f} degrees; allowed are quarter turns and"
            " mirror images. Turn it with a video editor and save it again."
        )
    if crossed > straight:
        return Orientation(transpose=True, mirror=c < 0, flip=b < 0)
    return Orientation(mirror=a < 0, flip=d < 0)


def orientation_from_frame(frame: Any, name: str) -> Orientation:
    """Read the display matrix of a decoded `av.VideoFrame`; without one it is shown as stored.

    Raises:
        AnyFlowError: see `orientation_from_matrix`.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return STORED
    return orientation_from_matrix(np.frombuffer(bytes(data), np.int32).tolist(), name)


def shown_size(
    height: int, width: int, orientation: Orientation, aspect: Fraction | None = None
) -> tuple[int, int]:
    """Return the height and width of a frame as shown.

    Args:
        height, width: as stored.
        orientation: of the frame.
        aspect: width of a stored pixel by its height; None or 0 for square ones. The width is
            scaled by it, as players do.
    """
    return orientation.turn_size((height, max(1, round(width * (aspect or 1)))))


def composite(pixels: NDArray[np.uint8], background: Color) -> NDArray[np.uint8]:
    """Put pixels with alpha, uint8 (h, w, 4), on a colour; returns uint8 (h, w, 3).

    Alpha is straight: colours are not multiplied by it yet.
    """
    result = np.empty((*pixels.shape[:2], 3), np.uint8)
    for top in range(0, len(pixels), _COMPOSITE_ROWS):  # 16 bits of a few rows at a time
        rows = pixels[top : top + _COMPOSITE_ROWS].astype(np.uint16)
        color, alpha = rows[..., :3], rows[..., 3:]
        behind = np.array(background, np.uint16) * (255 - alpha)
        result[top : top + _COMPOSITE_ROWS] = (color * alpha + behind + 127) // 255
    return result


def without_alpha(frame: Any, background: Color) -> Any:
    """Return an `av.VideoFrame` without alpha: itself if it has none, else put on a colour."""
    import av

    pixel_format = frame.format
    has_alpha = pixel_format.has_palette or any(c.is_alpha for c in pixel_format.components)
    if not has_alpha:
        return frame
    pixels = composite(frame.to_ndarray(format="rgba"), background)
    return av.VideoFrame.from_ndarray(pixels, format="rgb24")


def parse_color(text: str) -> Color:
    """Read a colour: a name as CSS has it, or `#rrggbb`.

    Raises:
        AnyFlowError: neither.
    """
    if text == "black":
        return BLACK
    from PIL import ImageColor

    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except ValueError:
        raise AnyFlowError(
            f"background is {text!r}; allowed are the names of CSS, such as white, and #rrggbb."
        ) from None
    return red, green, blue
