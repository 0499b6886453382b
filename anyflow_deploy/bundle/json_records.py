"""JSON files that one program writes and another reads: manifests, calibrations, reports.

They are written whole or not at all (`atomic_io`), and reading trusts nothing: an unknown key, a
value of another type and the schema of another version are refused by name.

This module imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from anyflow_deploy.errors import AnyFlowError

Record = TypeVar("Record", bound=BaseModel)
_Self = TypeVar("_Self", bound="FrozenRecord")


class FrozenRecord(BaseModel):
    """Base of what such files hold: frozen, strict about types, without unknown keys.

    A `functools.cached_property` of a record is neither compared nor written, and not copied.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    def model_copy(
        self: _Self, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> _Self:
        """Return a copy with other values, without what was computed from the old ones.

        Args:
            update: field -> its new value, which is not checked.
            deep: copy the values, too.
        """
        copy = super().model_copy(update=update, deep=deep)
        for name in vars(copy).keys() - type(copy).model_fields.keys():
            del vars(copy)[name]
        return copy

    def to_text(self) -> str:
        """Return the text of the record's file: indented JSON with the names of the file's
        keys."""
        return self.model_dump_json(indent=1, by_alias=True) + "\n"


@dataclass(frozen=True)
class RecordFormat(Generic[Record]):
    """One kind of JSON file, and what its errors say.

    Attributes:
        model: of the contents, with the field `schema`.
        schema: the one that this version reads.
        noun: what the file is, such as "manifest".
        remedy: what to do about one that is damaged or older, as a sentence.
        error: what is raised.
    """

    model: type[Record]
    schema: int
    noun: str
    remedy: str
    error: type[AnyFlowError] = AnyFlowError

    def parse(self, data: bytes, path: Path) -> Record:
        """Read the bytes of a file.

        Args:
            data: all of them.
            path: of the file, for the messages.

        Raises:
            AnyFlowError: not such a file, another schema, or an unknown key or a wrong value, which
                it names. Its class is `error`.
        """
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict) or "schema" not in content:
            article = "an" if self.noun[0] in "aeiou" else "a"
            raise self.error(
                f"{path} is not {article} {self.noun}: no JSON object with a 'schema'."
                f" {self.remedy}"
            )
        schema = content["schema"]
        if schema != self.schema:
            newer = isinstance(schema, int) and schema > self.schema
            advice = "Update anyflow_deploy." if newer else self.remedy
            raise self.error(
                f"{path} has {self.noun} schema {schema!r}; this version reads {self.schema}."
                f" {advice}"
            )
        try:
            return self.model.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))  # nowhere, if the keys do not go together
            where = f" at {place!r}" if place else ""
            cause = first["msg"][0].lower() + first["msg"][1:]
            raise self.error(f"{path} is damaged{where}: {cause}. {self.remedy}") from None


def load_record(path: Path, kind: type[Record], schema: int, make: str) -> Record:
    """Read a file that a command wrote for another one.

    Args:
        path: the file.
        kind: model of its contents, with the field `schema`.
        schema: the one that this version reads.
        make: the command that makes such a file.

    Raises:
        AnyFlowError: not there, not readable, not such a file, or of another schema.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise AnyFlowError(f"{path} does not exist. Make one: {make}.") from None
    except OSError as error:
        command = make.split()[0]
        raise AnyFlowError(
            f"{path} cannot be read: {error.strerror}. Give a file that {command} wrote."
        ) from None
    noun = kind.__name__.lower()
    return RecordFormat(kind, schema, noun, f"Make another: {make}.").parse(data, path)
