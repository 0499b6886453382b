"""The base of every part of a profile: frozen, and strict about its values."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ProfileRecord(BaseModel):
    """Base of the records: unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )
