"""Documents of text files and of data sets of the Hugging Face hub, row by row.

In: a file (.parquet, .jsonl, .json, .txt; all but the first also as .gz or .zst) or the id of a data set, and the
column that holds the text or the chat. Out: documents, streamed, so that only what is packed is read. Of a row only
that column is read: what others hold, or how their types change, does not matter. A .json holds one list of rows, or a
row a line as a .jsonl does. Rows that give no document are counted in `SkippedRows`.
"""

import contextlib
import errno
import io
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from storage.chats import NoChatError, messages_of
from storage.documents import Document, Source, pages
from storage.files import InputError
from storage.remote import HUB_SETTINGS

LOST_SHARE = 0.5
"""A source of which more than this share of rows cannot be used is an error; fewer are skipped, with a line for each
reason."""

_CODECS = {".gz": "gzip", ".zst": "zstd"}
_KINDS = (".parquet", ".jsonl", ".json", ".txt")
_ROWS_BEFORE_CHECK = 1_000
_MOST_REASONS = 8
_NO_TEXT = "no text"
_LINE_CHARS = 1 << 26
_PARAGRAPH_CHARS = 1 << 20
_ROWS_PER_BATCH = 256
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Columns:
    """The column that holds the text, or the column that holds chat messages (storage/chats.py)."""

    text: str
    messages: str | None = None

    @property
    def name(self) -> str:
        """Return the column that is read."""
        return self.messages or self.text


@dataclass
class SkippedRows:
    """The rows of a source that gave no document, by reason; those without any text are no loss."""

    address: str
    rows: int = 0
    lost: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    places: dict[str, str] = field(default_factory=dict)
    next_check: int = _ROWS_BEFORE_CHECK

    def count(self) -> None:
        """Count a row that is read.

        Raises:
            InputError: too many of the rows so far are lost.
        """
        if self.rows == self.next_check:
            self.next_check *= 2
            self.check()
        self.rows += 1

    def skip(self, reason: str, place: str) -> None:
        """Count the row at `place`, which gives no document."""
        self.lost += reason != _NO_TEXT
        if reason not in self.reasons and len(self.reasons) >= _MOST_REASONS:
            reason = "other reasons"
        self.reasons[reason] += 1
        self.places.setdefault(reason, place)

    def check(self) -> None:
        """Raise InputError if more than LOST_SHARE of the rows that were read are lost."""
        if self.lost > LOST_SHARE * self.rows:
            reason = next(reason for reason, _ in self.reasons.most_common() if reason != _NO_TEXT)
            raise InputError(
                f"{self.address}: {self.lost:,} of {self.rows:,} rows cannot be used, more than {LOST_SHARE:.0%}; "
                f"{self.places[reason]}: {reason}; name another column (`text`, `messages`), or mend the rows"
            )

    def lines(self) -> list[str]:
        """Return a line for each reason: `412 of 90,000 skipped: ...`."""
        return [
            f"{count:,} of {self.rows:,} skipped: {reason} (the first is {self.places[reason]})"
            for reason, count in self.reasons.most_common()
        ]

    def log(self) -> None:
        """Say what was skipped."""
        for line in self.lines():
            _log.warning("%s: %s", self.address, line)


def file_kind(name: str) -> str:
    """Return the suffix of a corpus file without that of its compression: .parquet, .jsonl, .json or .txt.

    Raises:
        InputError: another suffix.
    """
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in _CODECS else (suffixes or [""])[-1]
    if kind not in _KINDS or (kind == ".parquet" and suffixes[-1] != kind):
        ends = "".join(suffixes[-2:] if suffixes and suffixes[-1] in _CODECS else suffixes[-1:]) or "no suffix"
        raise InputError(
            f"{name}: corpus files end in {', '.join(_KINDS)}, found {ends!r} (all but .parquet may be compressed: "
            f"{', '.join(_CODECS)})"
        )
    return kind


def file_documents(
    file: Path, address: str, source: Source, columns: Columns, skipped: SkippedRows
) -> Iterator[Document]:
    """Yield documents of a file: one per row of .parquet, .jsonl and .json; a .txt is cut into pages at paragraphs.

    Args:
        file: local file; its name is no pattern.
        address: the name of the file in messages: where it was fetched from.
        source: the source that the manifest names.
        columns: the column of the text; a .txt has none.
        skipped: counts the rows, and those that give no document.

    Raises:
        InputError: the file is damaged, the column is missing (the message has those that exist), or most rows hold
            something else.
    """
    if file_kind(file.name) != ".txt":
        yield from _documents(_values(str(file), address, columns.name), source, address, columns, skipped)
        return
    with _explained(address), _text_lines(str(file), _PARAGRAPH_CHARS) as lines:
        for index, page in enumerate(pages(_paragraphs(lines))):
            yield Document(page, source, f"{address}#{index}")


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face hub; `subset` is its configuration, where it has several."""

    id: str
    revision: str
    split: str
    subset: str | None = None


def hub_documents(
    dataset: HubDataset, source: Source, columns: Columns, cache: Path, skipped: SkippedRows
) -> Iterator[Document]:
    """Yield documents of a hub data set, one for each row, streamed: only what is packed is downloaded.

    Raises:
        InputError: the hub cannot be reached, the data set, the split or the column does not exist, or most rows hold
            something else.
    """
    yield from _documents(_hub_values(dataset, columns.name, cache), source, dataset.id, columns, skipped)


def _hub_values(dataset: HubDataset, column: str, cache: Path) -> Iterator[Any]:
    """Yield values of a hub data set's column: of its files where they are of our kinds, else as `datasets` reads it.

    `datasets` casts every row to the types of the first ones, also columns that nobody asks for.
    """
    import datasets

    address = f"hub data set {dataset.id}@{dataset.revision}"
    options = {"name": dataset.subset, "revision": dataset.revision, "cache_dir": str(cache)}
    with _explained_hub(address):
        builder = datasets.load_dataset_builder(dataset.id, **options)
        splits = builder.config.data_files or {}
        if splits and dataset.split not in splits:
            raise InputError(f"{address} has no split {dataset.split!r}; it has {', '.join(sorted(map(str, splits)))}")
        files = [str(file) for file in splits.get(dataset.split, ())]
        if files and all(_is_read_here(file) for file in files):
            yield from itertools.chain.from_iterable(_values(file, address, column) for file in files)
            return
        for row in datasets.load_dataset(dataset.id, split=dataset.split, streaming=True, **options):
            if column not in row:
                raise _no_column(address, column, row)
            yield row[column]


def _is_read_here(file: str) -> bool:
    suffixes = PurePosixPath(file).suffixes
    return "::" not in file and bool({".parquet", ".jsonl"} & {*suffixes[-2:]}) and suffixes[-1] in (*_KINDS, *_CODECS)


def _values(file: str, address: str, column: str) -> Iterator[Any]:
    """Yield values of a column, one per row of a .parquet, .jsonl or .json; null where a row of the last two lacks it.

    Args:
        file: a local path, or an address that fsspec opens.
        address: the file's name in messages.
        column: the column.
    """
    with _explained(address):
        if file_kind(PurePosixPath(file).name) == ".parquet":
            yield from _parquet_values(file, address, column)
        else:
            with _text_lines(file, _LINE_CHARS) as lines:
                yield from _json_values(_json_rows(lines, address), address, column)


def _parquet_values(file: str, address: str, column: str) -> Iterator[Any]:
    with _opened(file) as handle, pq.ParquetFile(handle) as parquet:
        if parquet.metadata.num_rows == 0:  # parts without rows often lack columns, too
            return
        names = parquet.schema_arrow.names
        if column not in names:
            raise _no_column(address, column, names)
        for batch in parquet.iter_batches(_ROWS_PER_BATCH, columns=[column]):
            yield from batch.column(batch.schema.names.index(column)).to_pylist()


def _json_values(rows: Iterable[dict[str, Any]], address: str, column: str) -> Iterator[Any]:
    """Yield values of rows of JSON.

    Raises:
        InputError: no row has the column.
    """
    rows_before, has_column = 0, False
    row: dict[str, Any] = {}
    for row in rows:
        has_column |= column in row
        if has_column:
            yield from itertools.repeat(None, rows_before)
            rows_before = 0
            yield row.get(column)
            continue
        rows_before += 1
        if rows_before == _ROWS_BEFORE_CHECK:
            break
    if rows_before:
        raise _no_column(address, column, row)


def _json_rows(lines: Iterator[str], address: str) -> Iterator[dict[str, Any]]:
    """Yield rows of a text that is one list of them, or that has a row a line.

    Raises:
        InputError: a row is no JSON object, or a line or the list is too long.
    """
    is_first = True
    for number, line in enumerate(lines, start=1):
        if is_first and line.lstrip().startswith("["):
            members = _parsed(_joined(itertools.chain([line], lines), address), f"{address} cannot be read (its list")
            for index, member in enumerate(members):
                yield _json_object(member, f"{address} cannot be read (member {index} of its list")
        elif line.strip():
            is_first = False
            problem = f"{address} cannot be read (line {number}"
            yield _json_object(_parsed(line, problem), problem)


def _joined(lines: Iterable[str], address: str) -> str:
    """Return the whole of a text that is held in memory."""
    texts, length = [], 0
    for line in lines:
        texts.append(line)
        length += len(line)
        if length >= _LINE_CHARS:
            raise InputError(f"{address} is one list of more than {_LINE_CHARS:,} characters; write one row a line")
    return "".join(texts)


def _parsed(text: str, problem: str) -> Any:
    if len(text) == _LINE_CHARS:
        raise InputError(f"{problem} has more than {_LINE_CHARS:,} characters; write one row a line)")
    try:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer of more digits than Python reads
            return json.loads(text, parse_int=float)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{problem}: {_one_line(error)}); write one row a line, or one list of rows") from error


def _json_object(row: Any, problem: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{problem}: expected a JSON object, found {type(row).__name__})")
    return row


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Yield the texts between empty lines; a very long paragraph is cut at a line's end."""
    paragraph: list[str] = []
    length = 0
    for line in lines:
        if "\0" in line:  # UTF-16 without its mark is UTF-8 with these
            raise UnicodeError("it holds NUL characters")
        if paragraph and (line == "\n" or length > _PARAGRAPH_CHARS):
            yield "".join(paragraph)
            paragraph, length = [], 0
        paragraph.append(line)
        length += len(line)
    yield "".join(paragraph)


@contextlib.contextmanager
def _opened(file: str) -> Iterator[Any]:
    """Yield the bytes of a local path, or of an address that fsspec opens."""
    with Path(file).open("rb") if "://" not in file else fsspec.open(file, "rb") as handle:
        yield handle


@contextlib.contextmanager
def _text_lines(file: str, longest: int) -> Iterator[Iterator[str]]:
    """Yield lines of a text in UTF-8, decompressed where the name says so, without a byte order mark.

    A line is cut after `longest` characters.
    """
    codec = _CODECS.get(PurePosixPath(file).suffix.lower())
    with _opened(file) as handle:
        data: IO[bytes] = handle
        if codec and handle.read(1):  # nothing at all is no compressed stream, but an empty file
            handle.seek(0)
            data = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(handle, "r"), codec))
        text = io.TextIOWrapper(data, encoding="utf-8-sig")
        yield iter(lambda: text.readline(longest), "")


def _documents(
    values: Iterable[Any], source: Source, address: str, columns: Columns, skipped: SkippedRows
) -> Iterator[Document]:
    """Yield a document of each value that has text; the others are counted."""
    for index, value in enumerate(values):
        skipped.count()
        place = f"{address}#{index}"
        try:
            document = Document("", source, place, messages_of(value)) if columns.messages else None
            document = document or Document(_text_of(value), source, place)
        except NoChatError as error:
            skipped.skip(f"column {columns.name!r} {error}", place)
            continue
        if document.content.strip():
            yield document
        else:
            skipped.skip(_NO_TEXT, place)


def _text_of(value: Any) -> str:
    """Return a text; null is an empty one, and bytes are UTF-8 (some writers of Parquet do not mark texts as such).

    Raises:
        NoChatError: it is something else.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise NoChatError("must hold text, found bytes that are not UTF-8") from None
    if not isinstance(value, str | None):
        raise NoChatError(f"must hold text, found {type(value).__name__}")
    return value or ""


def _no_column(address: str, column: str, names: Iterable[str]) -> InputError:
    return InputError(f"{address} has no column {column!r}; it has {', '.join(sorted(names))}")


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turn errors of the file and of what reads it into an InputError with `address`."""
    try:
        yield
    except InputError:
        raise
    except ConnectionError as error:
        raise _unreachable(address, error) from error
    except (OSError, ValueError, EOFError, OverflowError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        advice = "; save it as UTF-8" if isinstance(error, UnicodeError) else "; fetch it or write it again"
        raise InputError(f"{address} cannot be read ({type(error).__name__}: {_one_line(error)}){advice}") from error


@contextlib.contextmanager
def _explained_hub(address: str) -> Iterator[None]:
    """Turn errors of `datasets` and of the hub's client into an InputError, too."""
    import datasets  # three seconds that other sources need not pay
    import httpx2  # what the hub's own library connects with

    try:
        with _explained(address):
            try:
                yield
            except (UnicodeEncodeError, httpx2.InvalidURL) as error:  # of a header, whose token is not shown
                kind = type(error).__name__
                raise InputError(f"{address} cannot be reached ({kind}); check {HUB_SETTINGS}") from None
    except httpx2.HTTPError as error:
        raise _unreachable(address, error) from error
    except (TypeError, KeyError, ImportError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{address} cannot be read ({type(error).__name__}: {_one_line(error)})") from error


def _unreachable(address: str, error: Exception) -> InputError:
    return InputError(
        f"{address} cannot be reached ({_one_line(error)}); check the network and HF_HUB_OFFLINE, "
        "or give local files (kind: files)"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
