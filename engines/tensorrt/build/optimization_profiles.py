"""Optimization profiles: which shapes a TensorRT engine is built for, and which of them a call
falls into.

TensorRT chooses kernels for the shape in the middle of a profile and works for any between its
ends. A *use* is one video size, written `480x832x81` (height, width and frames in pixels and
frames; `:b2` adds a batch, `:t64` text tokens): it becomes a profile with fixed sides, the fastest.
One more profile can cover the bundle's declared ranges.

A causal model's graphs also take a cache of any length. Which lengths a video will need is found by
walking through it with the same `CacheStream` that makes it; chunks may be shorter and caches
emptier than that, so that windows and other chunk plans fit, too. A chunk without a past is a
profile of its own: nothing has to be fast for both an empty cache and a full one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.engines.engine import Array, Run
from anyflow_deploy.engines.kv_cache import cache_plan, fit_chunks
from anyflow_deploy.engines.streaming import CacheStream, Positions
from anyflow_deploy.errors import AnyFlowError, ShapeError
from anyflow_deploy.models import Architecture
from anyflow_deploy.shape_ranges import Range, latent_frames, latent_side

Shape = tuple[int, ...]
Sides = dict[str, int]
"""Length of every named axis."""

_VIDEO_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)((?::[bt]\d+)*)")


@dataclass(frozen=True)
class Profile:
    """Shapes of every input: the smallest, the one kernels are chosen for, and the largest."""

    name: str
    shapes: dict[str, tuple[Shape, Shape, Shape]]

    def holds(self, shapes: dict[str, Shape]) -> bool:
        """Whether every input of a call lies within."""
        return not self.distance(shapes)

    def distance(self, shapes: dict[str, Shape]) -> float:
        """How far outside a call is: the sum of the ratios, in logarithms, by which axes exceed or
        fall short."""
        total = 0.0
        for name, (low, _, high) in self.shapes.items():
            for length, smallest, largest in zip(shapes[name], low, high, strict=True):
                nearest = min(max(length, smallest), largest)
                total += abs(float(np.log((length + 1) / (nearest + 1))))
        return total

    def __str__(self) -> str:
        spans = []
        for name in [n for n in ("latents", "text", "past_key.0") if n in self.shapes]:
            low, _, high = self.shapes[name]
            axes = "x".join(
                str(a) if a == b else f"{a}..{b}" for a, b in zip(low, high, strict=True)
            )
            spans.append(f"{name} {axes}")
        return f"{self.name!r} ({', '.join(spans)})"


@dataclass(frozen=True)
class VideoShape:
    """One video size.

    Attributes:
        name: as it was written.
        batch: videos at once.
        frames, height, width: of the latents.
        text: tokens.
    """

    name: str
    batch: int
    frames: int
    height: int
    width: int
    text: int


def parse_video_shape(text: str, manifest: Manifest) -> VideoShape:
    """Read `480x832x81`, `480x832x81:b2` or `480x832x81:t64`.

    Raises:
        AnyFlowError: another form.
        ShapeError: a size that the VAE has no latents for, or outside the bundle's ranges.
    """
    match = _VIDEO_SHAPE.fullmatch(text.strip())
    if not match:
        raise AnyFlowError(
            f"--shapes is {text!r}; allowed is HEIGHTxWIDTHxFRAMES, as in 480x832x81, several with"
            " commas between. A batch is added as :b2, a number of text tokens as :t64."
        )
    height, width, frames = (int(number) for number in match.groups()[:3])
    extra = {part[0]: int(part[1:]) for part in match[4].split(":") if part}
    video, ranges = manifest.video, manifest.shape_ranges
    patch = manifest.architecture.patch_size[1]
    video_shape = VideoShape(
        text.strip(),
        extra.get("b", ranges.batch.minimum),
        latent_frames(frames, video.temporal_factor),
        latent_side(height, video.spatial_factor, patch, "height"),
        latent_side(width, video.spatial_factor, patch, "width"),
        extra.get("t", ranges.text.nearest(video.text_tokens)),
    )
    _check_video_shape(video_shape, manifest)
    return video_shape


def default_video_shape(manifest: Manifest) -> VideoShape:
    """The bundle's own video size."""
    video = manifest.video
    return parse_video_shape(f"{video.height}x{video.width}x{video.frames}", manifest)


def _check_video_shape(video_shape: VideoShape, manifest: Manifest) -> None:
    a, ranges = manifest.architecture, manifest.shape_ranges
    longest = (
        video_shape.frames
        if a.chunk_partition is None
        else max(fit_chunks(a.chunk_partition, video_shape.frames))
    )
    try:
        ranges.check(
            (video_shape.batch, longest, a.in_channels, video_shape.height, video_shape.width),
            (video_shape.batch, video_shape.text, a.text_dim),
        )
    except ShapeError as error:
        raise ShapeError(f"--shapes {video_shape.name}: {error}") from None


def profiles(
    manifest: Manifest, video_shapes: Sequence[VideoShape], ranges: bool
) -> dict[str, list[Profile]]:
    """Profiles of every graph, named uses first, since the first that holds a call is taken.

    Args:
        manifest: of the bundle.
        video_shapes: from `parse_video_shape`.
        ranges: whether to cover the declared ranges as well.

    Raises:
        AnyFlowError: the ranges have no end on some axis.
    """
    result: dict[str, list[Profile]] = {graph: [] for graph in manifest.graphs}
    for video_shape in video_shapes:
        for graph in manifest.graphs:
            result[graph] += _without_duplicates(
                result[graph], _profiles_for_shape(manifest, graph, video_shape)
            )
    if ranges:
        for graph in manifest.graphs:
            result[graph] += _without_duplicates(
                result[graph], _profiles_for_ranges(manifest, graph)
            )
    return result


def _without_duplicates(existing: list[Profile], candidates: list[Profile]) -> list[Profile]:
    """Two uses can ask the same of a small graph: the text's keys and values know no video size."""
    return [
        profile
        for profile in candidates
        if all(profile.shapes != other.shapes for other in existing)
    ]


def is_bounded(manifest: Manifest) -> bool:
    """Whether the declared ranges have an end on every axis."""
    return all(r.maximum is not None for r in vars(manifest.shape_ranges).values())


def _profiles_for_shape(manifest: Manifest, graph: str, video_shape: VideoShape) -> list[Profile]:
    sides = {
        "batch": video_shape.batch,
        "frames": video_shape.frames,
        "height": video_shape.height,
        "width": video_shape.width,
        "text": video_shape.text,
    }
    a = manifest.architecture
    if graph not in ("chunk", "compress"):
        return [_profile(manifest, graph, video_shape.name, sides, sides, sides)]
    calls = _trace_calls(a, video_shape.frames, video_shape.height, video_shape.width)[graph]
    return _profiles_by_past(manifest, graph, video_shape.name, sides, sides, sides, calls)


def _profiles_for_ranges(manifest: Manifest, graph: str) -> list[Profile]:
    """From one end of the declared ranges to the other; kernels are chosen for the bundle's own
    video size if it is inside."""
    spans: dict[str, Range] = vars(manifest.shape_ranges)
    for axis, span in spans.items():
        if span.maximum is None:
            raise AnyFlowError(
                f"the bundle's {axis} range has no end ({span}), so no profile can cover it. Name"
                " video sizes with --shapes, or export with ranges (anyflow-export --help lists"
                " the flags)."
            )
    typical = default_axis_sizes(manifest)
    low = {axis: span.minimum for axis, span in spans.items()}
    high = {axis: span.maximum or span.minimum for axis, span in spans.items()}
    middle = {axis: span.nearest(typical[axis]) for axis, span in spans.items()}
    if graph not in ("chunk", "compress"):
        return [_profile(manifest, graph, "ranges", low, middle, high)]
    a = manifest.architecture
    calls = _trace_calls(a, typical["video"], high["height"], high["width"])[graph]
    return _profiles_by_past(manifest, graph, "ranges", low, middle, high, calls)


def default_axis_sizes(manifest: Manifest) -> Sides:
    """Lengths of the bundle's own video size, wherever its ranges lie; "video" is all its latent
    frames."""
    video = manifest.video
    frames = latent_frames(video.frames, video.temporal_factor)
    height = video.height // video.spatial_factor
    width = video.width // video.spatial_factor
    return {
        "batch": 1,
        "frames": frames,
        "video": frames,
        "height": height,
        "width": width,
        "text": video.text_tokens,
    }


def _profiles_by_past(
    manifest: Manifest,
    graph: str,
    name: str,
    low: Sides,
    middle: Sides,
    high: Sides,
    calls: list[tuple[int, int]],
) -> list[Profile]:
    """One profile of calls without a past, one of those with. Calls are (latent frames, tokens of
    the past)."""
    result = []
    for label, group, smallest in (
        (f"{name} first", [c for c in calls if not c[1]], 0),
        (f"{name} later", [c for c in calls if c[1]], 1),
    ):
        if group:
            frames, pasts = [c[0] for c in group], [c[1] for c in group]
            typical = {"frames": Counter(frames).most_common(1)[0][0], "past": max(pasts)}
            largest = {"frames": max(c[0] for c in calls), "past": max(pasts)}
            result.append(
                _profile(
                    manifest,
                    graph,
                    label,
                    low | {"frames": 1, "past": smallest},
                    middle | typical,
                    high | largest,
                )
            )
    return result


def _profile(
    manifest: Manifest, graph: str, name: str, low: Sides, middle: Sides, high: Sides
) -> Profile:
    shapes = {}
    for tensor in manifest.graphs[graph].inputs:
        smallest, optimum, largest = (
            tuple(n if isinstance(n, int) else s[n] for n in tensor.shape)
            for s in (low, middle, high)
        )
        shapes[tensor.name] = (smallest, optimum, largest)
    return Profile(name, shapes)


def _trace_calls(
    a: Architecture, frames: int, height: int, width: int
) -> dict[str, list[tuple[int, int]]]:
    """What making one video asks of `chunk` and `compress`: (latent frames, tokens of the past), in
    order."""
    assert a.chunk_partition is not None
    plan = cache_plan(a, fit_chunks(a.chunk_partition, frames), height, width)
    recorder = _RecordingCache()
    stream = CacheStream(recorder, plan)
    for number, length in enumerate(plan.chunks):
        latents = np.zeros((1, length, 1, 1, 1), np.float32)
        stream.start(latents)
        if number + 1 < len(plan.chunks):
            stream.append(latents)
    return recorder.calls


class _RecordingCache:
    """A `streaming.Cache` that notes what is asked of it."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[int, int]]] = {"chunk": [], "compress": []}

    def run(self, latents: Array, positions: Positions, past: int) -> Run:
        self.calls["chunk"].append((latents.shape[1], past))
        return None  # type: ignore[return-value]  # nobody steps it

    def write(
        self, graph: str, latents: Array, positions: Positions, past: int, tokens: int
    ) -> None:
        self.calls[graph].append((latents.shape[1], past))

    def move(self, to: int, start: int, tokens: int) -> None: ...

    def grow(self, capacity: int) -> None: ...

    def close(self) -> None: ...


def select_profile(available: Sequence[Profile], shapes: dict[str, Shape], graph: str) -> int:
    """Number of the first profile that holds a call.

    Raises:
        ShapeError: none does; the nearest is named.
    """
    for index, profile in enumerate(available):
        if profile.holds(shapes):
            return index
    nearest = min(available, key=lambda profile: profile.distance(shapes))
    shapes_text = ", ".join(
        f"{name} {'x'.join(map(str, shapes[name]))}" for name in _size_inputs(shapes)
    )
    raise ShapeError(
        f"no profile of this engine's {graph!r} holds {shapes_text} (latent units); the nearest is"
        f" {nearest}. Build an engine with --shapes HEIGHTxWIDTHxFRAMES for this size, or change"
        " the input."
    )


def _size_inputs(shapes: Iterable[str]) -> list[str]:
    """The inputs that tell a call's size; t, r and the other layers repeat them."""
    return [name for name in shapes if name in ("latents", "text", "text_key.0", "past_key.0")]
