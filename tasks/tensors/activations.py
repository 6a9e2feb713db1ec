"""The activation cache as BLD and scoring read it: all boundaries, or a window of them that moves through the parent.

In rolling mode the cache itself keeps the first and the last boundary, and those that params name. A stage then goes
through the parent in order and holds boundaries first .. first + longest span in `artifacts/rolling`; a boundary is
deleted before another is written. The window's shards hold the unrounded hidden states of the same batches and are
rounded as they are read, so that both modes give the same bytes.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from storage.activations import REBUILD, BoundaryReader, shard_name, shard_path, write_shard
from storage.corpus import SplitName, read_sequences
from storage.fields import resolved
from storage.files import digest_of
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.pieces import Pieces
from tasks.puzzle.model.boundaries import advance, embed
from tasks.puzzle.model.device import prepare_compute
from tasks.puzzle.search_space import parent_attention, parent_ffn

STORED = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""The dtypes in which cache_activations.dtype stores hidden states."""


class Activations:
    """The parent's boundaries for `stage`, which reads the first `sequences` of each split."""

    def __init__(self, params: Params, paths: Paths, sequences: Mapping[SplitName, int], stage: str) -> None:
        self._params, self._paths, self._parent = params, paths, Parent(paths.parent)
        self._rebuild = f"rm -r {paths.rolling} && dvc repro {stage}"
        pieces, self._size = Pieces(paths.activations, REBUILD), params.cache_activations.sequences_per_shard
        self._facts = {}
        for split, count in sequences.items():
            for shard in range(-(-count // self._size)):
                self._facts[split, shard] = pieces.get(shard_name(split, shard))["facts"]
        self._blocks = [""]  # by boundary: the digest of all blocks before it
        for index in range(self._parent.config.num_blocks):
            self._blocks.append(digest_of([self._blocks[-1], self._parent.checkpoint.block_digest(index)]))
        self._ranges: dict[tuple[str, int, int], str] = {}

    @property
    def how(self) -> str:
        """Return the digest of all inputs to hidden states except tokens and the parent's blocks."""
        return str(next(iter(self._facts.values()))["how"])

    def key(self, split: SplitName, boundary: int, start: int, stop: int) -> str:
        """Return the content key of sequences start .. stop-1 at a boundary, the same in both modes.

        It covers the whole shards that hold the sequences.
        """
        sequences = split, start, stop
        if sequences not in self._ranges:
            shards = range(start // self._size, -(-stop // self._size))
            self._ranges[sequences] = digest_of([self._facts[split, shard]["content"] for shard in shards])
        return digest_of([self._ranges[sequences], self._blocks[boundary]])

    def _key(self, split: SplitName, shard: int, boundary: int) -> str:
        return digest_of([self._facts[split, shard]["content"], self._blocks[boundary]])

    def reader(self, split: SplitName, boundary: int) -> BoundaryReader:
        """Open a boundary to read; in rolling mode it is the last one or one that :meth:`hold` holds."""
        if not self._params.cache_activations.rolling or boundary == self._parent.config.num_blocks:
            return BoundaryReader(self._paths.activations, split, boundary)
        rounded_to = STORED[self._params.cache_activations.dtype]
        return BoundaryReader(self._folder(boundary), split, boundary, self._rebuild, rounded_to)

    def hold(self, first: int) -> None:
        """Bring boundaries first .. first + longest span to disk and delete all others, in rolling mode.

        They are computed from the nearest boundary before them that is whole, else from the tokens.
        """
        if not self._params.cache_activations.rolling:
            return
        longest = max((1, *self._params.distill_blocks.spans))
        last = min(
            first + longest, self._parent.config.num_blocks - 1
        )  # the cache keeps the boundary behind the last block
        top = first - 1
        while top < last and self._is_whole(top + 1):
            top += 1
        if top < first:
            top = max((boundary for boundary in range(first) if self._is_whole(boundary)), default=-1)
        window = range(min(first, top), min(top + 1, last) + 1)
        for folder in self._paths.rolling.glob("[0-9]*"):
            if int(folder.name) not in window:
                shutil.rmtree(folder)
        while top < last:
            self._write(top + 1)
            if 0 <= top < first:
                shutil.rmtree(self._folder(top))
            top += 1

    def _folder(self, boundary: int) -> Path:
        return self._paths.rolling / f"{boundary:03d}"

    def _is_whole(self, boundary: int) -> bool:
        return all(self._is_finished(boundary, split, shard) for split, shard in self._facts)

    def _is_finished(self, boundary: int, split: SplitName, shard: int) -> bool:
        """Tell whether a shard is finished; its bytes are compared with their checksum when they are read."""
        folder = self._folder(boundary)
        record = Pieces(folder, self._rebuild).record(shard_name(split, shard))
        is_ours = record is not None and record["key"] == self._key(split, shard, boundary)
        return is_ours and shard_path(folder, split, boundary, shard).is_file()

    def _write(self, boundary: int) -> None:
        """Write a boundary, computed from the one before it, shard by shard."""
        pieces, forward = Pieces(self._folder(boundary), self._rebuild), self._forward(boundary)
        for (split, shard), facts in self._facts.items():
            if not self._is_finished(boundary, split, shard):
                start, path = shard * self._size, shard_path(pieces.folder, split, boundary, shard)
                hidden = forward(split, range(start, start + facts["sequences"]))
                write_shard(path, hidden.cpu(), {"boundary": str(boundary)})
                pieces.finish(shard_name(split, shard), self._key(split, shard, boundary), [path], facts)

    def _forward(self, boundary: int) -> Callable[[SplitName, range], Tensor]:
        """Return a function that computes a boundary of some sequences, from their tokens or the boundary before it."""
        run, config = self._params.run, self._parent.config
        compute = prepare_compute(run.device, run.dtype, run.threads)
        if boundary == 0:
            embedding, _, _ = self._parent.outside(*compute)
            return lambda split, sequences: embed(embedding, read_tokens(self._paths, split, sequences))
        block = parent_attention(config), parent_ffn(config), self._parent.block(boundary - 1, *compute)
        sequences_per_batch = resolved(self._params.cache_activations.sequences_per_batch)

        def from_before(split: SplitName, sequences: range) -> Tensor:
            before = BoundaryReader(self._folder(boundary - 1), split, boundary - 1, self._rebuild)
            return advance(config, block, before.read(sequences).to(*compute), sequences_per_batch)

        return from_before


def read_tokens(paths: Paths, split: SplitName, sequences: range) -> Tensor:
    """Read the token ids of some sequences, [sequences, tokens] int64."""
    return torch.from_numpy(read_sequences(paths.corpus, split, sequences.start, sequences.stop)).long()


def clear(paths: Paths) -> None:
    """Delete the window of boundaries, if there is one."""
    if paths.rolling.is_dir():
        shutil.rmtree(paths.rolling)
