"""Which shapes a bundle accepts.

Every axis of the transition graph that may vary has a `Range`; together they are the bundle's
`ShapeRanges`, declared at export, written into the manifest and checked before anything runs. Units
are those of the tensors: latent frames, latent rows and columns, text tokens. Helpers turn video
frames and pixels into latents with the VAE's factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from anyflow_deploy.errors import AnyFlowError, ShapeError
from anyflow_deploy.models import Architecture

AXES = ("batch", "frames", "height", "width", "text")


@dataclass(frozen=True)
class Range:
    """Whole numbers from `minimum` to `maximum` (None: no limit) in multiples of `multiple`."""

    minimum: int
    maximum: int | None
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.minimum < 1 or self.multiple < 1:
            raise AnyFlowError(f"range {self} starts below 1; sizes are positive whole numbers.")
        if self.maximum is not None and self.maximum < self.minimum:
            raise AnyFlowError(f"range {self} is empty: give the smaller number first, as in 1:21.")
        if self.minimum % self.multiple or (self.maximum or self.multiple) % self.multiple:
            raise AnyFlowError(f"range {self}: both ends have to be multiples of {self.multiple}.")

    def __contains__(self, value: int) -> bool:
        return (
            self.minimum <= value
            and (self.maximum is None or value <= self.maximum)
            and value % self.multiple == 0
        )

    def __str__(self) -> str:
        if self.minimum == self.maximum:
            return str(self.minimum)
        span = f"{self.minimum} to {'any' if self.maximum is None else self.maximum}"
        return span if self.multiple == 1 else f"{span} in multiples of {self.multiple}"

    def nearest(self, value: int) -> int:
        """Return the allowed number closest to `value`."""
        floor = max(self.minimum, round(value / self.multiple) * self.multiple)
        return floor if self.maximum is None else min(floor, self.maximum)


@dataclass(frozen=True)
class ShapeRanges:
    """The declared range of every dynamic axis.

    Attributes:
        batch: videos at once.
        frames, height, width: size of the latents.
        text: tokens of the prompt embedding.
    """

    batch: Range
    frames: Range
    height: Range
    width: Range
    text: Range

    def check(self, latents: Sequence[int], text: Sequence[int]) -> None:
        """Refuse shapes outside the ranges, naming the axis and the nearest size that fits.

        Args:
            latents: shape (B, F, C, H, W).
            text: shape (B, L, D).

        Raises:
            ShapeError: naming what was given and what is allowed.
        """
        if len(latents) != 5 or len(text) != 3:
            raise ShapeError(
                f"latents {tuple(latents)} and text {tuple(text)}: expected (batch, frames,"
                " channels, height, width) and (batch, tokens, channels). diffusers' (batch,"
                " channels, frames, …) needs a transpose first."
            )
        if text[0] != latents[0]:
            raise ShapeError(
                f"latents have batch {latents[0]} and text has batch {text[0]}: they must be equal."
            )
        sizes = dict(
            zip(AXES, (latents[0], latents[1], latents[3], latents[4], text[1]), strict=True)
        )
        for axis, size in sizes.items():
            allowed: Range = getattr(self, axis)
            if size not in allowed:
                raise ShapeError(
                    f"{axis} is {size}, but this bundle declares {axis} {allowed} (latent units);"
                    f" the nearest that fits is {allowed.nearest(size)}. Change the input, or"
                    " export with a wider range."
                )


def widest_ranges(architecture: Architecture) -> ShapeRanges:
    """Return all that patch sizes and rotary table allow.

    Nothing in the model limits batch or text length.

    A causal model's frames are those of one chunk. Its sides hold at least one of the coarser
    patches, and it makes one video at a time: every stream owns its cache.
    """
    table = architecture.rope_max_seq_len
    patch = architecture.patch_size[1]
    smallest = (architecture.compressed_patch_size or architecture.patch_size)[1]
    side = Range(smallest, patch * table, patch)
    return ShapeRanges(
        Range(1, 1 if architecture.causal else None), Range(1, table), side, side, Range(1, None)
    )


def narrow_ranges(base: ShapeRanges, ranges: dict[str, Range]) -> ShapeRanges:
    """Replace some axes of `base` by narrower ranges.

    Raises:
        AnyFlowError: a range that reaches outside `base`.
    """
    for axis, range_ in ranges.items():
        allowed: Range = getattr(base, axis)
        top_fits = allowed.maximum is None or (
            range_.maximum is not None and range_.maximum in allowed
        )
        steps_fit = range_.minimum == range_.maximum or range_.multiple % allowed.multiple == 0
        if range_.minimum not in allowed or not top_fits or not steps_fit:
            raise AnyFlowError(
                f"{axis} {range_} reaches outside what the model allows: {allowed} (latent units)."
            )
    return ShapeRanges(
        **{f.name: ranges.get(f.name, getattr(base, f.name)) for f in fields(ShapeRanges)}
    )


def parse_span(text: str, flag: str) -> tuple[int, int]:
    """Parse `"4"` to (4, 4) and `"1:4"` to (1, 4).

    Raises:
        AnyFlowError: anything else.
    """
    parts = text.split(":")
    if len(parts) > 2 or not all(p.strip().isdecimal() for p in parts):
        raise AnyFlowError(f"{flag} is {text!r}; allowed are one number (4) or a range (1:4).")
    numbers = [int(p) for p in parts]
    return numbers[0], numbers[-1]


def latent_frames(frames: int, temporal_factor: int) -> int:
    """Return the latent frames of a video.

    The VAE keeps the first frame and packs every `temporal_factor` that follow.

    Raises:
        ShapeError: unless `frames` is `temporal_factor * n + 1`.
    """
    if frames < 1 or (frames - 1) % temporal_factor:
        nearest = max(1, round((frames - 1) / temporal_factor) * temporal_factor + 1)
        raise ShapeError(
            f"frames is {frames}; allowed are {temporal_factor}n+1 (1, {temporal_factor + 1}, "
            f"{2 * temporal_factor + 1}, …). The nearest is {nearest}."
        )
    return (frames - 1) // temporal_factor + 1


def latent_side(pixels: int, spatial_factor: int, patch: int, axis: str) -> int:
    """Return the latent rows or columns of a video `pixels` high or wide.

    Raises:
        ShapeError: unless `pixels` is a multiple of `spatial_factor * patch` (16 for Wan).
    """
    unit = spatial_factor * patch
    if pixels < unit or pixels % unit:
        raise ShapeError(
            f"{axis} is {pixels}; allowed are multiples of {unit}. The nearest is"
            f" {max(unit, round(pixels / unit) * unit)}."
        )
    return pixels // spatial_factor
