"""Activation shards: every value comes back, in any order, and damage is noticed before it is used."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from storage.activations import BoundaryReader, shard_name, shard_path, write_shard
from storage.files import DamagedFileError, InputError
from storage.pieces import Pieces
from tests.tiny import flip_byte

REBUILD = "dvc repro cache_activations"
SHARD, TOKENS, HIDDEN = 4, 3, 5  # odd sizes: Arrow pads its buffers to 8 bytes


def make(folder: Path, dtype: torch.dtype, sequences: int = 10, boundaries: int = 2) -> list[Tensor]:
    """Make a split `train` in shards of 4 sequences; return its hidden states at each boundary."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(sequences, TOKENS, HIDDEN, generator=generator).to(dtype) for _ in range(boundaries)]
    for shard, start in enumerate(range(0, sequences, SHARD)):
        files = []
        for boundary, hidden in enumerate(states):
            path = shard_path(folder, "train", boundary, shard)
            write_shard(path, hidden[start : start + SHARD], {"parent": "hash"})
            files.append(path)
        facts = {"sequences_per_shard": SHARD, "sequences": min(SHARD, sequences - start)}
        Pieces(folder, REBUILD).finish(shard_name("train", shard), "key", files, facts)
    return states


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sequences", [[0], [9], [0, 1, 2, 3], [9, 0, 4, 3, 8], [5, 5], list(range(10))])
def test_sequences_are_read_by_number_across_shards(sequences: list[int], dtype: torch.dtype, tmp_path: Path) -> None:
    states = make(tmp_path, dtype)
    for boundary, expected in enumerate(states):
        read_back = BoundaryReader(tmp_path, "train", boundary).read(sequences)
        assert read_back.dtype == dtype
        assert torch.equal(read_back, expected[sequences])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_special_values_keep_their_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    small = torch.finfo(dtype).tiny / 4  # a denormal
    values = torch.tensor([[[0.0, -0.0, float("inf"), float("nan"), small]]]).to(dtype)
    path = shard_path(tmp_path, "train", 0, 0)
    write_shard(path, values, {})
    Pieces(tmp_path, REBUILD).finish(shard_name("train", 0), "", [path], {"sequences_per_shard": 1})
    read_back = BoundaryReader(tmp_path, "train", 0).read([0])
    whole = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(read_back.view(whole), values.view(whole))


def test_what_is_read_is_the_callers_own(tmp_path: Path) -> None:
    [expected] = make(tmp_path, torch.float32, boundaries=1)
    reader = BoundaryReader(tmp_path, "train", 0)
    reader.read([2]).zero_()
    assert torch.equal(reader.read([2]), expected[[2]])


def test_a_view_that_is_not_contiguous_is_written_as_it_looks(tmp_path: Path) -> None:
    hidden = torch.randn(TOKENS, 2, HIDDEN).transpose(0, 1)
    path = shard_path(tmp_path, "train", 0, 0)
    write_shard(path, hidden, {})
    Pieces(tmp_path, REBUILD).finish(shard_name("train", 0), "", [path], {"sequences_per_shard": 2})
    assert torch.equal(BoundaryReader(tmp_path, "train", 0).read([0, 1]), hidden)


def test_the_file_says_what_it_holds(tmp_path: Path) -> None:
    make(tmp_path, torch.bfloat16)
    with pa.memory_map(str(shard_path(tmp_path, "train", 1, 2))) as source:
        file = pa.ipc.open_file(source)
        metadata = file.schema.metadata
        assert file.read_all().num_rows == 2
    assert metadata == {b"parent": b"hash", b"dtype": b"bfloat16", b"tokens": b"3", b"hidden": b"5"}


@pytest.mark.parametrize("position", [8, 300, -20])
def test_a_flipped_byte_is_found_before_it_is_used(position: int, tmp_path: Path) -> None:
    make(tmp_path, torch.bfloat16)
    flip_byte(shard_path(tmp_path, "train", 1, 1), position)
    with pytest.raises(DamagedFileError, match=r"boundary_001/shard_001.arrow is damaged.*dvc repro cache_activations"):
        BoundaryReader(tmp_path, "train", 1).read([3, 4])
    BoundaryReader(tmp_path, "train", 1).read([3, 8])  # the other shards are whole
    BoundaryReader(tmp_path, "train", 0).read([4])


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_file_is_found(keep: int, tmp_path: Path) -> None:
    make(tmp_path, torch.float32)
    path = shard_path(tmp_path, "train", 0, 0)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedFileError, match=r"shard_000.arrow is damaged.*dvc repro cache_activations"):
        BoundaryReader(tmp_path, "train", 0).read([0])


@pytest.mark.parametrize("keep", [0, 100, 600])
def test_a_file_that_was_recorded_truncated_is_no_arrow_file(keep: int, tmp_path: Path) -> None:
    make(tmp_path, torch.float32, sequences=4, boundaries=1)
    path = shard_path(tmp_path, "train", 0, 0)
    path.write_bytes(path.read_bytes()[:keep])
    Pieces(tmp_path, REBUILD).finish(shard_name("train", 0), "key", [path], {"sequences_per_shard": SHARD})
    with pytest.raises(
        DamagedFileError, match=r"shard_000.arrow is not a whole Arrow file.*dvc repro cache_activations"
    ):
        BoundaryReader(tmp_path, "train", 0).read([0])


def test_a_boundary_that_was_not_kept_is_named(tmp_path: Path) -> None:
    make(tmp_path, torch.float32)
    with pytest.raises(InputError, match=r"does not keep boundary 2 of split train; run `dvc repro cache_activations`"):
        BoundaryReader(tmp_path, "train", 2).read([0])


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    make(tmp_path, torch.float32)
    with pytest.raises(InputError, match=r"no piece 'train.shard_003'.*dvc repro cache_activations"):
        BoundaryReader(tmp_path, "train", 0).read([12])
    with pytest.raises(InputError, match=r"no piece 'validation.shard_000'.*dvc repro cache_activations"):
        BoundaryReader(tmp_path, "validation", 0).read([0])


def test_a_digest_covers_the_shards_of_its_range(tmp_path: Path) -> None:
    make(tmp_path, torch.float32)
    reader = BoundaryReader(tmp_path, "train", 0)
    whole = reader.digest(0, 10)
    assert len(whole) == 3
    assert reader.digest(0, 4) == whole[:1]
    assert reader.digest(3, 5) == whole[:2]
    assert reader.digest(8, 10) == whole[2:]
    assert reader.digest(4, 4) == []
    assert BoundaryReader(tmp_path, "train", 1).digest(0, 10) != whole
