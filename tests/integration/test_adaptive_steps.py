"""Quality in place of a number of steps, on a flow whose error is known, and on engines."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from anyflow_deploy import AdaptiveSteps, AnyFlowError, Schedule, load_engine, noise, sample, stream
from anyflow_deploy.engines.adaptive_steps import AdaptiveResult, ReuseFirstChunkSteps
from anyflow_deploy.engines.metrics import difference
from anyflow_deploy.schedule import Step
from tests.conftest import SMALL, Export

Array = NDArray[np.float32]


class Decay:
    """dz/dt = z / 1000, whose flow from t to r is a factor exp((r - t) / 1000), jumped with an
    error of the jump's square."""

    def __init__(self, wrong: float) -> None:
        self.z, self.wrong = np.linspace(-1, 1, 64), wrong

    def step(self, t: float, r: float) -> None:
        jump = (t - r) / 1000
        self.z = self.z * math.exp(-jump) * (1 + self.wrong * jump**2)

    def read(self) -> Array:
        return self.z.astype(np.float32)

    def __enter__(self) -> Decay:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Constant(Decay):
    """A run whose steps change nothing."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def step(self, t: float, r: float) -> None:
        pass


def decayed(
    wrong: float, policy: Schedule | AdaptiveSteps, steps: list[Step] | None = None
) -> Array:
    seen: list[Step] = [] if steps is None else steps
    return policy.run(lambda: Decay(wrong), (64,), seen.append)  # type: ignore[arg-type, return-value]


LIMIT = (np.linspace(-1, 1, 64) * math.exp(-1)).astype(np.float32)


@given(
    wrong=st.floats(1e-4, 1), target=st.floats(1, 54), shift=st.floats(0.5, 8)
)  # 512 steps reach 55 dB at the worst
def test_the_estimate_bounds_a_known_error_and_its_cost_is_counted(
    wrong: float, target: float, shift: float
) -> None:
    picks, steps = list[AdaptiveResult](), list[Step]()
    made = decayed(wrong, AdaptiveSteps(target, shift, max_steps=1000, on_end=picks.append), steps)
    (pick,) = picks
    assert pick.reached and pick.difference.psnr_db >= target
    assert pick.transitions == len(steps) == 2 * pick.steps - 1
    np.testing.assert_array_equal(made, decayed(wrong, Schedule.uniform(pick.steps, shift)))
    if pick.steps > 2:
        assert pick.candidates[-2][1].psnr_db < target
    assert [n for n, _ in pick.candidates] == [2**k for k in range(1, len(pick.candidates) + 1)]
    coarse = decayed(wrong, Schedule.uniform(pick.steps // 2, shift))
    error, before, estimate = (
        float(np.linalg.norm(d)) for d in (made - LIMIT, coarse - LIMIT, coarse - made)
    )
    if error <= before / 2:  # what the estimate stands on, see the module
        assert error <= estimate + 1e-6
    if wrong <= 0.1 and pick.steps >= 16:
        # The first steps of a strongly shifted grid halve the error less.
        assert error <= 1.25 * estimate + 1e-6


@given(targets=st.lists(st.floats(1, 90), min_size=2, max_size=5), wrong=st.floats(1e-4, 1))
def test_a_higher_quality_never_takes_fewer_steps(targets: list[float], wrong: float) -> None:
    picks: list[AdaptiveResult] = []
    for target in sorted(targets):
        decayed(wrong, AdaptiveSteps(target, max_steps=64, on_end=picks.append))
    counts = [pick.steps for pick in picks]
    assert counts == sorted(counts)


@pytest.mark.parametrize(("most", "steps"), [(2, 2), (3, 2), (10, 8), (32, 32)])
def test_what_cannot_be_reached_ends_at_the_most(most: int, steps: int) -> None:
    picks: list[AdaptiveResult] = []
    decayed(0.9, AdaptiveSteps(200, max_steps=most, on_end=picks.append))
    assert (picks[0].steps, picks[0].reached) == (steps, False)


def test_a_sample_that_is_not_finite_ends_the_search() -> None:
    picks: list[AdaptiveResult] = []
    AdaptiveSteps(20, on_end=picks.append).run(lambda: Decay(math.nan), (64,), lambda step: None)  # type: ignore[arg-type, return-value]
    assert (picks[0].steps, picks[0].reached, picks[0].difference.not_finite) == (2, False, 64)


def test_equal_samples_are_as_good_as_any() -> None:
    picks: list[AdaptiveResult] = []
    AdaptiveSteps(200, on_end=picks.append).run(Constant, (4,), lambda step: None)  # type: ignore[arg-type]
    assert (picks[0].steps, picks[0].reached) == (2, True)


@pytest.mark.parametrize(
    ("db", "most"), [(0, 32), (-3, 32), (math.nan, 32), (math.inf, 32), (30, 1), (30, 1001)]
)
def test_impossible_qualities(db: float, most: int) -> None:
    with pytest.raises(AnyFlowError, match="allowed"):
        AdaptiveSteps(db, max_steps=most)


def test_on_the_golden_model(small_bundle: Export) -> None:
    """Steps grow with the target, and the estimate is near the distance to 64 steps (measured: 0.68
    to 1.4 times it).

    The network is the authors', its weights are random; docs/how-to/deadlines.md."""
    engine = load_engine(small_bundle())
    picks = list[AdaptiveResult]()
    a = engine.architecture
    latents = noise((1, 3, a.in_channels, 8, 12), 0)
    text = noise((1, 16, a.text_dim), 1)
    fine = sample(engine, latents, text, Schedule.uniform(64))
    for target in (30, 38, 40, 44):
        made = sample(engine, latents, text, AdaptiveSteps(target, on_end=picks.append))
        np.testing.assert_array_equal(
            made, sample(engine, latents, text, Schedule.uniform(picks[-1].steps))
        )
        assert 0.5 < picks[-1].difference.relative_l2 / difference(made, fine).relative_l2 < 2
    counts = [pick.steps for pick in picks]
    assert counts == sorted(counts) and len(set(counts)) == 4


def test_the_first_chunk_decides_for_all(export_once: Export) -> None:
    engine = load_engine(export_once(SMALL.parent / "causal"))
    picks = list[AdaptiveResult]()
    a = engine.architecture
    latents = noise((1, 7, a.in_channels, 8, 8), 0)
    text = noise((1, 4, a.text_dim), 1)
    ask = AdaptiveSteps(37, on_end=picks.append)
    made = list(stream(engine, latents, text, ReuseFirstChunkSteps(ask), chunk_plan=(1, 3, 3)))
    assert len(picks) == 1 and picks[0].reached and picks[0].steps > 2
    before = latents.copy()
    plain = list(
        stream(engine, latents, text, Schedule.uniform(picks[0].steps), chunk_plan=(1, 3, 3))
    )
    each = list(stream(engine, latents, text, ask, chunk_plan=(1, 3, 3)))
    for one, other in zip(made, plain, strict=True):
        np.testing.assert_array_equal(one.latents, other.latents)
    assert len(picks) == 1 + 3 and len(each) == 3
    np.testing.assert_array_equal(latents, before)
