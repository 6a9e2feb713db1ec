"""Input that is read while the device computes: the next item of an iterator, on a thread of its own.

On a GPU the thread has a stream of its own, so that copies (from pinned memory: `storage.checkpoints.placed`) run
beside the kernels, and whoever takes an item waits for its copies alone.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Ahead(Iterator[T], Generic[T]):
    """The items of `items`, each read while the one before it is in use; memory holds two of them.

    An item is a tensor, or tuples, lists and mappings of tensors. An error of the iterator is raised where its item is
    asked for.
    """

    def __init__(self, items: Iterable[T], device: torch.device) -> None:
        self._items, self._device = iter(items), device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self._next: Future[tuple[T, torch.cuda.Event | None] | None] = self._thread.submit(self._read)

    def _read(self) -> tuple[T, torch.cuda.Event | None] | None:
        """Read the next item; None at the end: an exception there would keep alive what the iterator holds."""
        with torch.cuda.stream(self._stream):  # None: as it is
            for item in self._items:
                return item, self._stream.record_event() if self._stream else None
        return None

    def __next__(self) -> T:
        """Return the next item, and begin to read the one behind it."""
        try:
            item_and_event = self._next.result()
        except BaseException:  # of the iterator
            self._thread.shutdown(wait=False)
            raise
        if item_and_event is None:
            self._thread.shutdown(wait=False)
            raise StopIteration
        item, copied = item_and_event
        if copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            for tensor in _tensors(item):
                tensor.record_stream(current)  # its memory is free when these kernels are through
        self._next = self._thread.submit(self._read)
        return item


def _tensors(item: Any) -> Iterator[Tensor]:
    """Yield the tensors of an item that are on a GPU."""
    if isinstance(item, Tensor):
        if item.is_cuda:
            yield item
    elif isinstance(item, Mapping):
        for part in item.values():
            yield from _tensors(part)
    elif isinstance(item, tuple | list):
        for part in item:
            yield from _tensors(part)
