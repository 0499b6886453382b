"""The flags that decide how many steps a video gets, as `StepSettings`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field

from anyflow_deploy.engines.step_policy import StepSettings

if TYPE_CHECKING:
    from anyflow_deploy.cli.generate_options import GenerateOptions


_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0}


def _parse_seconds(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(ms|s|m|min)\s*", value.lower())
    if match is None or not float(match[1]) > 0:
        raise ValueError(
            f"--deadline is {value!r}; allowed is a positive time with its unit, as 1500ms, 1.5s"
            " or 2m."
        )
    return float(match[1]) * _UNITS[match[2]]


Seconds = Annotated[float, BeforeValidator(_parse_seconds), Field(gt=0, allow_inf_nan=False)]
"""1500ms, 1.5s or 2m. A number without a unit, in seconds, is for Python only."""


Decibels = Annotated[
    float,
    BeforeValidator(
        lambda v: v.strip().lower().removesuffix("db").strip() if isinstance(v, str) else v
    ),
    Field(gt=0),
]
"""30, 30dB or "30 dB"."""


_FLAGS = {
    "num_inference_steps": "--steps",
    "deadline_s": "--deadline",
    "target_psnr": "--target-quality",
    "num_frames": "--frames",
}


def flag_name(field: str) -> str:
    """Turn a field of a request into the flag that sets it, such as `--first-steps`."""
    return _FLAGS.get(field, f"--{field.replace('_', '-')}")


def step_settings(options: GenerateOptions) -> StepSettings:
    """Read the flags that decide the steps.

    Raises:
        InvalidRequestError: flags that contradict each other; it names which to leave out.
    """
    settings = StepSettings(
        num_inference_steps=options.steps,
        first_steps=options.first_steps,
        shift=options.shift,
        sigmas=options.sigmas,
        deadline_s=options.deadline,
        target_psnr=options.target_quality,
    )
    settings.check(flag_name)
    return settings
