"""Files are whole or absent, and damage is named with the command that mends it."""

import hashlib
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from storage import files
from storage.files import (
    DamagedFileError,
    DiskFullError,
    InputError,
    digest_of,
    read_json,
    replace_folder,
    sha256,
    unfinished_folder,
    verify,
    write_json,
    write_whole,
)
from tests.tiny import flip_byte


class Killed(BaseException):
    """Stands for a KeyboardInterrupt in the middle of a write."""


@pytest.mark.parametrize("error", [RuntimeError, OSError, Killed])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(
    error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "file.json"
    for old in (None, "old"):
        with pytest.raises(error), write_whole(path) as temporary:
            temporary.write_text("half of the new")
            raise error
        assert (path.read_text() if path.exists() else None) == old
        assert [file.name for file in path.parent.iterdir()] == (["file.json"] if old else [])
        path.write_text("old")


def test_an_error_that_only_sounds_like_a_full_disk_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="was requested and"), write_whole(tmp_path / "file"):
        raise OSError("a lock was requested and 3 written requests wait")


def test_nothing_is_seen_under_the_name_before_the_write_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    with write_whole(path) as temporary:
        temporary.write_text("first half, ")
        assert not path.exists()
        assert (temporary.parent, temporary.suffix) == (path.parent, path.suffix)
        with temporary.open("a") as handle:
            handle.write("second half")
    assert path.read_text() == "first half, second half"
    assert [file.name for file in tmp_path.iterdir()] == ["table.parquet"]


def test_a_writer_that_made_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileNotFoundError), write_whole(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "old"


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with write_whole(path) as first, write_whole(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first", "the outer one ended last"


def test_written_files_are_readable_by_others(tmp_path: Path) -> None:
    with write_whole(tmp_path / "file") as temporary:
        temporary.touch(mode=0o600)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_json_survives_a_round_trip_with_its_order(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": "Überblick…"}
    write_json(tmp_path / "file.json", value)
    assert list(read_json(tmp_path / "file.json", "dvc repro it")) == ["b", "a"]
    assert read_json(tmp_path / "file.json", "dvc repro it") == value
    assert "Überblick…" in (tmp_path / "file.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("data", [b'{"a": 1', b"", b"\xff\xfe{}"])
def test_damaged_json_names_file_and_command(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_bytes(data)
    with pytest.raises(DamagedFileError, match=r"file.json is not valid JSON .*; run `dvc repro it`"):
        read_json(tmp_path / "file.json", "dvc repro it")


def test_missing_json_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"file.json is missing; run `dvc repro it`"):
        read_json(tmp_path / "file.json", "dvc repro it")


def test_sha256_of_a_file_larger_than_a_chunk(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000  # 1.28 MB
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_a_file_is_hashed_once_until_somebody_writes_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, long_ago = tmp_path / "weights", time.time() - 60
    path.write_bytes(b"some bytes")
    os.utime(path, (long_ago, long_ago))
    first = sha256(path)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_CHUNK_BYTES", None)  # reading would raise
        assert sha256(path) == first
    flip_byte(path)
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest() != first


@pytest.mark.parametrize("seconds", [-0.5, 60.0])
def test_a_file_whose_time_could_hide_a_write_is_hashed_anew(seconds: float, tmp_path: Path) -> None:
    """File systems' clocks tick: what is written twice within a tick has one time. One in the future never settles."""
    path, modified = tmp_path / "weights", time.time() + seconds
    for content in (b"some bytes", b"same bytes"):
        path.write_bytes(content)
        os.utime(path, (modified, modified))
        assert sha256(path) == hashlib.sha256(content).hexdigest()


def test_the_digest_of_a_value_ignores_the_order_of_keys_only() -> None:
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    different = [{"a": 1, "b": [2, 1]}, {"a": 1, "b": [1, 2], "c": None}, {"a": "1", "b": [1, 2]}, {"a": 1.5}]
    assert len({digest_of(value) for value in [*different, {"a": 1, "b": [1, 2]}]}) == 5


def test_verify_finds_a_flipped_byte_and_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"some bytes")
    expected = sha256(path)
    verify(path, expected, "dvc repro it")
    flip_byte(path, 3)
    with pytest.raises(DamagedFileError, match=r"weights is damaged: sha256 .*; run `dvc repro it`"):
        verify(path, expected, "dvc repro it")
    path.unlink()
    with pytest.raises(DamagedFileError, match=r"weights is missing although .*; run `dvc repro it`"):
        verify(path, expected, "dvc repro it")


def test_exit_codes_tell_wrong_input_from_damage() -> None:
    assert {0, 1}.isdisjoint({InputError.exit_code, DamagedFileError.exit_code})
    assert InputError.exit_code != DamagedFileError.exit_code
    assert issubclass(DamagedFileError, InputError)


@pytest.mark.parametrize("write", [lambda full: full.write(b"new"), lambda full: np.ones(100_000).tofile(full)])
def test_a_full_disk_is_one_error_and_keeps_the_old_file(write: Callable[[Any], object], tmp_path: Path) -> None:
    """numpy's error says how much was written, and has no errno."""
    path = tmp_path / "file.bin"
    path.write_text("old")
    with (
        pytest.raises(DiskFullError, match=r"disk is full: .*file\.bin.*run the same command again"),
        write_whole(path),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        write(full)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("new" * 100_000),
        lambda path: pq.write_table(pa.table({"a": np.random.default_rng(0).random(100_000)}), path),
        lambda path: save_file({"a": torch.ones(100_000)}, path),
    ],
)
def test_a_file_that_is_too_large_for_its_disk_is_one_error(write: Callable[[Path], object], tmp_path: Path) -> None:
    """A limit of the process has the system's error of a FAT disk beyond 4 GiB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    too_large = pytest.raises(DiskFullError, match=r"file\.bin could not be written: .* a file's size")
    with too_large, write_whole(tmp_path / "file.bin") as temporary:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            write(temporary)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_folder_of_a_killed_run_goes_and_that_of_a_living_one_stays(tmp_path: Path) -> None:
    final = tmp_path / "parent"
    with unfinished_folder(final) as living:
        killed = shutil.copytree(living, tmp_path / ".parent-killed")
        (killed / "half").write_text("half", encoding="utf-8")
        (tmp_path / ".parent_exports-mine").mkdir()
        with unfinished_folder(final) as folder:
            (folder / "new").mkdir()
            replace_folder(folder / "new", final)
            assert living.exists() and not killed.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"parent", ".parent_exports-mine"}
