"""Deadlines, with a clock of the tests' own: never late by more than a transition, and always clean
at the end."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from anyflow_deploy import (
    AnyFlowError,
    Deadline,
    Schedule,
    StepTimer,
    load_engine,
    noise,
    sample,
    stream,
)
from anyflow_deploy.engines.deadline import DeadlineResult
from anyflow_deploy.schedule import Step, next_timestep
from tests.conftest import SMALL, Export

SHAPE = (1, 1, 1, 1, 1)


class Clockwork:
    """A run whose transitions take the seconds they are told, on a clock that only they move."""

    def __init__(self, durations: list[float]) -> None:
        self.now, self.durations = 0.0, list(durations)
        self.path: list[tuple[float, float]] = []
        self.drafts = 0

    def _pass(self) -> None:
        self.now += self.durations.pop(0) if len(self.durations) > 1 else self.durations[0]

    def step(self, t: float, r: float) -> None:
        self._pass()
        self.path.append((t, r))

    def velocity(self, t: ArrayLike, r: ArrayLike) -> NDArray[np.float32]:
        self._pass()
        self.drafts += 1
        return np.zeros(SHAPE, np.float32)

    def read(self) -> NDArray[np.float32]:
        return np.zeros(SHAPE, np.float32)

    def __enter__(self) -> Clockwork:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def walked(run: Clockwork, deadline: Deadline) -> None:
    deadline.run(lambda: run, SHAPE, lambda step: None)  # type: ignore[arg-type, return-value]


@settings(deadline=None)  # the first example also pays for imports
@given(
    seconds=st.floats(0.1, 100),
    durations=st.lists(st.floats(1.0, 2.0), min_size=1, max_size=30),
    known=st.booleans(),
    shift=st.floats(0.5, 12),
)
def test_late_by_at_most_one_transition_and_always_clean(
    seconds: float, durations: list[float], known: bool, shift: float
) -> None:
    run, step_timer = Clockwork(durations), StepTimer()
    if known:
        step_timer.record(SHAPE, 1.0)
    told: list[DeadlineResult] = []
    walked(
        run,
        Deadline(seconds, shift, step_timer=step_timer, on_end=told.append, clock=lambda: run.now),
    )
    assert [(o.seconds, o.deadline, o.slack) for o in told] == [
        (run.now, seconds, seconds - run.now)
    ]
    assert told[0].steps + told[0].probe_step == len(run.path) + run.drafts
    assert run.now <= seconds + max(durations)
    assert run.path or run.drafts == 1
    if run.path:
        assert run.path[0][0] == 1000.0 and run.path[-1][1] == 0.0
        assert all(a[1] == b[0] for a, b in zip(run.path, run.path[1:], strict=False))
        assert all(t > r for t, r in run.path)


@settings(deadline=None)  # the first example also pays for imports
@given(steps=st.integers(1, 50), shift=st.floats(0.5, 12))
def test_a_steady_pace_gives_the_uniform_schedule(steps: int, shift: float) -> None:
    run, step_timer = Clockwork([1.0]), StepTimer()
    step_timer.record(SHAPE, 1.0)
    walked(run, Deadline(steps + 0.5, shift, step_timer=step_timer, clock=lambda: run.now))
    expected = Schedule.uniform(steps, shift).transitions
    np.testing.assert_allclose(run.path, expected, rtol=1e-9, atol=1e-7)


def test_a_slow_transition_shortens_the_way() -> None:
    run, step_timer = Clockwork([1.0, 4.0, 1.0]), StepTimer()
    step_timer.record(SHAPE, 1.0)
    walked(run, Deadline(8.5, step_timer=step_timer, clock=lambda: run.now))
    # 8 were planned; after the slow one a second of 4 s might come
    assert len(run.path) == 3 and run.now == 6.0


def test_the_first_request_begins_with_a_draft() -> None:
    run, step_timer = Clockwork([1.0]), StepTimer()
    walked(run, Deadline(1.5, step_timer=step_timer, clock=lambda: run.now))
    assert (run.drafts, run.path, step_timer.seconds(SHAPE)) == (1, [], 1.0)
    walked(run, Deadline(3.5, step_timer=step_timer, clock=lambda: run.now))
    assert run.drafts == 1 and len(run.path) == 3


def test_the_best_sample_now() -> None:
    run, step_timer = Clockwork([1.0]), StepTimer()
    step_timer.record(SHAPE, 1.0)
    walked(
        run,
        Deadline(
            100, step_timer=step_timer, should_stop=lambda: run.now >= 2, clock=lambda: run.now
        ),
    )
    assert len(run.path) == 3 and run.path[-1][1] == 0.0


def test_enough_while_only_a_draft_exists() -> None:
    run, told = Clockwork([1.0]), list[DeadlineResult]()
    walked(run, Deadline(100, should_stop=lambda: True, on_end=told.append, clock=lambda: run.now))
    assert (run.drafts, run.path, told) == (1, [], [DeadlineResult(1, False, 1.0, 100)])


def test_another_thread_says_enough(small_bundle: Export) -> None:
    """The example of docs/how-to/deadlines.md."""
    engine = load_engine(small_bundle())
    now = threading.Event()
    seen = list[Step]()
    a = engine.architecture
    latents = noise((1, 3, a.in_channels, 8, 8), 0)
    text = noise((1, 4, a.text_dim), 1)

    def on_step(step: Step) -> None:
        seen.append(step)
        if step.index == 2:
            asker = threading.Thread(target=now.set)
            asker.start()
            asker.join()

    made = sample(
        engine, latents, text, Deadline(600, max_steps=900, should_stop=now.is_set), on_step
    )
    assert [(step.r == 0.0) for step in seen] == [False, False, False, True] and np.isfinite(
        made
    ).all()


def test_never_more_than_asked() -> None:
    run, step_timer = Clockwork([1e-9]), StepTimer()
    step_timer.record(SHAPE, 1e-9)
    walked(run, Deadline(100, max_steps=7, step_timer=step_timer, clock=lambda: run.now))
    assert len(run.path) == 7


@pytest.mark.parametrize(
    ("seconds", "most"), [(0, 50), (-1, 50), (float("nan"), 50), (1, 0), (1, 1001)]
)
def test_impossible_deadlines(seconds: float, most: int) -> None:
    with pytest.raises(AnyFlowError, match="allowed"):
        Deadline(seconds, max_steps=most)


def test_time_after_is_the_grid() -> None:
    times = Schedule.uniform(13).timesteps
    for index, t in enumerate(times[:-1]):
        assert next_timestep(t, 13 - index) == pytest.approx(times[index + 1], abs=1e-9)


def test_on_an_engine(small_bundle: Export) -> None:
    engine, seen = load_engine(small_bundle()), list[Step]()
    a = engine.architecture
    latents = noise((1, 3, a.in_channels, 8, 8), 0)
    text = noise((1, 4, a.text_dim), 1)
    step_timer = StepTimer()
    probe_step = sample(engine, latents, text, Deadline(1e-9, step_timer=step_timer))
    np.testing.assert_allclose(
        probe_step, sample(engine, latents, text, Schedule.uniform(1)), atol=1e-5
    )
    made = sample(
        engine, latents, text, Deadline(60, max_steps=4, step_timer=step_timer), seen.append
    )
    assert [step.steps for step in seen] == [4] * 4
    np.testing.assert_allclose(made, sample(engine, latents, text, Schedule.uniform(4)), atol=1e-5)


def test_every_chunk_has_its_own(export_once: Export) -> None:
    engine = load_engine(export_once(SMALL.parent / "causal"))
    step_timer = StepTimer()
    a = engine.architecture
    latents = noise((1, 7, a.in_channels, 8, 8), 0)
    text = noise((1, 4, a.text_dim), 1)
    made = list(
        stream(
            engine,
            latents,
            text,
            Deadline(60, max_steps=2, step_timer=step_timer),
            chunk_plan=(1, 3, 3),
        )
    )
    plain = list(stream(engine, latents, text, Schedule.uniform(2), chunk_plan=(1, 3, 3)))
    for one, other in zip(made, plain, strict=True):
        np.testing.assert_allclose(one.latents, other.latents, atol=1e-5)
