"""Read pictures as a viewer shows them: turned by their EXIF data, without alpha, in 8 bits.

Pillow reads them; what it does not know, PyAV may.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.pipelines.clips import ClipReader, open_readable
from anyflow_deploy.pipelines.frame_display import (
    BLACK,
    ORIENTATION_FROM_EXIF,
    STORED,
    Color,
    composite,
)
from anyflow_deploy.pipelines.frame_fit import FrameFit

_ORIENTATION_TAG = 274
_SHORT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")


def load_picture(
    source: Path | bytes | BinaryIO,
    fit: FrameFit | None = None,
    background: Color = BLACK,
    name: str | None = None,
) -> NDArray[np.uint8]:
    """Read a picture (png, jpg, webp, tiff, …), uint8 (1, height, width, 3).

    Args:
        source: a file, its bytes, or an open file. Of an animation, the first frame is read.
        fit: how it becomes a frame of one size, with a background of its own; None for its own
            size.
        background: behind transparent pixels, without `fit`.
        name: for messages; None for the path.

    Raises:
        AnyFlowError: no such file, none that can be decoded, or of a size that `fit` refuses.
    """
    from PIL import Image, UnidentifiedImageError

    name = name or (str(source) if isinstance(source, Path) else "the picture")
    if isinstance(source, Path):
        source = open_readable(source, "an image", name)
    color = fit.background if fit is not None else background
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            # Photos of 100 megapixels are no attack; Pillow refuses twice of what it warns of
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                pixels = pixels_from_image(image, color, name)
    except UnidentifiedImageError:
        return _load_with_pyav(source, fit, color, name)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).rstrip(".")
        raise AnyFlowError(f"{name} cannot be read as an image: {reason}.") from None
    return (pixels if fit is None else fit.fit_pixels(pixels, name))[None]


def pixels_from_image(image: Any, background: Color, name: str = "image") -> NDArray[np.uint8]:
    """Turn a `PIL.Image.Image` into pixels as shown, uint8 (height, width, 3).

    Args:
        image: of any mode but floats.
        background: behind transparent pixels.
        name: for messages.

    Raises:
        AnyFlowError: numbers that are no 8 or 16 bits.
        OSError: a file that is cut off or damaged.
    """
    image.load()
    if image.mode in (*_SHORT_MODES, "I"):
        pixels = _pixels_from_shorts(image, background, name)
    elif image.mode == "F":
        raise AnyFlowError(
            f"{name} has pixels of 32-bit floats; allowed are 8 to 16 bits. Save it so."
        )
    elif image.mode in ("RGBA", "LA", "La", "RGBa", "PA") or "transparency" in image.info:
        pixels = composite(np.asarray(image.convert("RGBA")), background)
    else:
        pixels = np.asarray(image.convert("RGB"))
    return np.ascontiguousarray(_orientation(image).apply(pixels))


def _pixels_from_shorts(image: Any, background: Color, name: str) -> NDArray[np.uint8]:
    """Turn grey of 16 bits into 8."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise AnyFlowError(
            f"{name} has grey values of {values.min()} to {values.max()}; allowed are 8 to 16 bits."
            " Save it so."
        )
    grey = ((values * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, axis=2)
    if isinstance(hidden := image.info.get("transparency"), int):
        pixels[values == hidden] = background
    return pixels


def _orientation(image: Any) -> Any:
    """Read the EXIF orientation; damaged EXIF data says nothing."""
    try:
        tag = image.getexif().get(_ORIENTATION_TAG, 1)
    except (OSError, SyntaxError, ValueError, KeyError):
        tag = 1
    return ORIENTATION_FROM_EXIF.get(tag, STORED)


def _load_with_pyav(
    source: Path | bytes | BinaryIO, fit: FrameFit | None, background: Color, name: str
) -> NDArray[np.uint8]:
    """Read the first frame of what Pillow does not know: a film, a picture of a rare kind."""
    try:
        with ClipReader(source, name) as clip:
            return clip.read_first(1, 1, fit or FrameFit(*clip.size, background=background))
    except AnyFlowError as error:
        raise AnyFlowError(str(error).replace("as a video", "as an image", 1)) from None
