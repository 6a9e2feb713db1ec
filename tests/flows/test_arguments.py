"""Values of arguments: what is taken, and what argparse's error then says is expected."""

import argparse
from collections.abc import Callable
from typing import Any

import pytest

from flows.arguments import count, count_or_best, counts, not_negative, port, positive, scenario


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (count, "3", 3),
        (count_or_best, "best", None),
        (count_or_best, "64", 64),
        (counts, "1,8,1", (1, 8)),
        (positive, "0.5", 0.5),
        (not_negative, "0", 0.0),
        (port, "0", 0),
        (port, "65535", 65_535),
        (scenario, "128/1024", "128/1024"),
    ],
)
def test_values_are_taken(parse: Callable[[str], Any], text: str, value: object) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "texts", "expected"),
    [
        (count, ("0", "-1", "1.5", "many", "", "1,2"), "a number of at least 1"),
        (count_or_best, ("0", "worst"), "a number of at least 1, or best"),
        (counts, ("0", "1,", "1;8", ""), "numbers of at least 1 with commas between"),
        (positive, ("0", "-1", "inf", "nan", "much"), "a number above 0"),
        (not_negative, ("-0.1", "inf", "nan", "cold"), "a number from 0"),
        (port, ("65536", "-1", "http"), "a port: a number from 1 to 65535, or 0 for any"),
        (scenario, ("128", "128/", "0/128", "128x1024"), "INPUT/OUTPUT tokens, such as 128/1024"),
    ],
)
def test_what_is_expected_is_said(parse: Callable[[str], Any], texts: tuple[str, ...], expected: str) -> None:
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError) as refused:
            parse(text)
        assert str(refused.value).startswith(f"{text!r}: expected {expected}")
