"""The corpus on disk: what is written is read back, bytes repeat, damage is noticed."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from storage.corpus import (
    SPLITS,
    Ingredient,
    Manifest,
    Split,
    content_hash,
    domain_split,
    read_documents,
    read_manifest,
    read_sequences,
    split_path,
    write_manifest,
    write_split,
)
from storage.documents import PackedSequence, Tokens
from storage.files import DamagedFileError, InputError, sha256

SEQ_LEN = 8
PROSE = domain_split("prose")
ALL_SPLITS = (*SPLITS, PROSE)


def packed(ids: Tokens) -> Iterator[PackedSequence]:
    """Return sequences of which three in a row share a document."""
    return (PackedSequence(tokens, index // 3) for index, tokens in enumerate(ids))


def make(folder: Path, sequences: int = 5) -> dict[str, Tokens]:
    """Write a corpus of random ids whose splits differ; return its tokens."""
    rng = np.random.default_rng(0)
    tokens = {name: rng.integers(0, 50_000, (sequences + i, SEQ_LEN), np.int32) for i, name in enumerate(ALL_SPLITS)}
    splits = {}
    for name, ids in tokens.items():
        count, token_sha256 = write_split(split_path(folder, name), packed(ids), SEQ_LEN)
        splits[name] = Split(count, count * SEQ_LEN, 1, token_sha256, sha256(split_path(folder, name)))
    source = Ingredient("training", "files", "1", "MIT", 3, sum(ids.size for ids in tokens.values()))
    hashed = content_hash(splits)
    write_manifest(
        folder,
        Manifest("key", hashed, SEQ_LEN, "<|endoftext|>", 0, None, "digest", splits, (source,), 0, ("note",)),
    )
    return tokens


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_sequences_are_read_back_in_any_range(tmp_path: Path) -> None:
    tokens = make(tmp_path, sequences=2_500)  # three row groups
    for name, ids in tokens.items():
        for start, stop in ((0, 3), (1_000, 1_030), (1_024, 2_048), (2_047, 2_500), (7, 7), (0, None)):
            read = read_sequences(tmp_path, name, start, stop)
            assert read.dtype == np.int32
            np.testing.assert_array_equal(read, ids[start:stop])
            documents = read_documents(tmp_path, name, start, stop)
            assert documents.dtype == np.int32
            np.testing.assert_array_equal(documents, np.arange(len(ids))[start:stop] // 3)
    assert read_sequences(tmp_path, "train", 0, 1).flags.writeable, "torch refuses to share memory that is not"


def test_the_file_has_the_stated_schema(tmp_path: Path) -> None:
    make(tmp_path)
    table = pq.read_table(split_path(tmp_path, "calibration"))
    assert str(table.schema.field("sequence_index").type) == "int32"
    assert str(table.schema.field("tokens").type) == f"fixed_size_list<element: int32>[{SEQ_LEN}]"
    assert table.column("sequence_index").to_pylist() == list(range(table.num_rows))
    assert str(table.schema.field("document").type) == "int32"


def test_the_same_tokens_give_the_same_bytes_and_other_tokens_another_hash(tmp_path: Path) -> None:
    tokens = make(tmp_path / "a")
    make(tmp_path / "b")
    for file in ("manifest.json", *(f"{name}.parquet" for name in ALL_SPLITS)):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    manifest = read_manifest(tmp_path / "a")
    for name in ALL_SPLITS:
        tokens[name][0, 0] ^= 1
        _, changed = write_split(tmp_path / "other.parquet", packed(tokens[name]), SEQ_LEN)
        splits = {**manifest.splits, name: replace(manifest.splits[name], token_sha256=changed)}
        assert (content_hash(splits) == manifest.content_hash) == (name == PROSE), "no child is trained on a domain"


def test_the_manifest_is_read_back(tmp_path: Path) -> None:
    make(tmp_path)
    manifest = read_manifest(tmp_path)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert manifest.splits["validation"].sequences == 7
    assert manifest.sources[0].licence == "MIT"


@pytest.mark.parametrize("position", [4, 60, -20])
def test_a_flipped_byte_is_found_with_the_command_that_repairs_it(tmp_path: Path, position: int) -> None:
    make(tmp_path)
    read_sequences(tmp_path, "train", 0, 1)
    flip_byte(split_path(tmp_path, "train"), position)
    with pytest.raises(DamagedFileError, match="dvc repro prepare_corpus"):
        read_sequences(tmp_path, "train", 0, 1)
    read_sequences(tmp_path, "validation", 0, 1)


def test_a_byte_flipped_long_after_the_first_read_is_found(tmp_path: Path) -> None:
    """A file that was verified is not hashed again, until its modification time moves."""
    make(tmp_path)
    path = split_path(tmp_path, "train")
    os.utime(path, (1_600_000_000, 1_600_000_000))
    read_sequences(tmp_path, "train", 0, 1)
    flip_byte(path, 60)
    with pytest.raises(DamagedFileError):
        read_sequences(tmp_path, "train", 0, 1)


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.json is missing; run `dvc repro prepare_corpus`"):
        read_sequences(tmp_path, "train", 0, 1)
    make(tmp_path)
    path = split_path(tmp_path, "train")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DamagedFileError):
        read_sequences(tmp_path, "train", 0, 1)
    path.unlink()
    with pytest.raises(DamagedFileError, match="missing although its manifest lists it"):
        read_sequences(tmp_path, "train", 0, 1)


def test_an_edited_manifest_is_found(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"MIT"', '"GPL"'))
    with pytest.raises(DamagedFileError, match="seal"):
        read_manifest(tmp_path)


def test_more_sequences_than_there_are_and_splits_that_are_not(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(InputError, match=r"holds 5 sequences of 8 tokens, 6 are wanted; raise prepare_corpus\.train"):
        read_sequences(tmp_path, "train", 0, 6)
    with pytest.raises(InputError, match=r"9 are wanted; raise prepare_corpus\.domains\.prose\.tokens"):
        read_documents(tmp_path, PROSE, 0, 9)
    with pytest.raises(InputError, match=r"no split domain_code \(has: train, .*, domain_prose\); run `dvc repro"):
        read_sequences(tmp_path, domain_split("code"))
