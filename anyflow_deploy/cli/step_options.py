"""The flags that decide how many steps a video gets, and the policy they ask for (`engines/step_policy.py`)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field

from anyflow_deploy.engines.adaptive_steps import Quality
from anyflow_deploy.engines.step_policy import MOST_FOR_A_QUALITY, MOST_UNDER_A_DEADLINE, Course, Fixed, InTime, ToQuality
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.schedule import Schedule

if TYPE_CHECKING:
    from anyflow_deploy.bundle.manifest import ScheduleDefaults
    from anyflow_deploy.cli.generate import GenerateOptions


_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0}


def _seconds(value: object) -> object:
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(ms|s|m|min)\s*", value.lower())
    if found is None or not float(found[1]) > 0:
        raise ValueError(f"--deadline is {value!r}; allowed is a positive time with its unit, as 1500ms, 1.5s or 2m.")
    return float(found[1]) * _UNITS[found[2]]


Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0, allow_inf_nan=False)]
"""1500ms, 1.5s or 2m; a bare number only from Python, in seconds."""


def course_of(options: GenerateOptions, defaults: ScheduleDefaults) -> Course:
    """What the flags ask for."""
    shift = options.shift or defaults.shift
    first = options.first_steps
    if options.deadline is not None:
        return InTime(options.deadline, shift, options.steps or MOST_UNDER_A_DEADLINE, first)
    if options.target_quality is not None:
        return ToQuality(Quality(options.target_quality, shift, options.steps or MOST_FOR_A_QUALITY))
    if options.sigmas is not None:
        return Fixed(Schedule.from_sigmas(options.sigmas))
    return Fixed(
        Schedule.uniform(options.steps or defaults.steps, shift), None if first is None else Schedule.uniform(first, shift)
    )


def check_course(options: GenerateOptions) -> None:
    """Refuse flags that contradict each other.

    Raises:
        AnyFlowError: naming which to leave out.
    """
    chosen = [name for name in ("sigmas", "deadline", "target_quality") if getattr(options, name) is not None]
    if len(chosen) > 1:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in chosen)
        raise AnyFlowError(f"{names} each decide how many steps there are; give one of them.")
    if options.sigmas is not None and (options.steps is not None or options.shift is not None):
        raise AnyFlowError("--sigmas is the whole schedule; leave out --steps and --shift.")
    if options.sigmas is not None and options.first_steps is not None:
        raise AnyFlowError("--sigmas is the whole schedule, of every chunk; leave out --first-steps.")
    if options.target_quality is not None and options.first_steps is not None:
        raise AnyFlowError("--target-quality is decided on the first chunk, and the others follow; leave out --first-steps.")
    if options.target_quality is not None and options.steps == 1:
        raise AnyFlowError("--target-quality compares one step with two, and --steps 1 allows one; allowed are 2 or more.")
