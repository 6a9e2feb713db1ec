"""The time in which a computation waits for input that is read ahead (tasks/puzzle/model/ahead.py)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from tasks.puzzle.model.ahead import Ahead


@contextmanager
def waiting_counted() -> Iterator[list[float]]:
    """Yield a list of one number: the seconds of waiting so far."""
    waited, read = [0.0], Ahead.__next__

    def timed(ahead: Ahead[Any]) -> Any:
        start = time.perf_counter()
        try:
            return read(ahead)
        finally:
            waited[0] += time.perf_counter() - start

    with mock.patch.object(Ahead, "__next__", timed):
        yield waited
