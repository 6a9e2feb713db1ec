"""Documents of files of every kind and of hub data sets, and the errors of sources that cannot be read."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.documents import Document, Message, Source
from storage.files import InputError
from storage.text_datasets import Columns, HubDataset, SkippedRows, file_documents, hub_documents

SOURCE = Source("here", "1", "MIT")
ROOT = Path(__file__).parents[2]
TEXT = Columns("text")


def read(file: Path, columns: Columns = TEXT) -> list[Document]:
    documents, _ = read_and_count(file, columns)
    return documents


def read_and_count(file: Path, columns: Columns = TEXT) -> tuple[list[Document], list[str]]:
    """Return documents of a file, and a line for each reason why rows gave none."""
    skipped = SkippedRows(file.name)
    documents = list(file_documents(file, file.name, SOURCE, columns, skipped))
    skipped.check()
    return documents, skipped.lines()


def read_hub(dataset: HubDataset, cache: Path) -> list[Document]:
    return list(hub_documents(dataset, SOURCE, TEXT, cache, SkippedRows(dataset.id)))


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=2))
    else:
        file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json"])
def test_rows_are_documents(tmp_path: Path, suffix: str) -> None:
    rows: list[dict[str, Any]] = [{"body": "first\n\ntext", "n": 1}, {"body": None, "n": 2}, {"body": "third", "n": 3}]
    documents = read(write_rows(tmp_path / f"a{suffix}", rows), Columns("body"))
    assert [document.text for document in documents] == ["first\n\ntext", "third"]
    assert documents[1].path.endswith(f"a{suffix}#2")
    assert documents[0].source == SOURCE


def test_text_files_are_cut_into_pages(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {index}.\nIts second line, " + "word " * 150 + "end." for index in range(40)]
    (tmp_path / "a.txt").write_text("\n\n\n".join(paragraphs))
    documents = read(tmp_path / "a.txt")
    assert len(documents) > 1
    assert "\n\n".join(document.text for document in documents) == "\n\n".join(paragraphs)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_chats(tmp_path: Path, suffix: str) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    (document,) = read(write_rows(tmp_path / f"a{suffix}", [{"chat": turns}]), Columns("text", "chat"))
    assert document.messages == (Message("user", "hi"), Message("assistant", "yo"))
    assert document.content == "hi\n\nyo"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path, suffix: str) -> None:
    file = write_rows(tmp_path / f"a{suffix}", [{"body": "x", "id": 1}])
    with pytest.raises(InputError, match=r"has no column 'text'; it has body, id"):
        read(file)
    with pytest.raises(InputError, match=r"has no column 'chat'; it has body, id"):
        read(file, Columns("body", "chat"))


def test_columns_that_hold_something_else(tmp_path: Path) -> None:
    pq.write_table(pa.table({"t": pa.array([-(10**18)], pa.timestamp("us"))}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t\.parquet cannot be read \(OverflowError: date value out of range\)"):
        read(tmp_path / "t.parquet", Columns("t"))
    with pytest.raises(InputError, match=r"a\.jsonl#0: column 'n' must hold text, found int"):
        read(write_rows(tmp_path / "a.jsonl", [{"n": 1}]), Columns("n"))
    turns = [{"speaker": "human", "says": "hi"}]
    with pytest.raises(InputError, match=r"b\.jsonl#0: column 'chat' must hold messages .* found keys says, speaker"):
        read(write_rows(tmp_path / "b.jsonl", [{"chat": turns}]), Columns("text", "chat"))
    with pytest.raises(InputError, match=r"found str"):
        read(write_rows(tmp_path / "c.jsonl", [{"chat": "hi"}]), Columns("text", "chat"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n'),
        ("a.parquet", b"PAR1 and then nothing"),
        ("a.txt", b"\xff\xfe\x00"),
        ("b.txt", "UTF-16 without its mark".encode("utf-16-le")),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} cannot be read"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_empty_files_hold_no_documents(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert read(tmp_path / name) == []


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"corpus files end in \.parquet, \.jsonl, \.json, \.txt, found '\.csv'"):
        read(tmp_path / "a.csv")


def test_a_json_is_one_list_or_has_a_row_a_line(tmp_path: Path) -> None:
    """Data sets in the wild use the suffix for both."""
    rows: list[dict[str, Any]] = [{"text": "[a] ]\n,"}, {"text": None}, {"text": "b", "n": 1}]
    for name, content in (
        ("indented.json", json.dumps(rows, indent=1)),
        ("one-line.jsonl", json.dumps(rows)),
        ("behind-an-empty-line.json", f"\n{json.dumps(rows)}"),
        ("lines.json", "\n".join(map(json.dumps, rows))),
        ("digits.json", f'[{{"text": "[a] ]\\n,", "n": {"9" * 5_000}}}, {{"text": "b"}}]'),
    ):
        (tmp_path / name).write_text(content)
        assert [document.text for document in read(tmp_path / name)] == ["[a] ]\n,", "b"], name
    assert read(write_rows(tmp_path / "empty.json", [])) == []
    for content, message in (
        ('[{"text": "a"}, 3]', "member 1 of its list: expected a JSON object, found int"),
        ('[{"text": "a"}', r"its list: Expecting .*\); write one row a line, or one list of rows"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "its list: Extra data"),
        ('{\n"rows": []}', r"line 1: Expecting .*or one list of rows"),
        ('[{"body": "a"}]', "has no column 'text'; it has body"),
        ("[" * 100_000, "its list: .*recursion"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(InputError, match=message):
            read(tmp_path / "bad.json")


def test_a_list_that_is_too_long_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.text_datasets._LINE_CHARS", 1_000)
    file = write_rows(tmp_path / "a.json", [{"text": "word " * 10} for _ in range(30)])
    with pytest.raises(InputError, match=r"a\.json is one list of more than 1,000 characters; write one row a line"):
        read(file)


def test_a_name_is_no_pattern(tmp_path: Path) -> None:
    for name in ("[1].jsonl", "1.jsonl", "a*.parquet", "ab.parquet", "q?.jsonl", "qq.jsonl"):
        write_rows(tmp_path / name, [{"text": name}])
    for name in ("[1].jsonl", "a*.parquet", "q?.jsonl"):
        assert [document.text for document in read(tmp_path / name)] == [name]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_other_columns_are_not_read(tmp_path: Path, suffix: str) -> None:
    """One that was null turned into a date after 11 MB, and ended the source."""
    early, late = {"text": "early " * 2_000, "when": None}, {"text": "late", "when": "2024-01-01T00:00:00"}
    if suffix == ".jsonl":
        rows = [json.dumps(early)] * 1_000 + [json.dumps(late), '{"text": "last", "when": [' + "9" * 5_000 + "]}"]
        (tmp_path / "a.jsonl").write_text("\n".join(rows))
        assert [document.text for document in read(tmp_path / "a.jsonl")[-2:]] == ["late", "last"]
    else:
        pq.write_table(
            pa.table({"text": ["a", "b"], "when": pa.nulls(2), "a.text": [{"b": 1}, None]}), tmp_path / "a.parquet"
        )
        assert [document.text for document in read(tmp_path / "a.parquet")] == ["a", "b"]


@pytest.mark.parametrize("table", [pa.table({"text": pa.array([], pa.string())}), pa.table({})])
def test_parts_without_rows_hold_no_documents(tmp_path: Path, table: pa.Table) -> None:
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == []


def test_texts_of_parquet_in_every_type(tmp_path: Path) -> None:
    texts = pa.array(["a", "b"])
    for array in (texts, texts.cast(pa.large_string()), texts.cast(pa.binary()), texts.dictionary_encode()):
        pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
        assert [document.text for document in read(tmp_path / "a.parquet")] == ["a", "b"]


@pytest.mark.parametrize(("suffix", "codec"), [(".gz", "gzip"), (".zst", "zstd")])
def test_compressed_files_are_read_whole(tmp_path: Path, suffix: str, codec: str) -> None:
    """Also those made of several members, as parallel compressors write them; a cut one is an error."""
    parts = [pa.compress(data, codec=codec, asbytes=True) for data in (b'{"text": "a"}\n', b'{"text": "b"}\n')]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(b"".join(parts))
    assert [document.text for document in read(tmp_path / f"a.jsonl{suffix}")] == ["a", "b"]
    (tmp_path / f"a.txt{suffix}").write_bytes(pa.compress(b"one\n\ntwo", codec=codec, asbytes=True))
    assert [document.text for document in read(tmp_path / f"a.txt{suffix}")] == ["one\n\ntwo"]
    (tmp_path / f"cut.jsonl{suffix}").write_bytes(parts[0][:-6])
    with pytest.raises(InputError, match=r"cut\.jsonl.* cannot be read"):
        read(tmp_path / f"cut.jsonl{suffix}")
    (tmp_path / f"empty.jsonl{suffix}").write_bytes(b"")
    assert read(tmp_path / f"empty.jsonl{suffix}") == []


@pytest.mark.parametrize(("name", "content"), [("a.txt", "text"), ("a.jsonl", '{"text": "text"}')])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert [document.text for document in read(tmp_path / name)] == ["text"]


def test_a_text_without_empty_lines_is_cut_somewhere(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a line of text\n" * 200_000 + "x" * 3_000_000)
    documents = read(tmp_path / "a.txt")
    assert len(documents) == 4
    assert sum(len(document.text) for document in documents) > 5_900_000


def test_a_few_rows_that_cannot_be_used_are_counted_and_most_are_an_error(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "x"}] * 90 + [{"text": 3}] * 6 + [{"text": ""}, {"text": None}, {}]
    documents, lines = read_and_count(write_rows(tmp_path / "a.jsonl", rows))
    assert len(documents) == 90
    assert lines == [
        "6 of 99 skipped: column 'text' must hold text, found int (the first is a.jsonl#90)",
        "3 of 99 skipped: no text (the first is a.jsonl#96)",
    ]
    with pytest.raises(InputError, match=r"6 of 11 rows cannot be used, more than 50%; a\.jsonl#5: column 'text' must"):
        read(write_rows(tmp_path / "a.jsonl", rows[85:96]))
    endless = tmp_path / "long.jsonl"
    endless.write_text('{"text": 1}\n' * 2_000)
    with pytest.raises(InputError, match=r"1,000 of 1,000 rows cannot be used"):
        read(endless)


# --- the hub


def test_a_data_set_in_the_form_of_the_hub(tmp_path: Path) -> None:
    """`datasets` reads a folder by the same road as a hub id, which no machine of ours can reach."""
    (tmp_path / "set" / "part").mkdir(parents=True)
    for split in ("train", "test"):
        write_rows(tmp_path / "set" / "part" / f"{split}-0.parquet", [{"text": f"{split} {i}"} for i in range(3)])
    dataset = HubDataset(str(tmp_path / "set"), "main", "test")
    documents = read_hub(dataset, tmp_path / "cache")
    assert [document.text for document in documents] == ["test 0", "test 1", "test 2"]
    with pytest.raises(InputError, match=r"has no split 'other'; it has test, train"):
        read_hub(HubDataset(dataset.id, "main", "other"), tmp_path / "cache")
    with pytest.raises(InputError, match=r"'other' not found"):
        read_hub(HubDataset(dataset.id, "main", "test", "other"), tmp_path / "cache")


def test_a_hub_data_set_of_another_kind_of_file_is_read_by_datasets(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text("text,n\nfirst,1\nsecond,2\n")
    dataset = HubDataset(str(tmp_path / "set"), "main", "train")
    assert [document.text for document in read_hub(dataset, tmp_path / "cache")] == ["first", "second"]


def test_a_hub_data_set_whose_other_columns_change_their_type(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for number, other in enumerate((None, 3, "2024-01-01", {"a": 1})):
        rows = [{"text": f"part {number}", "other": other}]
        write_rows(tmp_path / "set" / f"train-{number}.parquet", rows)
    dataset = HubDataset(str(tmp_path / "set"), "main", "train")
    assert [document.text for document in read_hub(dataset, tmp_path / "c")] == [f"part {i}" for i in range(4)]


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    """In a process of its own, since the hub's library reads HF_HUB_OFFLINE when it is imported."""
    code = (
        "from pathlib import Path; from storage.text_datasets import *; from storage.documents import Source\n"
        "from storage.files import InputError\n"
        "try:\n    next(hub_documents(HubDataset('no/such', 'main', 'train'), Source('s', '1', 'x'), Columns('text'), "
        "Path('cache'), SkippedRows('s')))\n"
        "except InputError as error:\n    print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    )
    assert "hub data set no/such@main cannot be reached" in result.stdout
    assert "HF_HUB_OFFLINE" in result.stdout


def test_a_token_that_no_header_can_hold_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "s3crét")
    with pytest.raises(InputError, match=r"cannot be reached \(UnicodeEncodeError\); check HF_TOKEN, HF_ENDP"):
        read_hub(HubDataset("some/set", "main", "train"), tmp_path)


def test_a_hub_that_hangs_up_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang_up(*_: Any, **__: Any) -> None:
        raise httpx2.RemoteProtocolError("peer closed connection")

    monkeypatch.setattr("datasets.load_dataset_builder", hang_up)
    with pytest.raises(InputError, match=r"cannot be reached \(peer closed connection\)"):
        read_hub(HubDataset("some/set", "main", "train"), tmp_path)
