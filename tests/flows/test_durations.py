"""Durations in the unit that suits them."""

import pytest

from flows.durations import duration_text


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5939, "99 min"), (7500, "2 h 05 min")]
)
def test_the_unit_follows_the_length(seconds: float, expected: str) -> None:
    assert duration_text(seconds) == expected
