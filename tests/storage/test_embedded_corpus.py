"""The embedded corpus: docstrings under their signatures, every source has text, a missing package is named."""

import importlib.metadata
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from storage import embedded_corpus
from storage.embedded_corpus import (
    DESCRIBED_PACKAGES,
    DOCSTRING_PACKAGES,
    docstrings,
    embedded_documents,
    embedded_versions,
)
from storage.files import InputError

ROOT = Path(__file__).parents[2]


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
        "import sys; from itertools import islice; from storage.embedded_corpus import embedded_documents; "
        "list(islice(embedded_documents(0), 50)); print({'torch', 'pandas', 'datasets'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_every_part_of_the_embedded_corpus_has_text() -> None:
    parts = list(embedded_corpus._embedded_parts())
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
    monkeypatch.setattr(embedded_corpus, "DESCRIBED_PACKAGES", ("no-such-package-here",))
    with pytest.raises(InputError, match=r"no-such-package-here, which is not installed.*constraints\.txt"):
        next(embedded_documents(0))


def test_a_python_without_sources_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match=r"reads the \.py files of python standard library .* but finds none"):
        next(embedded_documents(0))
