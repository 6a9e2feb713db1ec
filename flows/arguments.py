"""Types of command-line arguments for argparse: each checks a text and returns its value, or says what is expected."""

import argparse
import math
import re

from pydantic import TypeAdapter, ValidationError

from storage.scenario import ScenarioText

LAST_PORT = 65_535


def count(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of at least 1")
    return int(text)


def count_or_best(text: str) -> int | None:
    """Read a whole number of at least 1; None for `best`."""
    if text == "best":
        return None
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of at least 1, or best")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Read whole numbers of at least 1 with commas between, without repetitions."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers of at least 1 with commas between, such as 1,8")
    return tuple(dict.fromkeys(map(int, parts)))


def positive(text: str) -> float:
    """Read a finite number above 0."""
    value = _finite(text)
    if value is None or value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return value


def not_negative(text: str) -> float:
    """Read a finite number of at least 0."""
    value = _finite(text)
    if value is None or value < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0")
    return value


def port(text: str) -> int:
    """Read a port; 0 for any that is free."""
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r:.40}: expected a port: a number from 1 to {LAST_PORT}, or 0 for any")
    return int(text)


def scenario(text: str) -> str:
    """Read input length / output length in tokens, such as 128/1024."""
    try:
        checked: str = TypeAdapter(ScenarioText).validate_python(text)
    except ValidationError:
        message = f"{text!r}: expected INPUT/OUTPUT tokens, such as 128/1024"
        raise argparse.ArgumentTypeError(message) from None
    return checked


def _finite(text: str) -> float | None:
    """Return the finite number that a text spells, None if it spells none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
