"""The compute capabilities of TensorRT for RTX. Needs the standard library alone, for the doctor.

Version 1.7.1 knows 7.5, 8.0, 8.6, 8.9, 12.0 and 12.1. Our graphs do not build for 7.5 (it refuses
the float32 convolution over three axes that embeds patches). A portable plan says of itself that it
runs on 8.0, 8.6, 8.9, 12.0, 12.1 and all after 12.0: so a data-centre GPU of 9.0 or 10.0 opens none
(seen on an H200), and neither does a Jetson (8.7, 11.0).
"""

from __future__ import annotations

SUPPORTED = ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
"""Those that a build can name."""

SUPPORTED_TEXT = ", ".join("{}.{}".format(*pair) for pair in SUPPORTED) + " and later"
"""For messages."""


def is_supported(compute_capability: tuple[int, ...]) -> bool:
    """Return whether TensorRT for RTX opens plans on a GPU of this compute capability.

    Args:
        compute_capability: NVIDIA's (major, minor).
    """
    return compute_capability in SUPPORTED or compute_capability > (12, 0)
