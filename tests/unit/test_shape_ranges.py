"""Ranges decide which shapes an engine takes; a refusal names the axis, what was given, what is
allowed, and the nearest size that fits, in the units of the tensors. The helpers turn frames and
pixels into those units."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from anyflow_deploy.errors import AnyFlowError, ShapeError
from anyflow_deploy.models import MODELS
from anyflow_deploy.shape_ranges import (
    AXES,
    Range,
    ShapeRanges,
    latent_frames,
    latent_side,
    narrow_ranges,
    parse_span,
    widest_ranges,
)

DECLARED = ShapeRanges(
    Range(1, 2), Range(1, 21), Range(8, 60, 2), Range(8, 104, 2), Range(512, 512)
)
LATENTS, TEXT = (1, 5, 16, 32, 48), (1, 512, 64)


@st.composite
def ranges(draw: st.DrawFn) -> Range:
    multiple = draw(st.integers(1, 16))
    low = draw(st.integers(1, 20))
    high = draw(st.none() | st.integers(low, 60))
    return Range(low * multiple, None if high is None else high * multiple, multiple)


@given(ranges(), st.integers(-50, 1000))
def test_nearest_is_allowed_and_nothing_allowed_is_nearer(allowed: Range, value: int) -> None:
    nearest = allowed.nearest(value)
    distance = abs(nearest - value)
    assert nearest in allowed
    assert not [n for n in range(value - distance + 1, value + distance) if n in allowed]


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (Range(1, 4), [1, 4], [0, 5, -1]),
        (Range(2, None, 2), [2, 1000], [1, 3, 0]),
        (Range(8, 16, 8), [8, 16], [12, 24]),
        (Range(512, 512), [512], [511, 513]),
    ],
)
def test_membership(allowed: Range, inside: list[int], outside: list[int]) -> None:
    assert all(n in allowed for n in inside)
    assert not any(n in allowed for n in outside)


@pytest.mark.parametrize(
    ("allowed", "text"),
    [
        (Range(4, 4), "4"),
        (Range(1, 4), "1 to 4"),
        (Range(1, None), "1 to any"),
        (Range(2, 60, 2), "2 to 60 in multiples of 2"),
    ],
)
def test_ranges_read_as_prose(allowed: Range, text: str) -> None:
    assert str(allowed) == text


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 4, 1), r"range 0 to 4 starts below 1; sizes are positive whole numbers"),
        ((-2, None, 1), r"starts below 1"),
        ((1, 4, 0), r"starts below 1"),
        ((21, 1, 1), r"range 21 to 1 is empty: give the smaller number first, as in 1:21"),
        ((1, 0, 1), r"is empty"),
        ((3, 8, 2), r"both ends have to be multiples of 2"),
        ((2, 7, 2), r"both ends have to be multiples of 2"),
        ((3, None, 2), r"both ends have to be multiples of 2"),
    ],
)
def test_impossible_ranges_are_refused(numbers: tuple[int, int | None, int], message: str) -> None:
    with pytest.raises(AnyFlowError, match=message):
        Range(*numbers)


@pytest.mark.parametrize("latents", [LATENTS, (2, 1, 16, 8, 8), (2, 21, 16, 60, 104)])
def test_check_accepts_what_was_declared(latents: tuple[int, ...]) -> None:
    DECLARED.check(latents, (latents[0], 512, 64))


@pytest.mark.parametrize(
    ("latents", "text", "axis", "given_", "nearest"),
    [
        ((3, 5, 16, 32, 48), (3, 512, 64), "batch", 3, 2),
        ((0, 5, 16, 32, 48), (0, 512, 64), "batch", 0, 1),
        ((1, 22, 16, 32, 48), TEXT, "frames", 22, 21),
        ((1, 5, 16, 62, 48), TEXT, "height", 62, 60),
        ((1, 5, 16, 6, 48), TEXT, "height", 6, 8),
        ((1, 5, 16, 32, 200), TEXT, "width", 200, 104),
        (LATENTS, (1, 226, 64), "text", 226, 512),
    ],
)
def test_check_names_axis_and_nearest(
    latents: tuple[int, ...], text: tuple[int, ...], axis: str, given_: int, nearest: int
) -> None:
    allowed = re.escape(str(getattr(DECLARED, axis)))
    expected = (
        rf"^{axis} is {given_}, but this bundle declares {axis} {allowed} .*the nearest that fits"
        rf" is {nearest}\."
    )
    with pytest.raises(ShapeError, match=expected):
        DECLARED.check(latents, text)


@pytest.mark.parametrize("odd", [33, 47])
def test_check_offers_a_multiple(odd: int) -> None:
    with pytest.raises(
        ShapeError,
        match=rf"height is {odd}.*in multiples of 2.*nearest that fits is ({odd - 1}|{odd + 1})\.",
    ):
        DECLARED.check((1, 5, 16, odd, 48), TEXT)


@pytest.mark.parametrize(
    ("latents", "text", "message"),
    [
        (
            (1, 16, 32, 48),
            TEXT,
            r"latents \(1, 16, 32, 48\) .* expected \(batch, frames, channels, height, width\)",
        ),
        (
            LATENTS,
            (512, 64),
            (
                r"text \(512, 64\): expected .* diffusers' \(batch, channels, frames, …\) needs a"
                r" transpose"
            ),
        ),
        (LATENTS, (2, 512, 64), r"latents have batch 1 and text has batch 2: they must be equal"),
    ],
)
def test_check_refuses_shapes_that_do_not_belong_together(
    latents: tuple[int, ...], text: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        DECLARED.check(latents, text)


@pytest.mark.parametrize("model", MODELS)
def test_widest_is_limited_by_patch_and_rotary_table_alone(model: str) -> None:
    architecture = MODELS[model].architecture
    base = widest_ranges(architecture)
    table = architecture.rope_max_seq_len
    assert (base.batch, base.text) == (Range(1, 1 if architecture.causal else None), Range(1, None))
    assert base.frames == Range(1, table)
    # One coarse patch has to fit; the rest need not divide
    smallest = 4 if architecture.causal else 2
    assert base.height == base.width == Range(smallest, 2 * table, 2)


def test_widest_follows_the_patch() -> None:
    architecture = replace(MODELS["tiny"].architecture, patch_size=(1, 4, 4), rope_max_seq_len=10)
    assert widest_ranges(architecture).height == Range(4, 40, 4)


def test_narrowed_replaces_only_what_was_asked() -> None:
    wanted = {
        "batch": Range(1, 1),
        "frames": Range(3, 21),
        "height": Range(60, 60, 2),
        "text": Range(512, None),
    }
    base = widest_ranges(MODELS["tiny"].architecture)
    assert narrow_ranges(base, wanted) == replace(base, **wanted)
    assert narrow_ranges(base, {}) == base


@pytest.mark.parametrize("axis", AXES)
def test_narrowed_refuses_wider(axis: str) -> None:
    allowed = getattr(DECLARED, axis)
    wider = Range(allowed.minimum, allowed.maximum + allowed.multiple, allowed.multiple)
    message = (
        rf"^{axis} {re.escape(str(wider))} reaches outside what the model allows:"
        rf" {re.escape(str(allowed))}"
    )
    with pytest.raises(AnyFlowError, match=message):
        narrow_ranges(DECLARED, {axis: wider})


@pytest.mark.parametrize(
    ("axis", "wanted"),
    [
        ("frames", Range(1, None)),
        ("text", Range(1, 512)),
        ("height", Range(9, 9)),
        pytest.param("height", Range(8, 60), id="every-row"),
        pytest.param("height", Range(12, 60, 3), id="multiples-of-3"),
    ],
)
def test_narrowed_refuses_what_reaches_outside(axis: str, wanted: Range) -> None:
    with pytest.raises(AnyFlowError, match=rf"^{axis} .*reaches outside"):
        narrow_ranges(DECLARED, {axis: wanted})


@pytest.mark.parametrize(
    ("text", "span"), [("4", (4, 4)), ("1:4", (1, 4)), (" 1 : 81 ", (1, 81)), ("4:1", (4, 1))]
)
def test_parsed_span(text: str, span: tuple[int, int]) -> None:
    assert parse_span(text, "--frames") == span


@pytest.mark.parametrize(
    "text",
    # The last one was a reported defect.
    [
        "",
        ":",
        "1:",
        ":4",
        "1:2:3",
        "-4",
        "1.5",
        "a",
        "1-4",
        pytest.param("4²", id="superscript"),
    ],
)
def test_parsed_span_refuses(text: str) -> None:
    message = (
        rf"^--frames is {re.escape(repr(text))}; allowed are one number \(4\) or a range \(1:4\)\.$"
    )
    with pytest.raises(AnyFlowError, match=message):
        parse_span(text, "--frames")


@given(st.integers(1, 500), st.integers(1, 8))
def test_latent_frames_keeps_the_first_and_packs_the_rest(latent: int, factor: int) -> None:
    assert latent_frames((latent - 1) * factor + 1, factor) == latent


@given(st.integers(-10, 500))
def test_latent_frames_offers_the_nearest(frames: int) -> None:
    assume(frames < 1 or frames % 4 != 1)
    with pytest.raises(
        ShapeError,
        match=rf"^frames is {frames}; allowed are 4n\+1 \(1, 5, 9, …\)\. The nearest is \d+\.$",
    ) as caught:
        latent_frames(frames, 4)
    nearest = int(re.findall(r"\d+", str(caught.value))[-1])
    assert nearest % 4 == 1
    assert abs(nearest - frames) <= 2 or nearest == 1


@given(st.integers(1, 200))
def test_latent_side_takes_multiples_of_16(count: int) -> None:
    assert latent_side(16 * count, 8, 2, "height") == 2 * count


@pytest.mark.parametrize(
    ("pixels", "nearest"), [(0, 16), (-16, 16), (8, 16), (24, 32), (481, 480), (854, 848)]
)
@pytest.mark.parametrize("axis", ["height", "width"])
def test_latent_side_offers_the_nearest(axis: str, pixels: int, nearest: int) -> None:
    with pytest.raises(
        ShapeError,
        match=rf"^{axis} is {pixels}; allowed are multiples of 16\. The nearest is {nearest}\.$",
    ):
        latent_side(pixels, 8, 2, axis)
