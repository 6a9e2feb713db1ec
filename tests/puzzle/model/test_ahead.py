"""Input that is read ahead: the same items in order, one before it is asked for, with the iterator's own error."""

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch

from tasks.puzzle.model.ahead import Ahead

CPU = torch.device("cpu")


def test_items_come_in_order_and_end() -> None:
    assert list(Ahead(iter(range(5)), CPU)) == [0, 1, 2, 3, 4]
    assert list(Ahead([], CPU)) == []


def test_the_next_item_is_read_while_one_is_in_use_and_no_further() -> None:
    begun = [threading.Event() for _ in range(5)]

    def items() -> Iterator[int]:
        for number, event in enumerate(begun):
            event.set()
            yield number

    ahead = Ahead(items(), CPU)
    assert next(ahead) == 0
    assert begun[1].wait(10)
    assert not begun[2].wait(0.2)
    assert next(ahead) == 1
    assert begun[2].wait(10)


def test_an_error_is_raised_where_its_item_is_asked_for() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    ahead = Ahead(items(), CPU)
    assert next(ahead) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="damaged"):
            next(ahead)


def test_the_reader_takes_one_thread_of_torch_and_leaves_ours_as_they_are() -> None:
    before = torch.get_num_threads()
    assert list(Ahead((torch.get_num_threads() for _ in range(1)), CPU)) == [1]
    assert torch.get_num_threads() == before


def test_a_function_that_read_to_the_end_keeps_nothing_alive() -> None:
    """The end was an exception of the thread's: it held the reader's frame, and mapped files stayed open."""

    class Held:
        pass

    def read() -> weakref.ref[Held]:
        held = Held()
        for _ in Ahead(iter(range(3)), CPU):
            pass
        return weakref.ref(held)

    gc.disable()
    try:
        assert read()() is None
    finally:
        gc.enable()
