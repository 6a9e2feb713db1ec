"""The packed corpus on disk: sequences of token ids in three splits, and the manifest that describes them.

`<split>.parquet` holds a row per sequence: sequence_index int32, tokens fixed_size_list<int32>[seq_len].
`manifest.json` is written last: a folder that has one is whole. Nothing here holds a clock, so the same tokens give
the same bytes.
"""

import functools
import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage.files import InputError, digest_of, read_sealed, verify, write_sealed, write_whole

Tokens = NDArray[np.int32]
SplitName = Literal["train", "calibration", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "calibration", "validation")
REBUILD = "dvc repro prepare_corpus"
_MANIFEST = "manifest.json"
_ROWS_PER_GROUP = 1024
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class Split:
    """Counts and checksums of one split; `token_sha256` is over the ids (little-endian int32), `sha256` over the file.

    A document counts in the split that holds its tokens, also where the split's end cut it.
    """

    sequences: int
    tokens: int
    documents: int
    token_sha256: str
    sha256: str


@dataclass(frozen=True)
class Ingredient:
    """The share of one source in the corpus: numbers of documents, and of tokens with their separators."""

    name: str
    version: str
    licence: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class Manifest:
    """The description of a corpus, for later stages and for people.

    Attributes:
        key: digest of all that went in (params, seed, tokenizer, sources, code, library versions).
        content_hash: digest of the tokens of all splits: what the keys of later stages take.
        seq_len: tokens per sequence.
        separator: the token after each document, with its id in `separator_id`.
        tokenizer: digest of the parent's tokenizer files.
        left_out: documents that were left out because they repeat earlier ones.
        notes: sentences on the making and the splits of the documents.
    """

    key: str
    content_hash: str
    seq_len: int
    separator: str
    separator_id: int
    tokenizer: str
    splits: dict[SplitName, Split]
    sources: tuple[Ingredient, ...]
    left_out: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The manifest as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Inverse of :meth:`to_json`."""
        return cls(
            **{
                **value,
                "splits": {name: Split(**split) for name, split in value["splits"].items()},
                "sources": tuple(Ingredient(**source) for source in value["sources"]),
                "notes": tuple(value["notes"]),
            }
        )


def split_path(folder: Path, split: SplitName) -> Path:
    """The file of a split."""
    return folder / f"{split}.parquet"


def content_hash(splits: dict[SplitName, Split]) -> str:
    """Digest of the tokens of all splits."""
    return digest_of({name: split.token_sha256 for name, split in splits.items()})


def write_split(path: Path, sequences: Iterable[Tokens], seq_len: int) -> tuple[int, str]:
    """Write sequences as they come, 1,024 at a time in memory.

    Args:
        path: the Parquet file, written by rename.
        sequences: token ids, int32 [seq_len] each.
        seq_len: tokens per sequence.

    Returns:
        Number of sequences, and the sha256 of their ids.
    """
    schema = pa.schema([("sequence_index", pa.int32()), ("tokens", pa.list_(pa.int32(), seq_len))])
    digest = hashlib.sha256()
    count = 0
    # A dictionary of ids under zstd is larger (measured on English words, 2,005 kB of ids: 206 kB against 194 kB).
    with (
        write_whole(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", use_dictionary=["sequence_index"]) as writer,
    ):
        for group in _groups(sequences):
            assert group.shape[1:] == (seq_len,) and group.dtype == np.int32, (group.shape, group.dtype)
            digest.update(group.astype("<i4").tobytes())
            index = np.arange(count, count + len(group), dtype=np.int32)
            tokens = pa.FixedSizeListArray.from_arrays(pa.array(group.ravel()), seq_len)
            writer.write_table(pa.table([pa.array(index), tokens], schema=schema), row_group_size=_ROWS_PER_GROUP)
            count += len(group)
    return count, digest.hexdigest()


def _groups(sequences: Iterable[Tokens]) -> Iterator[Tokens]:
    """Stacks of up to 1,024 sequences each: int32 [rows, seq_len]."""
    rows: list[Tokens] = []
    for sequence in sequences:
        rows.append(sequence)
        if len(rows) == _ROWS_PER_GROUP:
            yield np.stack(rows)
            rows = []
    if rows:
        yield np.stack(rows)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json with a seal over its own content; it comes after the splits."""
    write_sealed(folder / _MANIFEST, manifest.to_json())


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json.

    Raises:
        InputError: it is missing.
        DamagedFileError: it is not what was written.
    """
    path = folder / _MANIFEST
    try:
        return Manifest.from_json(read_sealed(path, REBUILD))
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} was written by another version of this project; run `{REBUILD}`") from error


def drop_manifest(folder: Path) -> None:
    """Mark a corpus as not whole, before its files are replaced."""
    (folder / _MANIFEST).unlink(missing_ok=True)


def read_sequences(folder: Path, split: SplitName, start: int = 0, stop: int | None = None) -> Tokens:
    """Read sequences `start` .. `stop` - 1 of a split, after comparing the file with its checksum.

    Args:
        folder: the corpus.
        split: train, calibration or validation.
        start: first sequence.
        stop: end of the range; None is the end of the split.

    Returns:
        Token ids, int32 [sequences, seq_len], a copy that the caller may change.

    Raises:
        InputError: there is no corpus, or it has fewer sequences.
        DamagedFileError: the file's bytes are not the ones that were written.
    """
    manifest = read_manifest(folder)
    facts = manifest.splits[split]
    stop = facts.sequences if stop is None else stop
    assert 0 <= start <= stop, (start, stop)
    path = split_path(folder, split)
    if stop > facts.sequences:
        raise InputError(
            f"{path} holds {facts.sequences} sequences of {manifest.seq_len} tokens, {stop} are wanted; "
            f"raise prepare_corpus.{split}_tokens"
        )
    _verify(path, facts.sha256)
    return _read_rows(path, manifest.seq_len, start, stop)


def _read_rows(path: Path, seq_len: int, start: int, stop: int) -> Tokens:
    """Rows of a verified file; only the row groups that hold them are read."""
    groups: list[int] = []
    first_row = end = 0
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            begin, end = end, end + file.metadata.row_group(group).num_rows
            if begin < stop and end > start:
                first_row = first_row if groups else begin
                groups.append(group)
        column = file.read_row_groups(groups, columns=["tokens"]).column("tokens")
    rows: Tokens = column.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, seq_len)
    return rows[start - first_row : stop - first_row].copy()


def _verify(path: Path, expected_sha256: str) -> None:
    """Compare a split with its checksum; a file that has not changed since is hashed once per process only.

    A stage reads a split shard by shard; hashing all of it for each would be quadratic. A file written less than two
    seconds ago is always hashed, since its next change could carry the same modification time.
    """
    stat = path.stat() if path.is_file() else None
    if stat is None or time.time_ns() - stat.st_mtime_ns < _SETTLED_NS:
        verify(path, expected_sha256, REBUILD)
    else:
        _verify_settled(path.resolve(), expected_sha256, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@functools.lru_cache(maxsize=64)
def _verify_settled(path: Path, expected_sha256: str, _size: int, _mtime_ns: int, _inode: int) -> None:
    verify(path, expected_sha256, REBUILD)
