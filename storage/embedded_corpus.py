"""The embedded corpus: documents that need no download, read from what is installed.

Reference topics and docstrings of the Python standard library, docstrings of torch, numpy and pandas, and the long
descriptions of a fixed list of packages that constraints.txt pins. It is technical prose in English. Sources are
parsed, never imported, and in an order that depends only on their names and the seed, so a small corpus parses only a
small part. All of it is 3.8 million tokens of the SmolLM2 tokenizer once repeats are out, read in 17 seconds (measured
on two busy cores).
"""

import ast
import functools
import importlib.metadata
import importlib.util
import platform
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from storage.documents import PAGE_CHARS, Document, Source, order_key, pages
from storage.files import InputError

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
# Tests hold no prose; the second set is what systems install apart from the standard library, or generate.
_NOT_PROSE = {"test", "tests", "testing", "_testing", "idle_test", "conftest.py"}
_NOT_ON_EVERY_SYSTEM = {
    *("site-packages", "dist-packages", "idlelib", "tkinter", "turtledemo", "turtle.py", "lib2to3", "distutils"),
    *("ensurepip", "sitecustomize.py", "usercustomize.py", "pydoc_data"),
}
_BADGE = re.compile(
    r"^\s*(\[?!\[|<[^>]*>|\.\. (image::|\||_)|:(target|alt|height|width|scale):|\|[^|]*\|\s*$).*$", re.M
)


def embedded_versions() -> dict[str, str]:
    """Return versions of everything that the embedded corpus reads: they decide its text."""
    names = sorted({*DOCSTRING_PACKAGES, *DESCRIBED_PACKAGES})
    return {"python": platform.python_version(), **{name: _distribution(name).version for name in names}}


def embedded_documents(seed: int) -> Iterator[Document]:
    """Yield documents of the embedded corpus: pages of one module's docstrings, of one topic, of one description.

    Args:
        seed: orders the modules, topics and packages.

    Raises:
        InputError: a package of the fixed list is not installed, or Python's sources or topics are missing.
    """
    parts = sorted(_embedded_parts(), key=lambda part: order_key(seed, f"{part.source.name}/{part.path}"))
    for part in parts:
        for index, page in enumerate(pages(_no_longer_than_a_page(part.paragraphs()))):
            yield Document(page, part.source, f"{part.path}#{index}")


def _no_longer_than_a_page(sections: Iterable[str]) -> Iterator[str]:
    """Yield docstrings as they are; a docstring that is longer than a page is cut into its paragraphs."""
    for section in sections:
        yield from [section] if len(section) <= PAGE_CHARS else section.split("\n\n")


@dataclass(frozen=True)
class _Part:
    """A module, topic or description; `paragraphs` reads it."""

    source: Source
    path: str
    paragraphs: Callable[[], Iterable[str]]


def _embedded_parts() -> Iterator[_Part]:
    python = Source("python standard library", platform.python_version(), "PSF-2.0")
    library = Path(sysconfig.get_path("stdlib"))
    yield from _modules(python, library, _NOT_PROSE | _NOT_ON_EVERY_SYSTEM)
    yield from _topics(python, library / "pydoc_data" / "topics.py")
    for name in DOCSTRING_PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                f"the embedded corpus reads docstrings of {name}, which is not installed; run `make setup`"
            )
        yield from _modules(_package(name), Path(spec.submodule_search_locations[0]), _NOT_PROSE)
    for name in DESCRIBED_PACKAGES:
        yield _description(name)


def _modules(source: Source, root: Path, left_out: set[str]) -> Iterator[_Part]:
    files = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    files = [file for file in files if not left_out.intersection(file.parts) and not _generated(file)]
    if not files:
        raise InputError(f"the embedded corpus reads the .py files of {source.name} in {root}, but finds none")
    for file in files:
        names = [part for part in (root.name, *file.with_suffix("").parts) if part != "__init__"]
        module = ".".join(names[1:] if source.licence == "PSF-2.0" else names)
        yield _Part(source, file.as_posix(), functools.partial(docstrings, root / file, module))


def _generated(file: Path) -> bool:
    return file.parts[0].startswith(("config-", "_sysconfigdata"))


def docstrings(path: Path, module: str) -> list[str]:
    """Return docstrings of a Python file in order, each under its name and signature.

    Args:
        path: source file; a file whose syntax this Python does not know gives no docstrings.
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
    """Yield the language reference that `help()` shows: a dictionary of strings in pydoc_data/topics.py."""
    tree = ast.parse(path.read_bytes()) if path.is_file() else ast.Module([], [])
    assigned = [node.value for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    topics: dict[str, str] = ast.literal_eval(assigned[-1]) if assigned and assigned[-1] else {}
    if not topics:
        raise InputError(f"the embedded corpus reads Python's reference topics in {path}, but finds none")
    for name, text in sorted(topics.items()):
        yield _Part(source, f"topics/{name}", functools.partial(text.split, "\n\n"))


def _description(name: str) -> _Part:
    text = _BADGE.sub("", str(_distribution(name).metadata.json.get("description", "")))
    return _Part(_package(name), "description", functools.partial(text.split, "\n\n"))


def _package(name: str) -> Source:
    """Return a source that names a package by its metadata; a whole text as licence is named by its classifiers."""
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
            "install what constraints.txt pins (`make setup`)"
        ) from None
