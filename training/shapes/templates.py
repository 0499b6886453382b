"""Templates of the shapes, drawn as the videos draw them: masks that a reader compares with."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray

from anyflow_deploy.training.data.moving_shapes import distance_to_edge

_AREAS = {
    "circle": np.pi,
    "square": (2 * 0.85) ** 2,
    "triangle": 0.866 * 1.5,
    "ring": np.pi * (1 - 0.5**2),
}
"""Area of each shape of radius 1."""


def template_radius(shape: str, area: int) -> float:
    """Return the radius, in pixels, at which a shape has an area of so many pixels.

    Rounded to quarters of a pixel, so that few templates are drawn.
    """
    return float(round(4 * (area / _AREAS[shape]) ** 0.5) / 4)


@functools.lru_cache(maxsize=4096)
def template(shape: str, radius: float, height: int, width: int) -> NDArray[np.bool_]:
    """Draw a shape with its centre of mass in the middle of a mask, bool (height, width)."""
    rows = torch.arange(height, dtype=torch.float64)[:, None] - (height - 1) / 2
    columns = torch.arange(width, dtype=torch.float64)[None] - (width - 1) / 2
    mask: NDArray[np.bool_] = (distance_to_edge(shape, rows, columns, radius) < 0).numpy()
    return mask
