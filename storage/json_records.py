"""JSON files as frozen dataclass records: one reader for all of them, which says what is wrong with a file.

In: the path of a sealed JSON artifact and the type of its record. Out: the record, with the seal compared and every
field checked against its type; nested records, tuples and mappings included. Keys that the type does not have are
ignored.
"""

import functools
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from storage.files import DamagedFileError, read_sealed, to_run

Record = TypeVar("Record")


def read_record(path: Path, record: type[Record], rebuild: str) -> Record:
    """Read a sealed JSON file as a record of type `record`; `rebuild` names the command that makes the file.

    Raises:
        InputError: the file is missing.
        DamagedFileError: its content is not what was sealed, or a field is missing or has the wrong type.
    """
    return as_record(read_sealed(path, rebuild), record, str(path), rebuild)


def as_record(value: Any, record: type[Record], source: str, rebuild: str) -> Record:
    """Check a parsed JSON value against the type `record`; `source` names its file in messages.

    Raises:
        DamagedFileError: a field is missing or has another type than the record's.
    """
    try:
        checked: Record = _adapter(cast(Any, record)).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(_key, first["loc"])) or "(the whole file)"
        raise DamagedFileError(
            f"{source} does not hold what its stage writes: field {field}: {_reason(first)}; {to_run(rebuild)}"
        ) from error
    return checked


@functools.cache
def _adapter(record: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(record)


def _key(key: int | str) -> str:
    """Return a key of the file for a message of one line."""
    text = f"{key:.80}" if isinstance(key, str) else str(key)
    return text if text.isprintable() else ascii(text)


def _reason(error: ErrorDetails) -> str:
    """The expected type and the value in the file, or that the field is missing."""
    if error["type"] == "missing":
        return "it is missing"
    return f"{error['msg'].replace('Input', 'it')}, found {error['input']!r:.60}"
