"""JSON files that one command writes and another reads: calibrations, sensitivities, reports.

Written whole or not at all, and read suspiciously. The bundle's manifest has a reader of its own (`bundle.py`), since a
bundle is more than one file.

This module imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from anyflow_deploy.errors import AnyFlowError

Record = TypeVar("Record", bound=BaseModel)
_Self = TypeVar("_Self", bound="FrozenRecord")


class FrozenRecord(BaseModel):
    """Base of what such files hold: frozen, strict about types, without unknown keys.

    A `functools.cached_property` of a record is neither compared nor written, and not copied.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    def model_copy(self: _Self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> _Self:
        """Return a copy with other values, without what was computed from the old ones.

        Args:
            update: field -> its new value, which is not checked.
            deep: copy the values, too.
        """
        copied = super().model_copy(update=update, deep=deep)
        for name in vars(copied).keys() - type(copied).model_fields.keys():
            del vars(copied)[name]
        return copied


def load_record(path: Path, kind: type[Record], schema: int, make: str) -> Record:
    """Read a file that `write_text_atomically` wrote.

    Args:
        path: the file.
        kind: of its contents; a model with the field `schema`.
        schema: the one that this version reads.
        make: the command that makes such a file.

    Raises:
        AnyFlowError: not there, not readable, not such a file, or of another schema.
    """
    noun = kind.__name__.lower()
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise AnyFlowError(f"{path} does not exist. Make one: {make}.") from None
    except OSError as error:
        raise AnyFlowError(f"{path} cannot be read: {error.strerror}. Give a file that {make.split()[0]} wrote.") from None
    found = _read_schema(text)
    if found != schema:
        advice = "Update anyflow_deploy" if found > schema else f"Make another: {make}"
        raise AnyFlowError(f"{path} has {noun} schema {found}; this version reads {schema}. {advice}.")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise AnyFlowError(f"{path} is no usable {noun}: {where}: {first['msg'].lower()}. Make another: {make}.") from None


def _read_schema(text: bytes) -> int:
    """The schema a file says it has: 1 where it says nothing, and the model's own check will find what else is wrong."""
    try:
        found = json.loads(text)["schema"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 1
    return found if isinstance(found, int) else 1
