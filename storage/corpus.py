"""The packed corpus on disk: sequences of token ids in splits, and the manifest that describes them.

Splits are train, calibration and validation, and `domain_<name>` for each held-out domain. `<split>.parquet` holds a
row per sequence: sequence_index int32, tokens fixed_size_list<int32>[seq_len], document int32. `manifest.json` is
written last: a folder that has one is whole. Nothing here holds a clock, so the same tokens give the same bytes.
"""

import functools
import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage.documents import PackedSequence, Tokens
from storage.files import InputError, digest_of, verify, write_sealed, write_whole
from storage.json_records import read_record

SplitName = Literal["train", "calibration", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "calibration", "validation")
"""The splits of the training mix, which every corpus has."""
_DOMAIN = "domain_"
REBUILD = "dvc repro prepare_corpus"
_MANIFEST = "manifest.json"
_ROWS_PER_GROUP = 1024
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class Split:
    """Counts and checksums of one split; `token_sha256` is over the ids (little-endian int32), `sha256` over the file.

    A document counts in the split that holds tokens of it, also where it was cut.
    """

    sequences: int
    tokens: int
    documents: int
    token_sha256: str
    sha256: str


@dataclass(frozen=True)
class Ingredient:
    """The share of one source in the corpus: numbers of documents, and of tokens with what stands around documents.

    `domain` is the held-out domain that it fills, or `training`.
    """

    domain: str
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
        content_hash: digest of the tokens of train, calibration and validation.
        seq_len: tokens per sequence.
        separator: the token after each document, with its id in `separator_id`.
        bos: the token before each document, where the parent's tokenizer adds one; else None.
        tokenizer: digest of the parent's tokenizer files.
        left_out: documents that were left out because they repeat earlier ones.
        notes: sentences on the making and the splits of the documents.
    """

    key: str
    content_hash: str
    seq_len: int
    separator: str
    separator_id: int
    bos: str | None
    tokenizer: str
    splits: Mapping[str, Split]
    sources: tuple[Ingredient, ...]
    left_out: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as a JSON object."""
        return asdict(self)


def domain_split(domain: str) -> str:
    """Return the split of a held-out domain."""
    return f"{_DOMAIN}{domain}"


def split_path(folder: Path, split: str) -> Path:
    """Return the file of a split."""
    return folder / f"{split}.parquet"


def content_hash(splits: Mapping[str, Split]) -> str:
    """Return the digest of the tokens of train, calibration and validation."""
    return digest_of({name: splits[name].token_sha256 for name in SPLITS})


def write_split(path: Path, sequences: Iterable[PackedSequence], seq_len: int) -> tuple[int, str]:
    """Write sequences as they come, 1,024 at a time in memory.

    Args:
        path: the Parquet file, written by rename.
        sequences: the sequences, of `seq_len` tokens each.
        seq_len: tokens per sequence.

    Returns:
        Number of sequences, and the sha256 of their ids.
    """
    types = {"sequence_index": pa.int32(), "tokens": pa.list_(pa.int32(), seq_len), "document": pa.int32()}
    schema = pa.schema(list(types.items()))
    digest = hashlib.sha256()
    count = 0
    # A dictionary of ids under zstd is larger (measured on English words, 2,005 kB of ids: 206 kB against 194 kB).
    with (
        write_whole(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", use_dictionary=["sequence_index"]) as writer,
    ):
        for group in _groups(sequences):
            ids = np.stack([sequence.tokens for sequence in group])
            assert ids.shape[1:] == (seq_len,) and ids.dtype == np.int32, (ids.shape, ids.dtype)
            digest.update(ids.astype("<i4").tobytes())
            index = np.arange(count, count + len(group), dtype=np.int32)
            tokens = pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), seq_len)
            documents = pa.array([sequence.document for sequence in group], pa.int32())
            table = pa.table([pa.array(index), tokens, documents], schema=schema)
            writer.write_table(table, row_group_size=_ROWS_PER_GROUP)
            count += len(group)
    return count, digest.hexdigest()


def _groups(sequences: Iterable[PackedSequence]) -> Iterator[list[PackedSequence]]:
    """Yield lists of up to 1,024 sequences each."""
    group: list[PackedSequence] = []
    for sequence in sequences:
        group.append(sequence)
        if len(group) == _ROWS_PER_GROUP:
            yield group
            group = []
    if group:
        yield group


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json with a seal over its own content; it comes after the splits."""
    write_sealed(folder / _MANIFEST, manifest.to_json())


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json.

    Raises:
        InputError: it is missing.
        DamagedFileError: it is not what was written, or was written by another version of this project.
    """
    return read_record(folder / _MANIFEST, Manifest, REBUILD)


def drop_manifest(folder: Path) -> None:
    """Mark a corpus as not whole, before its files are replaced."""
    (folder / _MANIFEST).unlink(missing_ok=True)


def read_sequences(folder: Path, split: str, start: int = 0, stop: int | None = None) -> Tokens:
    """Read sequences `start` .. `stop` - 1 of a split, after comparing the file with its checksum.

    Args:
        folder: the corpus.
        split: train, calibration, validation, or a domain's (:func:`domain_split`).
        start: first sequence.
        stop: end of the range; None is the end of the split.

    Returns:
        Token ids, int32 [sequences, seq_len], a copy that the caller may change.

    Raises:
        InputError: there is no corpus, no such split, or it has fewer sequences.
        DamagedFileError: the file's bytes are not the ones that were written.
    """
    rows = _read_column(folder, split, "tokens", start, stop)
    tokens: Tokens = rows.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), rows.type.list_size)
    return tokens.copy()


def read_documents(folder: Path, split: str, start: int = 0, stop: int | None = None) -> NDArray[np.int32]:
    """Read the document numbers of sequences `start` .. `stop` - 1 of a split, int32 [sequences].

    Sequences with the same number share a document, so standard errors count them as one. In train, whose documents
    follow each other without a gap, it is the document that holds the first token.

    Args and errors are those of :func:`read_sequences`.
    """
    documents: NDArray[np.int32] = _read_column(folder, split, "document", start, stop).to_numpy(zero_copy_only=False)
    return documents.copy()


def _read_column(folder: Path, split: str, column: str, start: int, stop: int | None) -> pa.Array:
    """Return rows `start` .. `stop` - 1 of a column of a verified split."""
    manifest, path = read_manifest(folder), split_path(folder, split)
    if split not in manifest.splits:
        raise InputError(f"{folder} has no split {split} (has: {', '.join(manifest.splits)}); run `{REBUILD}`")
    facts = manifest.splits[split]
    stop = facts.sequences if stop is None else stop
    assert 0 <= start <= stop, (start, stop)
    if stop > facts.sequences:
        key = f"domains.{split.removeprefix(_DOMAIN)}.tokens" if split.startswith(_DOMAIN) else f"{split}_tokens"
        raise InputError(
            f"{path} holds {facts.sequences} sequences of {manifest.seq_len} tokens, {stop} are wanted; "
            f"raise prepare_corpus.{key}"
        )
    _verify(path, facts.sha256)
    return _read_rows(path, column, start, stop)


def _read_rows(path: Path, column: str, start: int, stop: int) -> pa.Array:
    """Return rows of a column of a verified file; only the row groups that hold them are read."""
    groups: list[int] = []
    first_row = end = 0
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            begin, end = end, end + file.metadata.row_group(group).num_rows
            if begin < stop and end > start:
                first_row = first_row if groups else begin
                groups.append(group)
        rows = file.read_row_groups(groups, columns=[column]).column(column)
    return rows.slice(start - first_row, stop - start).combine_chunks()


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
