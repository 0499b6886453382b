"""Schedules are promises about times: they fall, start at noise, end at clean, follow the published
shift formula, and everything else is refused with a sentence that names what was given."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.schedule import Schedule, shift_sigmas

STEPS = st.integers(1, 1000)
SHIFTS = st.floats(0.05, 50.0)


@given(STEPS, SHIFTS)
def test_uniform_falls_from_noise_to_clean(steps: int, shift: float) -> None:
    schedule = Schedule.uniform(steps, shift)
    assert schedule.steps == steps
    assert len(schedule.timesteps) == steps + 1
    assert math.isclose(schedule.timesteps[0], 1000.0, rel_tol=1e-12)
    assert schedule.timesteps[-1] == 0.0
    assert all(t > r for t, r in pairwise(schedule.timesteps))


@pytest.mark.parametrize("shift", [0.1, 0.2, 0.3, 1.4, 5.0])
def test_uniform_starts_at_exactly_1000(shift: float) -> None:
    assert Schedule.uniform(4, shift).timesteps[0] == 1000.0


@given(STEPS, SHIFTS)
def test_uniform_follows_the_shift_formula(steps: int, shift: float) -> None:
    for index, time in enumerate(Schedule.uniform(steps, shift).timesteps):
        s = 1 - index / steps
        assert math.isclose(
            time, 1000 * shift * s / (1 + (shift - 1) * s), rel_tol=1e-9, abs_tol=1e-9
        )


@given(STEPS)
def test_shift_1_is_no_shift(steps: int) -> None:
    expected = [1000 * (1 - index / steps) for index in range(steps)] + [0.0]
    assert Schedule.uniform(steps, shift=1.0).timesteps == pytest.approx(expected, rel=1e-12)


def test_released_grid_of_four_steps() -> None:
    assert Schedule.uniform(4).timesteps == pytest.approx(
        (1000.0, 937.5, 2500 / 3, 625.0, 0.0), rel=1e-12
    )


def test_transitions_are_the_neighbouring_pairs() -> None:
    assert Schedule.from_timesteps([1000, 600, 200]).transitions == (
        (1000.0, 600.0),
        (600.0, 200.0),
        (200.0, 0.0),
    )


@given(st.lists(st.floats(1e-3, 1000.0), min_size=1, max_size=20, unique=True))
def test_from_timesteps_uses_the_values_as_given(times: list[float]) -> None:
    falling = sorted(times, reverse=True)
    assert Schedule.from_timesteps(falling).timesteps == (*falling, 0.0)
    assert Schedule.from_timesteps([*falling, 0.0]) == Schedule.from_timesteps(falling)


@pytest.mark.parametrize("sigmas", [[1.0, 0.5], [1.0, 0.5, 0.0]])
@pytest.mark.parametrize(("shift", "middle"), [(1.0, 500.0), (3.0, 750.0)])
def test_from_sigmas_closes_and_shifts_only_when_asked(
    sigmas: list[float], shift: float, middle: float
) -> None:
    assert Schedule.from_sigmas(sigmas, shift).timesteps == (1000.0, middle, 0.0)
    assert Schedule.from_sigmas(iter(sigmas), shift) == Schedule.from_sigmas(sigmas, shift)


def test_from_sigmas_does_not_shift_by_default() -> None:
    assert Schedule.from_sigmas([0.9, 0.3]).timesteps == (900.0, 300.0, 0.0)


@given(st.floats(0.0, 1.0), SHIFTS)
def test_shifts_are_undone_by_their_inverse(s: float, shift: float) -> None:
    assert shift_sigmas(shift_sigmas([s], shift), 1 / shift) == pytest.approx([s], abs=1e-9)


@pytest.mark.parametrize("steps", [0, -1, 1001, True, False, 4.0, "4", None])
def test_uniform_refuses_steps(steps: object) -> None:
    with pytest.raises(
        AnyFlowError, match=rf"^steps is {steps!r}; allowed are whole numbers from 1 to 1000\.$"
    ):
        Schedule.uniform(steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("shift", [0.0, -5.0, math.nan, math.inf])
@pytest.mark.parametrize(
    "make",
    [lambda shift: Schedule.uniform(4, shift), lambda shift: Schedule.from_sigmas([1.0], shift)],
)
def test_shift_must_be_positive(make: Callable[[float], Schedule], shift: float) -> None:
    with pytest.raises(AnyFlowError, match=rf"^shift is {shift}; allowed is any positive number"):
        make(shift)


@pytest.mark.parametrize("shift", [1e-16, 1e-17, 1e-300])
def test_a_vanishing_shift_still_starts_at_1000(shift: float) -> None:
    with suppress(AnyFlowError):  # to refuse it would be right as well
        assert Schedule.uniform(2, shift).timesteps[0] == 1000.0


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([], r"at least one transition \(two timesteps\); given \[\]"),
        ([0.0], r"at least one transition \(two timesteps\); given \[0\.0\]"),
        ([500, 1000], r"must fall from noise to clean: number 1 is 1000\.0, after 500\.0"),
        ([1000, 500, 500], r"number 2 is 500\.0, after 500\.0"),
        ([1000, 0, 0], r"number 2 is 0\.0, after 0\.0"),
        ([1000, 0, 500], r"number 2 is 500\.0, after 0\.0"),
        ([1000.5, 500], r"timestep 0 is 1000\.5; allowed are 0 \(clean\) to 1000 \(noise\)"),
        ([1000, -1], r"timestep 1 is -1\.0; allowed"),
        ([1000, math.nan], r"timestep 1 is nan; allowed"),
        ([math.inf, 500], r"timestep 0 is inf; allowed"),
        (
            [1000 - i / 2 for i in range(1001)],
            r"a schedule of 1001 steps was given; allowed are 1 to 1000",
        ),
    ],
)
def test_from_timesteps_refuses(times: list[float], message: str) -> None:
    with pytest.raises(AnyFlowError, match=message):
        Schedule.from_timesteps(times)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([], r"at least one transition .*given \[\]"),
        ([1.0, 1.5], r"^sigma 1 is 1\.5; allowed are 0 \(clean\) to 1 \(noise\)"),
        ([1000, 500], r"^sigma 0 is 1000; allowed"),
        ([1.0, -0.1], r"^sigma 1 is -0\.1; allowed"),
        ([1.0, math.nan], r"^sigma 1 is nan; allowed"),
        ([0.5, 0.9], r"must fall from noise to clean: number 1 is 900\.0, after 500\.0"),
        ([0.5, 0.5], r"number 1 is 500\.0, after 500\.0"),
    ],
)
def test_from_sigmas_refuses(sigmas: list[float], message: str) -> None:
    with pytest.raises(AnyFlowError, match=message):
        Schedule.from_sigmas(sigmas)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ((), r"given \[\]"),
        ((1000.0,), r"given \[1000\.0\]"),
        ((1000.0, 500.0), r"^a schedule ends at 0 \(clean\); this one ends at 500\.0\.$"),
    ],
)
def test_the_class_itself_closes_nothing(times: tuple[float, ...], message: str) -> None:
    with pytest.raises(AnyFlowError, match=message):
        Schedule(times)
