"""Validation of an engine: two engines, the same inputs, compared against named thresholds.

There are two comparisons, because they fail differently. *Transitions*: along a path that the
reference itself takes from noise to clean, each state is sent from its time t to several targets r,
and the velocities are compared; this finds a wrong operator, and at which times it matters.
*Rollouts*: whole samples at several step counts are compared; this finds errors that add up. Both
engines start every transition from the reference's state.

For a causal model the comparison is made in a stream: transitions in its first chunk, which has no
past, and in its last, whose cache holds compressed and full chunks that each engine has written
itself, from the same clean latents.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anyflow_deploy.engines.engine import Array, Engine, Run
from anyflow_deploy.engines.kv_cache import cache_plan
from anyflow_deploy.engines.metrics import Difference, difference
from anyflow_deploy.engines.sampler import noise, sample, stream
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.progress import NullProgress, Progress
from anyflow_deploy.schedule import Schedule

REFERENCE_SCHEDULE = Schedule.from_timesteps((1000, 960, 860, 700, 500, 250, 60, 0))
"""The reference's path: transitions are compared at each of its times, from pure noise to nearly
clean. (The shifted grid of few steps would stay above 500.)"""

ROLLOUT_STEPS = (1, 2, 4, 8)

RunOpener = Callable[[Array], Run]
"""Opens a run from a state."""


@dataclass(frozen=True)
class Threshold:
    """The largest difference allowed of an engine, as relative L2, and the reason for it."""

    transition: float
    rollout: float
    reason: str


THRESHOLDS = {
    "fp32": Threshold(
        2e-5,
        2e-5,
        "another order of float32 sums: at most 9.6e-7 was measured (1.3B, 30 layers); 20 times"
        " that",
    ),
    "fp16": Threshold(
        5e-3,
        5e-3,
        "11 bits of mantissa: at most 5.4e-4 was measured (1.3B, 30 layers, random weights); 10"
        " times that",
    ),
    "bf16": Threshold(
        4e-2,
        4e-2,
        "8 bits of mantissa, 3 fewer than fp16: 8 times its threshold; not measured on a"
        " device yet",
    ),
    "int8": Threshold(
        8e-2,
        8e-2,
        "inputs and weights on 255 levels: at most 2.1e-2 was measured (tiny models); 4 times that",
    ),
    "fp8": Threshold(
        8e-2,
        8e-2,
        "4 bits of mantissa: at most 1.9e-2 was measured (tiny models); the same room as int8",
    ),
}
"""docs/how-to/validation.md has the measurements."""


@dataclass(frozen=True)
class Transition:
    """The difference between two velocities at one state.

    `kind` names the target: "next" on the path, "half" way, "clean" (r = 0), "same" (r = t), or
    "mixed": the first frame already clean, as when a video is continued. `chunk` is 0 where there
    is no other.
    """

    t: float
    r: float
    kind: str
    difference: Difference
    chunk: int = 0


@dataclass(frozen=True)
class Rollout:
    """The difference between two whole samples."""

    steps: int
    difference: Difference


@dataclass(frozen=True)
class Validation:
    """The result of comparing two engines.

    Attributes:
        candidate, reference: their descriptions.
        precision: of the candidate; it decides the thresholds.
        shape, text: of the inputs.
        chunks: latent frames of each chunk, of a causal model.
        seed: of the inputs.
        transitions, rollouts: the measurements.
    """

    candidate: str
    reference: str
    precision: str
    shape: tuple[int, ...]
    text: tuple[int, ...]
    chunks: tuple[int, ...] | None
    seed: int
    transitions: tuple[Transition, ...]
    rollouts: tuple[Rollout, ...]

    @property
    def threshold(self) -> Threshold:
        """The limits of this precision."""
        return THRESHOLDS[self.precision]

    @property
    def failures(self) -> list[str]:
        """Every measurement over its threshold, as a sentence; empty when the engine passed."""
        limit = self.threshold
        messages = []
        for item in self.transitions:
            if not item.difference.relative_l2 <= limit.transition:
                where = (
                    f"transition {item.t:.0f} ->"
                    f" {item.r:.0f}{f' of chunk {item.chunk}' if item.chunk else ''}"
                )
                messages.append(
                    f"{where}: {_describe_difference(item.difference)}, allowed"
                    f" {limit.transition:g}"
                )
        for rollout in self.rollouts:
            if not rollout.difference.relative_l2 <= limit.rollout:
                messages.append(
                    f"rollout of {rollout.steps} steps: {_describe_difference(rollout.difference)},"
                    f" allowed {limit.rollout:g}"
                )
        return messages

    def as_json(self) -> dict[str, Any]:
        """Return the contents of validation.json. Infinite and undefined numbers become null."""
        raw = dataclasses.asdict(self)
        raw["threshold"] = dataclasses.asdict(self.threshold)
        raw["failures"] = self.failures
        raw["passed"] = not self.failures
        return {key: json_safe(value) for key, value in raw.items()}


def validate(
    candidate: Engine,
    reference: Engine,
    precision: str,
    shape: Sequence[int],
    text_shape: Sequence[int],
    steps: Sequence[int] = ROLLOUT_STEPS,
    shift: float = 5.0,
    seed: int = 0,
    progress: Progress | None = None,
    chunks: Sequence[int] | None = None,
    text: Array | None = None,
) -> Validation:
    """Compare two engines of the same model, in single transitions and in whole samples.

    Args:
        candidate, reference: engines of the same model.
        precision: of the candidate, chooses the thresholds.
        shape: latents (B, F, C, H, W); small ones find the same errors as large ones.
        text_shape: prompt embeddings (B, L, D), standard normal.
        steps: step counts of the rollouts.
        shift: of their schedules.
        seed: of the latents and embeddings, standard normal.
        progress: shows the progress of the work.
        chunks: of a causal model: latent frames of each chunk.
        text: prompt embeddings in place of normal ones: a quantized engine is right only within its
            calibrated ranges.

    Raises:
        AnyFlowError: no threshold for the precision, or shapes that one of the engines refuses.
    """
    if precision not in THRESHOLDS:
        raise AnyFlowError(
            f"no thresholds for precision {precision!r}; there are some for"
            f" {', '.join(THRESHOLDS)}."
        )
    latents = noise(shape, seed)
    text = noise(text_shape, seed + 1) if text is None else text
    progress = progress or NullProgress()
    schedules = [Schedule.uniform(n, shift) for n in steps]
    inputs = Inputs(latents, text, None if chunks is None else tuple(chunks))
    with progress.stage(
        "transitions",
        REFERENCE_SCHEDULE.steps * (1 if chunks is None else len({0, len(chunks) - 1})),
    ) as advance:
        transitions = []
        for chunk, z, starts in _comparison_points(candidate, reference, inputs):
            for t, r, state in _reference_states(starts[1], z):
                transitions += [
                    _compare_transition(starts, state, t, *target, chunk)
                    for target in _target_times(t, r)
                ]
                advance(1)
    with progress.stage("rollouts", float(sum(steps))) as advance:
        rollouts = []
        for schedule in schedules:
            pair = [_sample_video(engine, inputs, schedule) for engine in (candidate, reference)]
            rollouts.append(Rollout(schedule.steps, difference(pair[0], pair[1])))
            advance(schedule.steps)
    return Validation(
        candidate.description,
        reference.description,
        precision,
        tuple(shape),
        text.shape,
        inputs.chunks,
        seed,
        tuple(transitions),
        tuple(rollouts),
    )


@dataclass(frozen=True)
class Inputs:
    """The inputs that both engines are given."""

    latents: Array
    text: Array
    chunks: tuple[int, ...] | None


def _sample_video(engine: Engine, inputs: Inputs, schedule: Schedule) -> Array:
    """Generate a whole sample."""
    if inputs.chunks is None:
        return sample(engine, inputs.latents, inputs.text, schedule)
    return np.concatenate(
        [c.latents for c in stream(engine, inputs.latents, inputs.text, schedule, inputs.chunks)],
        axis=1,
    )


def _comparison_points(
    candidate: Engine, reference: Engine, inputs: Inputs
) -> Iterator[tuple[int, Array, tuple[RunOpener, RunOpener]]]:
    """Yield each chunk to compare: its index, its noise, and what opens a run on each engine."""
    if inputs.chunks is None:
        yield (
            0,
            inputs.latents,
            (_run_opener(candidate, inputs.text), _run_opener(reference, inputs.text)),
        )
        return
    height, width = inputs.latents.shape[3:]
    plan = cache_plan(
        reference.architecture, inputs.chunks, height, width, text_tokens=inputs.text.shape[1]
    )
    clean = stream(reference, inputs.latents, inputs.text, Schedule.uniform(4), inputs.chunks)
    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(contextlib.closing(e.open_stream(inputs.text, plan)))
            for e in (candidate, reference)
        ]
        for index, chunk in enumerate(clean):
            if index in (0, len(plan.chunks) - 1):
                yield (
                    index,
                    inputs.latents[:, chunk.first_frame :][:, : plan.chunks[index]],
                    (streams[0].start, streams[1].start),
                )
            for kv_stream in streams[: 2 * (index + 1 < len(plan.chunks))]:
                kv_stream.append(chunk.latents)


def _run_opener(engine: Engine, text: Array) -> RunOpener:
    return lambda latents: engine.start(latents, text)


def _reference_states(start: RunOpener, latents: Array) -> list[tuple[float, float, Array]]:
    """Return the states the reference passes through, each with its time and the next."""
    states = []
    with start(np.ascontiguousarray(latents)) as run:
        for t, r in REFERENCE_SCHEDULE.transitions:
            states.append((t, r, run.read()))
            run.step(t, r)
    return states


def _target_times(t: float, r: float) -> list[tuple[float, str]]:
    """Return the target times of a state at `t`. The last step of the path goes to clean itself."""
    targets = [(t / 2, "half"), (0.0, "clean"), (t, "same"), (t / 2, "mixed")]
    return targets if r == 0.0 else [(r, "next"), *targets]


def _compare_transition(
    starts: tuple[RunOpener, RunOpener], state: Array, t: float, r: float, kind: str, chunk: int
) -> Transition:
    source = np.full(state.shape[:2], t, np.float32)
    target = np.full(state.shape[:2], r, np.float32)
    if kind == "mixed":
        source[:, 0] = target[:, 0] = 0.0
    velocities = []
    for start in starts:
        with start(state) as run:
            velocities.append(run.velocity(source, target))
    return Transition(t, r, kind, difference(velocities[0], velocities[1]), chunk)


def _describe_difference(d: Difference) -> str:
    return (
        f"{d.not_finite} elements are NaN or infinite"
        if d.not_finite
        else f"relative L2 {d.relative_l2:.2e}"
    )


def json_safe(value: Any) -> Any:
    """Copy a value of dicts, lists and numbers; infinite and undefined numbers become null."""
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, dict):
        return {k: json_safe(v) for k, v in value.items()}
    return [json_safe(v) for v in value] if isinstance(value, (list, tuple)) else value
