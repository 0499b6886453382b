"""The video that is made where a request does not say how long or how large it shall be.

It is the bundle's own, as long as the server's limits allow that. Where they do not, it is the
longest and largest that they allow, at the bundle's aspect where that can be had, so that a request
that names only a prompt is never refused for a size that its client did not choose.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.pipelines.request import GenerationRequest, Naming
from anyflow_deploy.serving.limits import Limits

Size = tuple[int, int, int]
"""Frames, height and width."""


def default_video(manifest: Manifest, limits: Limits, name: Naming = str) -> Size:
    """Choose frames, height and width of a video whose request names none.

    Args:
        manifest: of the bundle.
        limits: of the server.
        name: what the user calls a limit, for the messages.

    Returns:
        Frames, height (pixels) and width (pixels).

    Raises:
        AnyFlowError: a limit below everything that the bundle makes, with the smallest that works.
    """
    video = manifest.video
    height, width = video.height, video.width
    if height * width > limits.pixels:
        sizes = [(video.frames, *sides) for sides in (*_at_aspect(manifest), *_below(manifest))]
        _, height, width = _first_that_fits(
            manifest,
            [size for size in sizes if size[1] * size[2] <= limits.pixels],
            f"{name('max_pixels')} is {limits.pixels:,}; the smallest picture of this bundle"
            " has {pixels:,} pixels ({size}). Allow at least that.",
            sorted(sizes, key=lambda size: size[1] * size[2]),
        )
    frames = video.frames
    if frames > limits.frames:
        lengths = range(1, video.frames + 1, video.temporal_factor)
        videos = [(count, height, width) for count in reversed(lengths)]
        frames, _, _ = _first_that_fits(
            manifest,
            [size for size in videos if size[0] <= limits.frames],
            f"{name('max_frames')} is {limits.frames}; the shortest video of this bundle has"
            " {frames} frames. Allow at least that.",
            videos[::-1],
        )
    return frames, height, width


def _at_aspect(manifest: Manifest) -> Iterator[tuple[int, int]]:
    """Heights and widths below the bundle's own, at its aspect, the largest first."""
    video, unit = manifest.video, _pixels_of_a_patch(manifest)
    for width in range(video.width, 0, -unit):
        exact = width * video.height / video.width
        yield max(unit, int(exact // unit) * unit), width


def _below(manifest: Manifest) -> list[tuple[int, int]]:
    """All heights and widths up to the bundle's own, the largest first."""
    video, unit = manifest.video, _pixels_of_a_patch(manifest)
    sides = [
        (height, width)
        for height in range(unit, video.height + 1, unit)
        for width in range(unit, video.width + 1, unit)
    ]
    return sorted(sides, key=lambda side: side[0] * side[1], reverse=True)


def _pixels_of_a_patch(manifest: Manifest) -> int:
    return manifest.video.spatial_factor * manifest.architecture.patch_size[1]


def _first_that_fits(
    manifest: Manifest, allowed: list[Size], refusal: str, upwards: Iterable[Size]
) -> Size:
    """Return the first allowed size that the bundle makes.

    Raises:
        AnyFlowError: none; the refusal names the smallest of `upwards` that it makes.
    """
    for size in allowed:
        if _fits(manifest, size):
            return size
    video = manifest.video
    own = (video.frames, video.height, video.width)  # which it makes by definition
    frames, height, width = next((size for size in upwards if _fits(manifest, size)), own)
    raise AnyFlowError(
        refusal.format(frames=frames, pixels=height * width, size=f"{width}x{height}")
    )


def _fits(manifest: Manifest, size: Size) -> bool:
    frames, height, width = size
    try:
        GenerationRequest.from_manifest(manifest, num_frames=frames, height=height, width=width)
    except AnyFlowError:
        return False
    return True
