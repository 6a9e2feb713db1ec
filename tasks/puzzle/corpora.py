"""Where text comes from: documents of the embedded corpus, of local files and of hub data sets, one after the other.

The embedded corpus needs no download: reference topics and docstrings of the Python standard library, docstrings of
torch, numpy and pandas, and the long descriptions of a fixed list of packages that constraints.txt pins. It is
technical prose in English. Sources are parsed, never imported, and in an order that depends only on their names and
the seed, so whoever takes a small corpus parses only a small part. All of it is 3.8 million tokens of the SmolLM2
tokenizer once repeats are out, read in 17 seconds (measured on two busy cores).
"""

import ast
import errno
import functools
import hashlib
import importlib.metadata
import importlib.util
import platform
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.files import InputError

PAGE_CHARS = 3_000
"""A page ends before the paragraph that would carry it beyond this (about 800 tokens): small, so that even the 2,000
tokens that a score is measured on come from several documents."""

DOCSTRING_PACKAGES = ("torch", "numpy", "pandas")
DESCRIBED_PACKAGES = (
    "aiobotocore",
    "attrs",
    "celery",
    "charset-normalizer",
    "datasets",
    "dill",
    "dpath",
    "dvc",
    "fastapi",
    "frozenlist",
    "gitpython",
    "h11",
    "httpx",
    "huggingface-hub",
    "humanize",
    "kombu",
    "mpmath",
    "pandas",
    "prefect",
    "propcache",
    "psutil",
    "pydot",
    "pygtrie",
    "regex",
    "rich",
    "sqlalchemy",
    "sympy",
    "tokenizers",
    "torch",
    "transformers",
    "typer",
    "urllib3",
    "voluptuous",
    "xxhash",
)
_LICENCE_NAME_CHARS = 200
_FILE_KINDS = {".parquet": "parquet", ".jsonl": "json", ".txt": "text"}
# Tests are no prose; the rest of the standard library's list is what systems install apart or generate.
_NOT_PROSE = {"test", "tests", "testing", "_testing", "idle_test", "conftest.py"}
_NOT_EVERYWHERE = {
    *("site-packages", "dist-packages", "idlelib", "tkinter", "turtledemo", "turtle.py", "lib2to3", "distutils"),
    *("ensurepip", "sitecustomize.py", "usercustomize.py", "pydoc_data"),
}
_BADGE = re.compile(
    r"^\s*(\[?!\[|<[^>]*>|\.\. (image::|\||_)|:(target|alt|height|width|scale):|\|[^|]*\|\s*$).*$", re.M
)


@dataclass(frozen=True, order=True)
class Source:
    """Where a document comes from, as the manifest names it."""

    name: str
    version: str
    licence: str


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """One document: plain `text`, or a chat (`messages`, and then `text` is empty until the template renders them)."""

    text: str
    source: Source
    path: str
    messages: tuple[Message, ...] = ()

    @property
    def content(self) -> str:
        """All its text, without the marks of a chat template."""
        return self.text or "\n\n".join(message.content for message in self.messages)


def pages(paragraphs: Iterable[str]) -> Iterator[str]:
    """Group paragraphs into texts of about PAGE_CHARS, cut only between paragraphs; empty ones vanish."""
    page: list[str] = []
    length = 0
    for paragraph in paragraphs:
        text = paragraph.strip("\n")
        if not text.strip():
            continue
        if page and length + len(text) > PAGE_CHARS:
            yield "\n\n".join(page)
            page, length = [], 0
        page.append(text)
        length += len(text) + 2
    if page:
        yield "\n\n".join(page)


# --- the embedded corpus ---------------------------------------------------------------------------------------------


def embedded_versions() -> dict[str, str]:
    """Versions of everything that the embedded corpus reads: they decide its text."""
    names = sorted({*DOCSTRING_PACKAGES, *DESCRIBED_PACKAGES})
    return {"python": platform.python_version(), **{name: _distribution(name).version for name in names}}


def embedded_documents(seed: int) -> Iterator[Document]:
    """Documents of the embedded corpus: pages of one module's docstrings, of one topic, of one description.

    Args:
        seed: orders the modules, topics and packages.

    Raises:
        InputError: a package of the fixed list is not installed, or sources or topics are not there.
    """
    parts = sorted(_embedded_parts(), key=lambda part: order_key(seed, f"{part.source.name}/{part.path}"))
    for part in parts:
        for index, page in enumerate(pages(_no_longer_than_a_page(part.paragraphs()))):
            yield Document(page, part.source, f"{part.path}#{index}")


def _no_longer_than_a_page(sections: Iterable[str]) -> Iterator[str]:
    """Docstrings as they are, and the paragraphs of those that no page holds."""
    for section in sections:
        yield from [section] if len(section) <= PAGE_CHARS else section.split("\n\n")


def order_key(seed: int, name: str) -> bytes:
    """Where something stands in an order that looks random, and depends on nothing but its name and the seed."""
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16, salt=_salt(seed)).digest()


def _salt(seed: int) -> bytes:
    return hashlib.blake2b(str(seed).encode(), digest_size=16).digest()


@dataclass(frozen=True)
class _Part:
    """A module, topic or description; `paragraphs` reads it."""

    source: Source
    path: str
    paragraphs: Callable[[], Iterable[str]]


def _embedded_parts() -> Iterator[_Part]:
    python = Source("python standard library", platform.python_version(), "PSF-2.0")
    library = Path(sysconfig.get_path("stdlib"))
    yield from _modules(python, library, _NOT_PROSE | _NOT_EVERYWHERE)
    yield from _topics(python, library / "pydoc_data" / "topics.py")
    for name in DOCSTRING_PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                f"the embedded corpus reads docstrings of {name}, which is not installed; run `make install`"
            )
        yield from _modules(_package(name), Path(spec.submodule_search_locations[0]), _NOT_PROSE)
    for name in DESCRIBED_PACKAGES:
        yield _description(name)


def _modules(source: Source, root: Path, left_out: set[str]) -> Iterator[_Part]:
    files = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    files = [file for file in files if not left_out.intersection(file.parts) and not _generated(file)]
    if not files:
        raise InputError(f"the embedded corpus reads the .py files of {source.name} in {root}, and there are none")
    for file in files:
        names = [part for part in (root.name, *file.with_suffix("").parts) if part != "__init__"]
        module = ".".join(names[1:] if source.licence == "PSF-2.0" else names)
        yield _Part(source, file.as_posix(), functools.partial(docstrings, root / file, module))


def _generated(file: Path) -> bool:
    return file.parts[0].startswith(("config-", "_sysconfigdata"))


def docstrings(path: Path, module: str) -> list[str]:
    """Docstrings of a Python file in order, each under its name and signature.

    Args:
        path: source file; one whose syntax this Python does not know gives nothing.
        module: dotted name that the signatures begin with.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # ValueError: null bytes
            return []
    return list(_docstrings_within(tree, module))


def _docstrings_within(node: ast.Module | ast.ClassDef, name: str) -> Iterator[str]:
    if text := ast.get_docstring(node):
        yield f"{name}\n\n{text}"
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _docstrings_within(child, f"{name}.{child.name}")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(child)):
            yield f"{name}.{child.name}({ast.unparse(child.args)})\n\n{text}"


def _topics(source: Source, path: Path) -> Iterator[_Part]:
    """The language reference that `help()` shows: a dictionary of strings in pydoc_data/topics.py."""
    tree = ast.parse(path.read_bytes()) if path.is_file() else ast.Module([], [])
    found = [node.value for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    topics: dict[str, str] = ast.literal_eval(found[-1]) if found and found[-1] else {}
    if not topics:
        raise InputError(f"the embedded corpus reads Python's reference topics in {path}, and there are none")
    for name, text in sorted(topics.items()):
        yield _Part(source, f"topics/{name}", functools.partial(text.split, "\n\n"))


def _description(name: str) -> _Part:
    text = _BADGE.sub("", str(_distribution(name).metadata.json.get("description", "")))
    return _Part(_package(name), "description", functools.partial(text.split, "\n\n"))


def _package(name: str) -> Source:
    """A package as its metadata names it; a licence given as a whole text is named by its classifiers instead."""
    facts = _distribution(name).metadata.json
    prefix = "License :: "
    classifiers = [line.rsplit(" :: ")[-1] for line in facts.get("classifier", []) if line.startswith(prefix)]
    stated = " ".join(str(facts.get("license_expression") or facts.get("license") or "").split())
    named = stated if 0 < len(stated) <= _LICENCE_NAME_CHARS else ", ".join(classifiers)
    return Source(name, _distribution(name).version, named or "not stated")


def _distribution(name: str) -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            f"the embedded corpus reads the package {name}, which is not installed; "
            "install what constraints.txt pins (`make install`)"
        ) from None


# --- files and hub data sets -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """The column that holds the text, or the one that holds chat messages ({role, content} each)."""

    text: str
    messages: str | None = None


def file_kind(name: str) -> str:
    """The loader of `datasets` for a file name.

    Raises:
        InputError: an unknown suffix.
    """
    suffix = Path(name).suffix.lower()
    if suffix not in _FILE_KINDS:
        raise InputError(f"{name}: corpus files end in {', '.join(_FILE_KINDS)}, found {suffix or 'no suffix'!r}")
    return _FILE_KINDS[suffix]


def file_documents(file: Path, address: str, source: Source, columns: Columns, cache: Path) -> Iterator[Document]:
    """Documents of a file: a row of .parquet and .jsonl each; a .txt is cut into pages between paragraphs.

    Args:
        file: local file.
        address: what messages call it, where it was fetched from elsewhere.
        source: what the manifest says about it.
        columns: where the text is; a .txt has one column, `text`.
        cache: folder for what `datasets` writes.

    Raises:
        InputError: damaged file, missing column (with the columns that it has), a row that is not text.
    """
    kind = file_kind(file.name)
    options = {"sample_by": "paragraph"} if kind == "text" else {}
    rows = _rows(address, kind, cache, data_files=[str(file)], split="train", **options)
    documents = _documents(rows, source, address, columns)
    if kind != "text":
        return documents
    texts = enumerate(pages(document.text for document in documents))
    return (Document(page, source, f"{address}#{index}") for index, page in texts)


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face hub; `subset` is its configuration, where it has several."""

    id: str
    revision: str
    split: str
    subset: str | None = None


def hub_documents(dataset: HubDataset, source: Source, columns: Columns, cache: Path) -> Iterator[Document]:
    """Documents of a hub data set, a row each, streamed: only what is packed is downloaded.

    Raises:
        InputError: the hub cannot be reached, the data set or the column does not exist, a row is not text.
    """
    where = f"hub data set {dataset.id}@{dataset.revision}"
    rows = _rows(where, dataset.id, cache, name=dataset.subset, revision=dataset.revision, split=dataset.split)
    return _documents(rows, source, dataset.id, columns)


def _rows(where: str, loader: str, cache: Path, **options: Any) -> Iterator[Mapping[str, Any]]:
    """Rows of a data set, streamed; what goes wrong becomes an InputError."""
    import datasets  # three seconds that the embedded corpus need not pay
    import httpx

    try:
        yield from datasets.load_dataset(loader, streaming=True, cache_dir=str(cache), **options)
    except StopIteration:  # a file without a first row
        return
    except (ConnectionError, httpx.HTTPError) as error:
        raise InputError(
            f"{where} cannot be reached ({_one_line(error)}); check the network and HF_HUB_OFFLINE, "
            "or give local files (kind: files)"
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"{where} cannot be read ({type(error).__name__}: {_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _documents(rows: Iterable[Mapping[str, Any]], source: Source, where: str, columns: Columns) -> Iterator[Document]:
    """A document per row; rows without text vanish."""
    wanted = columns.messages or columns.text
    for index, row in enumerate(rows):
        if wanted not in row:
            raise InputError(f"{where} has no column {wanted!r}; it has {', '.join(sorted(row))}")
        place = f"{where}#{index}"
        if columns.messages:
            yield Document("", source, place, _messages(row[wanted], f"{place}, column {wanted}"))
        elif isinstance(row[wanted], str):
            yield Document(row[wanted], source, place)
        elif row[wanted] is not None:
            raise InputError(f"{place}: column {wanted!r} must hold text, found {type(row[wanted]).__name__}")


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    """The turns of a chat: a list of {role, content}, other keys are left out."""
    turns: list[Any] = value if isinstance(value, list) and value else [None]
    for turn in turns:
        texts = [turn.get(key) for key in ("role", "content")] if isinstance(turn, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            found = f"keys {', '.join(sorted(turn))}" if isinstance(turn, Mapping) else type(value).__name__
            raise InputError(f"{where} must hold messages with the texts `role` and `content`, found {found}")
    return tuple(Message(turn["role"], turn["content"]) for turn in turns)
