"""JSON files that one command writes and another reads: calibrations, sensitivities, reports.

Written whole or not at all, and read suspiciously. The bundle's manifest has a reader of its own (`bundle.py`), since a
bundle is more than one file.

This module imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from anyflow_deploy.errors import AnyFlowError

Record = TypeVar("Record", bound=BaseModel)


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and rename it there; what cannot be finished leaves nothing."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load_record(path: Path, kind: type[Record], schema: int, make: str) -> Record:
    """Read a file that `write_whole` wrote.

    Args:
        path: the file.
        kind: of its contents; a model with the field `schema`.
        schema: the one that this version reads.
        make: the command that makes such a file.

    Raises:
        AnyFlowError: not there, not readable, not such a file, or of another schema.
    """
    what = kind.__name__.lower()
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise AnyFlowError(f"{path} does not exist. Make one: {make}.") from None
    except OSError as error:
        raise AnyFlowError(f"{path} cannot be read: {error.strerror}. Give a file that {make.split()[0]} wrote.") from None
    found = _schema(text)
    if found != schema:
        advice = "Update anyflow_deploy" if found > schema else f"Make another: {make}"
        raise AnyFlowError(f"{path} has {what} schema {found}; this version reads {schema}. {advice}.")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise AnyFlowError(f"{path} is no usable {what}: {where}: {first['msg'].lower()}. Make another: {make}.") from None


def _schema(text: bytes) -> int:
    """The schema a file says it has: 1 where it says nothing, and the model's own check will find what else is wrong."""
    try:
        found = json.loads(text)["schema"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 1
    return found if isinstance(found, int) else 1
