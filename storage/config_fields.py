"""Fields of a config.json that others write: each is read as its type and within bounds, or refused in one sentence.

The bounds lie far above every published model, and low enough that what is made of a config stays small.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from storage.files import InputError

MAX_BLOCKS = 10_000
MAX_VOCABULARY = 1 << 23
MAX_TOKENS = (1 << 31) - 1
_MAX_COUNT = 1 << 22
_MAX_NUMBER = 1e15


@dataclass(frozen=True)
class Fields:
    """An object of a config.json; `where` names it in errors."""

    values: Mapping[str, Any]
    where: str

    def inner(self, value: Any, name: str) -> Self:
        """Return an object within this one, called `name` in errors."""
        where = f"{self.where}: {name}"
        if not isinstance(value, Mapping):
            raise InputError(f"{where} is {shown(value)}, expected an object")
        return type(self)(value, where)

    def count(self, key: str, most: int = _MAX_COUNT, default: int | None = None) -> int:
        """Return a whole number from 1 to `most`; `default`, if there is one, where the field is null or missing."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise InputError(f"{self.where}: {key} is {shown(value)}, expected a whole number from 1 to {most:,}")
        return value

    def number(self, key: str, most: float = _MAX_NUMBER) -> float:
        """Return a number above 0, at most `most`."""
        value: Any = self.values.get(key)
        if not is_number(value) or not 0 < value <= most:
            raise InputError(f"{self.where}: {key} is {shown(value)}, expected a number above 0, at most {most:g}")
        return float(value)

    def switch(self, key: str, default: bool = False) -> bool:
        """Return true or false; `default` where the field is null or missing."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise InputError(f"{self.where}: {key} is {shown(value)}, expected true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """Return a text; `default` where the field is missing."""
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise InputError(f"{self.where}: {key} is {shown(value)}, expected a text")
        return value


def is_number(value: Any) -> bool:
    """Tell whether a value of JSON is a finite number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def shown(value: Any) -> str:
    """Return a value for people: short, however large it is."""
    return "missing or null" if value is None else reprlib.repr(value)
