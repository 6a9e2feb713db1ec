"""Hidden states at block boundaries: Arrow IPC shards, memory-mapped.

Boundary i is the input of block i and the target of block i-1; boundary L is the input of the final norm. A file
holds one boundary of a range of sequences: `<split>/boundary_<i>/shard_<j>.arrow`, a row per sequence, bf16 values
as uint16 (Arrow has no bfloat16) or float32, shape and hashes in the schema's metadata. Checksums are in the records
of the stage's pieces; a shard is one piece.

Why Arrow IPC without compression (tests/benchmarks/bench_activation_format.py, a middle boundary of SmolLM2-135M,
measured on 2 threads of an AMD EPYC of family 25; ratios to a raw file, page cache warm):

    format               bytes   write rate   read rate
    Arrow IPC            1.000         0.83        0.64
    Arrow IPC, lz4       1.000         0.50        0.18
    Arrow IPC, zstd      0.787         0.25        0.03
    Parquet, zstd        0.787         0.06        0.01
    Parquet, split zstd  0.704         0.04        0.01

Byte-stream-split with zstd saves 30 % of the disk, but only plain IPC can be mapped, so that BLD reads the few
sequences of a step without decoding a shard, and several workers share the pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.files import InputError, damaged, write_whole
from storage.pieces import Pieces, verify

FORMAT_VERSION = 1
REBUILD = "dvc repro cache_activations"
_STORED: dict[torch.dtype, tuple[str, torch.dtype, pa.DataType]] = {
    torch.bfloat16: ("bfloat16", torch.uint16, pa.uint16()),
    torch.float32: ("float32", torch.float32, pa.float32()),
}
_NUMPY: dict[str, tuple[type[np.generic], torch.dtype]] = {
    "bfloat16": (np.uint16, torch.bfloat16),
    "float32": (np.float32, torch.float32),
}


def shard_name(split: str, shard_index: int) -> str:
    """Return the name of the piece that is one shard of a split, at all its boundaries."""
    return f"{split}.shard_{shard_index:03d}"


def shard_path(folder: Path, split: str, boundary: int, shard_index: int) -> Path:
    """Return the file of one boundary of a shard."""
    return folder / split / f"boundary_{boundary:03d}" / f"shard_{shard_index:03d}.arrow"


def write_shard(path: Path, hidden: Tensor, metadata: dict[str, str]) -> None:
    """Write hidden [sequences, tokens, hidden] (bfloat16 or float32, CPU), a row per sequence."""
    name, view, arrow = _STORED[hidden.dtype]
    _, num_tokens, hidden_size = hidden.shape
    values = pa.array(hidden.contiguous().view(view).numpy().reshape(-1), type=arrow)
    column = pa.FixedSizeListArray.from_arrays(values, num_tokens * hidden_size)
    shape = {"dtype": name, "tokens": str(num_tokens), "hidden": str(hidden_size)}
    schema = pa.schema([pa.field("hidden", column.type, nullable=False)], metadata={**metadata, **shape})
    with (
        write_whole(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        writer.write_batch(pa.record_batch([column], schema=schema))


def _map_shard(path: Path, rebuild: str) -> NDArray[Any]:
    """Return a shard as a read-only array over the mapped file, [sequences, tokens, hidden]."""
    try:
        with pa.memory_map(str(path)) as source:
            batch = pa.ipc.open_file(source).get_batch(0)
        metadata = {key.decode(): value.decode() for key, value in (batch.schema.metadata or {}).items()}
        kind, _ = _NUMPY[metadata["dtype"]]
        flat = np.frombuffer(batch.column(0).flatten().buffers()[1], dtype=kind)
        return flat.reshape(batch.num_rows, int(metadata["tokens"]), int(metadata["hidden"]))
    except (pa.ArrowException, OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise damaged(path, f"is not a whole Arrow file of hidden states ({error})", rebuild) from error


@dataclass
class BoundaryReader:
    """One boundary of a split, read by sequence number; each shard is verified once, when it is first used."""

    folder: Path
    split: str
    boundary: int
    rebuild: str = REBUILD
    rounded_to: torch.dtype | None = None  # None: as stored
    _shards: dict[int, NDArray[Any]] = field(default_factory=dict)

    def digest(self, start: int, stop: int) -> list[str]:
        """Return checksums of the files that hold sequences start .. stop-1, for the keys of a later stage."""
        pieces = Pieces(self.folder, self.rebuild)
        size = self._shard_size(pieces)
        return [self._checksum(pieces, shard) for shard in range(start // size, -(-stop // size))]

    def _shard_size(self, pieces: Pieces) -> int:
        return int(pieces.get(shard_name(self.split, 0))["facts"]["sequences_per_shard"])

    def _checksum(self, pieces: Pieces, shard_index: int) -> str:
        path = shard_path(self.folder, self.split, self.boundary, shard_index)
        files: dict[str, str] = pieces.get(shard_name(self.split, shard_index))["files"]
        name = str(path.relative_to(self.folder))
        if name not in files:
            raise InputError(
                f"{self.folder} does not keep boundary {self.boundary} of split {self.split}; run `{self.rebuild}`"
            )
        return files[name]

    def read(self, sequences: Sequence[int]) -> Tensor:
        """Return hidden states of the named sequences, [len(sequences), tokens, hidden], copied from the mapped file.

        Raises:
            DamagedFileError: a shard's bytes differ from those that were written.
        """
        pieces = Pieces(self.folder, self.rebuild)
        size = self._shard_size(pieces)
        rows = []
        for sequence in sequences:
            shard = sequence // size
            if shard not in self._shards:
                path = shard_path(self.folder, self.split, self.boundary, shard)
                verify(path, self._checksum(pieces, shard), self.rebuild)
                self._shards[shard] = _map_shard(path, self.rebuild)
            rows.append(self._shards[shard][sequence - shard * size])
        stacked = torch.from_numpy(np.stack(rows))
        hidden = stacked.view(torch.bfloat16) if stacked.dtype == torch.uint16 else stacked
        return hidden if self.rounded_to is None else hidden.to(self.rounded_to)
