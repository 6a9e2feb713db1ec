"""Finished pieces: what counts as done, and what is deleted."""

import json
from pathlib import Path

import pytest

from storage.files import DamagedFileError, InputError
from storage.pieces import Pieces
from tests.tiny import flip_byte

REBUILD = "dvc repro stage"


def make(folder: Path, name: str, key: str = "key", files: int = 1) -> list[Path]:
    """Make a finished piece with files in a folder of its own."""
    paths = [folder / name / f"{index}.bin" for index in range(files)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{name} {path.name}".encode() * 100)
    Pieces(folder, REBUILD).finish(name, key, paths, {"rows": 3})
    return paths


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_finished_piece_is_done_under_its_key_only(tmp_path: Path) -> None:
    make(tmp_path, "shard", "key", files=2)
    pieces = Pieces(tmp_path, REBUILD)
    assert pieces.done("shard", "key")
    assert not pieces.done("shard", "another key")
    assert not pieces.done("another", "key")
    assert pieces.get("shard")["facts"] == {"rows": 3}
    assert set(pieces.get("shard")["files"]) == {"shard/0.bin", "shard/1.bin"}
    assert pieces.names() == ["shard"]


def test_a_name_with_dots_is_kept(tmp_path: Path) -> None:
    make(tmp_path, "block_001.kv_1")
    assert Pieces(tmp_path, REBUILD).names() == ["block_001.kv_1"]


@pytest.mark.parametrize("position", [0, 57, -1])
def test_a_flipped_byte_undoes_a_piece(position: int, tmp_path: Path) -> None:
    _, second = make(tmp_path, "shard", files=2)
    flip_byte(second, position)
    assert not Pieces(tmp_path, REBUILD).done("shard", "key")


def test_a_missing_or_shortened_file_undoes_a_piece(tmp_path: Path) -> None:
    first, second = make(tmp_path, "shard", files=2)
    first.write_bytes(first.read_bytes()[:-1])
    assert not Pieces(tmp_path, REBUILD).done("shard", "key")
    make(tmp_path, "shard", files=2)
    second.unlink()
    assert not Pieces(tmp_path, REBUILD).done("shard", "key")


@pytest.mark.parametrize("text", ["{", "[]", "null", "3", '{"key": "key"}', ""])
def test_a_record_that_is_no_record_is_damage(text: str, tmp_path: Path) -> None:
    make(tmp_path, "shard")
    (tmp_path / ".pieces" / "shard.json").write_text(text)
    pieces = Pieces(tmp_path, REBUILD)
    assert not pieces.done("shard", "key")
    with pytest.raises(DamagedFileError, match=r"shard.json is .*; run `dvc repro stage`"):
        pieces.get("shard")


@pytest.mark.parametrize("field", ["key", "files", "facts"])
def test_an_altered_record_is_damage(field: str, tmp_path: Path) -> None:
    make(tmp_path, "shard")
    path = tmp_path / ".pieces" / "shard.json"
    record = json.loads(path.read_text())
    record[field] = "other" if field == "key" else {}
    path.write_text(json.dumps(record))
    pieces = Pieces(tmp_path, REBUILD)
    assert not pieces.done("shard", "key")
    with pytest.raises(DamagedFileError, match=r"its seal does not fit.*dvc repro stage"):
        pieces.record("shard")


def test_a_fact_that_is_nan_keeps_its_seal(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    Pieces(tmp_path, REBUILD).finish("piece", "key", [tmp_path / "file"], {"loss": float("nan")})
    assert Pieces(tmp_path, REBUILD).done("piece", "key"), "a variant that diverged must not be trained for ever"


def test_a_piece_that_is_not_there_names_the_command(tmp_path: Path) -> None:
    make(tmp_path, "shard_0")
    assert Pieces(tmp_path, REBUILD).record("shard_1") is None
    with pytest.raises(InputError, match=r"no piece 'shard_1' \(has 1: shard_0…\); run `dvc repro stage`"):
        Pieces(tmp_path, REBUILD).get("shard_1")


def test_a_fact_that_another_version_wrote_otherwise_names_the_command(tmp_path: Path) -> None:
    pieces = Pieces(tmp_path, "dvc repro stage")
    pieces.finish("one", "key", [], {"old_name": 1})
    facts = pieces.get("one")["facts"]
    assert (facts["old_name"], facts.get("new_name")) == (1, None)
    with pytest.raises(InputError, match=r"one\.json has no new_name: .*; run `dvc repro stage`$"):
        facts["new_name"]


def test_keep_only_deletes_strangers_and_keeps_what_is_finished(tmp_path: Path) -> None:
    kept = make(tmp_path, "kept", files=2)
    make(tmp_path, "of another key", key="old")
    [damaged] = make(tmp_path, "damaged")
    flip_byte(damaged)
    make(tmp_path, "no longer wanted")
    (tmp_path / "kept" / "stranger.bin").write_text("half written")
    (tmp_path / "index.parquet").write_text("of the earlier run")
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    times = [path.stat().st_mtime_ns for path in kept]
    keys = dict.fromkeys(("new", "kept", "damaged", "of another key"), "key")
    assert Pieces(tmp_path, REBUILD).keep_only(keys) == ["new", "damaged", "of another key"]
    assert names(tmp_path) == {".pieces/kept.json", "kept/0.bin", "kept/1.bin"}
    assert {path.name for path in tmp_path.iterdir()} == {".pieces", "kept"}
    assert [path.stat().st_mtime_ns for path in kept] == times


def test_keep_only_of_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert Pieces(tmp_path / "none", REBUILD).keep_only({"a": "1", "b": "2"}) == ["a", "b"]
    assert not (tmp_path / "none").exists()


def test_keep_only_keeps_a_piece_without_files(tmp_path: Path) -> None:
    Pieces(tmp_path, REBUILD).finish("rows", "", [], {"row": [1]})
    assert Pieces(tmp_path, REBUILD).keep_only({"rows": ""}) == []
    assert Pieces(tmp_path, REBUILD).get("rows")["facts"] == {"row": [1]}
