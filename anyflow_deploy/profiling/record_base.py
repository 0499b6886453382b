"""What every part of a profile is: frozen, and strict about what it is read from."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ProfileRecord(BaseModel):
    """Unknown keys are refused, and so are numbers that are none."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )
