"""Documents: of the embedded corpus, of files of every kind, and what is said about sources that cannot be read."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.files import InputError
from tasks.puzzle import corpora
from tasks.puzzle.corpora import (
    DESCRIBED_PACKAGES,
    DOCSTRING_PACKAGES,
    PAGE_CHARS,
    Columns,
    Document,
    HubDataset,
    Message,
    Source,
    docstrings,
    embedded_documents,
    embedded_versions,
    file_documents,
    hub_documents,
    pages,
)

SOURCE = Source("here", "1", "MIT")
ROOT = Path(__file__).parents[2]


TEXT = Columns("text")


def read(file: Path, columns: Columns = TEXT) -> list[Document]:
    return list(file_documents(file, str(file), SOURCE, columns, file.parent / "cache"))


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


# --- pages and docstrings


def test_pages_are_cut_between_paragraphs_only() -> None:
    paragraphs = [f"{index} " + "x" * 900 for index in range(20)] + ["", "   \n"]
    result = list(pages(paragraphs))
    assert "\n\n".join(result).split("\n\n") == paragraphs[:20]
    assert all(len(page) <= PAGE_CHARS for page in result)
    assert len(result) == 7, "3 paragraphs fit on a page"
    assert list(pages(["y" * 3 * PAGE_CHARS])) == ["y" * 3 * PAGE_CHARS], "a paragraph is never cut"


def test_docstrings_stand_under_their_signatures(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        '"""Module."""\nimport nothing_that_exists\n\n'
        'def f(a, *, b: int = 2):\n    """Does f.\n\n    More.\n    """\n\n'
        'class C:\n    """A class."""\n    def g(self):\n        """Does g."""\n    def quiet(self): ...\n'
        '    class D:\n        async def h(self):\n            "Does h."\n'
    )
    assert docstrings(tmp_path / "m.py", "pkg.m") == [
        "pkg.m\n\nModule.",
        "pkg.m.f(a, *, b: int=2)\n\nDoes f.\n\nMore.",
        "pkg.m.C\n\nA class.",
        "pkg.m.C.g(self)\n\nDoes g.",
        "pkg.m.C.D.h(self)\n\nDoes h.",
    ]
    (tmp_path / "future.py").write_text("def f() = 3\n")
    assert docstrings(tmp_path / "future.py", "future") == []


# --- the embedded corpus


def test_embedded_documents_repeat_with_the_seed_and_name_their_sources() -> None:
    first = list(islice(embedded_documents(0), 60))
    assert first == list(islice(embedded_documents(0), 60))
    assert first != list(islice(embedded_documents(1), 60))
    assert {"torch", "python standard library"} <= {document.source.name for document in first}
    assert all(document.source.version and document.source.licence for document in first)
    assert all(document.text.strip() for document in first)
    assert not [document.path for document in first if re.search(r"(^|/)(tests?|testing)/", document.path)]


def test_embedded_corpus_imports_none_of_its_packages() -> None:
    code = (
        "import sys; from itertools import islice; from tasks.puzzle.corpora import embedded_documents; "
        "list(islice(embedded_documents(0), 50)); print({'torch', 'pandas', 'datasets'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_every_part_of_the_embedded_corpus_has_text() -> None:
    parts = list(corpora._embedded_parts())
    names = {part.source.name for part in parts}
    assert names == {"python standard library", *DOCSTRING_PACKAGES, *DESCRIBED_PACKAGES}
    described = [part for part in parts if part.path == "description"]
    assert all(sum(map(len, part.paragraphs())) > 1_000 for part in described), "a long description each"
    topics = [part for part in parts if part.path.startswith("topics/")]
    assert sum(len(paragraph) for part in topics for paragraph in part.paragraphs()) > 400_000


def test_the_embedded_corpus_reads_pinned_packages_only() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {re.split(r"[=<>!~ ]", line)[0].lower().replace("_", "-") for line in lines}
    assert {*DOCSTRING_PACKAGES, *DESCRIBED_PACKAGES} <= pinned


def test_versions_are_the_installed_ones() -> None:
    versions = embedded_versions()
    assert versions["numpy"] == importlib.metadata.version("numpy")
    assert set(versions) == {"python", *DOCSTRING_PACKAGES, *DESCRIBED_PACKAGES}


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "DESCRIBED_PACKAGES", ("no-such-package-here",))
    with pytest.raises(InputError, match=r"no-such-package-here, which is not installed.*constraints\.txt"):
        next(embedded_documents(0))


def test_a_python_without_sources_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match=r"reads the \.py files of python standard library .* there are none"):
        next(embedded_documents(0))


# --- files


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
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
    with pytest.raises(InputError, match=r"a\.jsonl#0: column 'n' must hold text, found int"):
        read(write_rows(tmp_path / "a.jsonl", [{"n": 1}]), Columns("n"))
    turns = [{"from": "human", "value": "hi"}]
    with pytest.raises(InputError, match=r"b\.jsonl#0, column chat must hold messages .* found keys from, value"):
        read(write_rows(tmp_path / "b.jsonl", [{"chat": turns}]), Columns("text", "chat"))
    with pytest.raises(InputError, match=r"found str"):
        read(write_rows(tmp_path / "c.jsonl", [{"chat": "hi"}]), Columns("text", "chat"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b'{"text": "a"}\n{"text": \n'), ("a.parquet", b"PAR1 and then nothing"), ("a.txt", b"\xff\xfe\x00")],
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
    with pytest.raises(InputError, match=r"corpus files end in \.parquet, \.jsonl, \.txt, found '\.csv'"):
        read(tmp_path / "a.csv")


# --- the hub


def test_a_data_set_in_the_form_of_the_hub(tmp_path: Path) -> None:
    """`datasets` reads a folder by the same road as a hub id, which no machine of ours can reach."""
    (tmp_path / "set" / "part").mkdir(parents=True)
    for split in ("train", "test"):
        write_rows(tmp_path / "set" / "part" / f"{split}-0.parquet", [{"text": f"{split} {i}"} for i in range(3)])
    dataset = HubDataset(str(tmp_path / "set"), "main", "test")
    documents = list(hub_documents(dataset, SOURCE, Columns("text"), tmp_path / "cache"))
    assert [document.text for document in documents] == ["test 0", "test 1", "test 2"]
    with pytest.raises(InputError, match=r"Bad split: other"):
        list(hub_documents(HubDataset(dataset.id, "main", "other"), SOURCE, Columns("text"), tmp_path / "cache"))
    with pytest.raises(InputError, match=r"'other' not found"):
        list(hub_documents(HubDataset(dataset.id, "main", "test", "other"), SOURCE, Columns("text"), tmp_path / "c"))


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    """In a process of its own, since the hub's library reads HF_HUB_OFFLINE when it is imported."""
    code = (
        "from pathlib import Path; from tasks.puzzle.corpora import *; from storage.files import InputError\n"
        "try:\n    next(hub_documents(HubDataset('no/such', 'main', 'train'), Source('s', '1', 'x'), Columns('text'), "
        "Path('cache')))\n"
        "except InputError as error:\n    print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    )
    assert "hub data set no/such@main cannot be reached" in found.stdout
    assert "HF_HUB_OFFLINE" in found.stdout
