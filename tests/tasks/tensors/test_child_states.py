"""States of a child on disk: every sequence of every stream comes back, and they are whole or not there."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from storage.pieces import Pieces
from tasks.tensors.child_states import ChildStates

STREAMS = {"fit": 70, "held_out": 3}
"""The first one fills two shards and begins a third."""


def states_of(stream: str, block_index: int) -> Iterator[Tensor]:
    """Return the states of each sequence, [1, 2 tokens, 4], all different."""
    first = 1000 * block_index + 100 * list(STREAMS).index(stream)
    return (torch.full((1, 2, 4), float(first + sequence)) for sequence in range(STREAMS[stream]))


@pytest.fixture
def states(tmp_path: Path) -> ChildStates:
    """Return the states before block 1."""
    made = ChildStates(tmp_path, "dvc repro it", STREAMS)
    for stream in STREAMS:
        made.write(1, "key", stream, states_of(stream, 1))
    return made


def test_every_sequence_is_read_back(states: ChildStates) -> None:
    for stream, count in STREAMS.items():
        read = states.reader(1, stream).read(range(count))
        assert torch.equal(read, torch.cat(list(states_of(stream, 1))))


def test_states_are_whole_under_their_key_when_every_shard_is_written(states: ChildStates) -> None:
    assert states.are_whole(1, "key") and not states.are_whole(1, "another") and not states.are_whole(2, "key")
    states.write(2, "key", "held_out", states_of("held_out", 2))
    assert not states.are_whole(2, "key")
    (last,) = Pieces(states.folder / "001", "").get("fit.shard_002")["files"]
    (states.folder / "001" / last).unlink()
    assert not states.are_whole(1, "key")


def test_the_states_before_one_block_alone_are_kept(states: ChildStates) -> None:
    for stream in STREAMS:
        states.write(2, "next", stream, states_of(stream, 2))
    states.keep_only(2)
    assert states.are_whole(2, "next") and not states.are_whole(1, "key")
    assert [folder.name for folder in states.folder.iterdir()] == ["002"]
