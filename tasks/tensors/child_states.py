"""The hidden states of a child before one of its blocks, in shards on disk, so that memory holds a few sequences.

A stream is a number of sequences under a name. The states before a block are whole when every shard of every stream is;
those before another block are deleted then. Shards have the form of the activation cache's.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from storage.activations import BoundaryReader, shard_name, shard_path, write_shard
from storage.pieces import Pieces

_SEQUENCES_PER_SHARD = 32


@dataclass(frozen=True)
class ChildStates:
    """States in `folder`, which `rebuild` makes anew; `streams` has the number of sequences of each."""

    folder: Path
    rebuild: str
    streams: Mapping[str, int]

    def reader(self, block_index: int, stream: str) -> BoundaryReader:
        """Open the states before a block to read, by number of the sequence in its stream."""
        return BoundaryReader(self._pieces(block_index).folder, stream, block_index, self.rebuild)

    def are_whole(self, block_index: int, key: str) -> bool:
        """Tell whether the states before a block are all on disk under this key, every byte as written."""
        pieces = self._pieces(block_index)
        return all(pieces.done(shard_name(stream, shard), key) for stream, shard, _ in self._shards())

    def write(self, block_index: int, key: str, stream: str, states: Iterator[Tensor]) -> None:
        """Write a stream's states before a block.

        Args:
            block_index: the block.
            key: content key of the states.
            stream: the name of the stream.
            states: the states of each sequence in order, [1, tokens, hidden].
        """
        pieces = self._pieces(block_index)
        for _, shard, count in (entry for entry in self._shards() if entry[0] == stream):
            path = shard_path(pieces.folder, stream, block_index, shard)
            hidden = torch.cat([next(states).cpu() for _ in range(count)])
            write_shard(path, hidden, {"block": str(block_index)})
            facts = {"sequences_per_shard": _SEQUENCES_PER_SHARD}
            pieces.finish(shard_name(stream, shard), key, [path], facts)

    def keep_only(self, block_index: int) -> None:
        """Delete the states before all other blocks."""
        for folder in self.folder.glob("*"):
            if folder != self._pieces(block_index).folder:
                shutil.rmtree(folder)

    def _pieces(self, block_index: int) -> Pieces:
        return Pieces(self.folder / f"{block_index:03d}", self.rebuild)

    def _shards(self) -> Iterable[tuple[str, int, int]]:
        """Yield stream, number and sequences of every shard."""
        for stream, sequences in self.streams.items():
            for shard, start in enumerate(range(0, sequences, _SEQUENCES_PER_SHARD)):
                yield stream, shard, min(_SEQUENCES_PER_SHARD, sequences - start)
