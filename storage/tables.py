"""scores, costs, timings, throughput and serving (Parquet): schemas, validation on reading, writing.

In and out: the records of a row. A table may come from a user (their own TensorRT-LLM timings, say), so everything is
checked on reading, and an error names the file, row, column, what was found and what was expected. Rows are numbered
from 0. Tables may be CSV or JSON as well, by the file's suffix. Columns that we do not know are ignored, and the log
says which. Tables of this project carry a seal (storage/parquet_files.py), those of users need none.
"""

import difflib
import itertools
import logging
import re
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

import pyarrow as pa
from pyarrow import csv

from storage.config_fields import MAX_BLOCKS
from storage.fields import MAX_NUMBER
from storage.files import DamagedFileError, InputError, to_run
from storage.json_files import parse
from storage.parquet_files import read_table, write_table
from storage.paths import TIMINGS
from storage.records import (
    ANY_VARIANT,
    Component,
    CostRow,
    Origin,
    Phase,
    Precision,
    PromptKind,
    Route,
    ScoreRow,
    ServingRow,
    ThroughputRow,
    TimingRow,
    Weights,
)
from storage.variants import Attention, Ffn

_log = logging.getLogger(__name__)
_SUFFIXES = (".parquet", ".csv", ".json")
_LARGEST_COSINE = 1 + 1e-4
"""Largest cosine of two float32 vectors: 1 and its rounding."""
_SMALLEST_KL = -1e-3
"""KL is never negative in exact arithmetic; rounding of a replacement that changes nothing stays far above this."""
_LARGEST_NATS = 1e6
_LARGEST_RATE = 1e12
"""Largest number of milliseconds, seconds, or tokens/s: 1e12 ms are thirty years."""


@dataclass(frozen=True)
class _Column:
    """A column: Arrow type, unit (kept in the file, compared on reading), and which values are accepted."""

    name: str
    type: pa.DataType
    unit: str
    minimum: float = 0
    maximum: float = 0
    allowed: tuple[str, ...] = ()
    pattern: str = ""
    nullable: bool = False

    @property
    def field(self) -> pa.Field:
        return pa.field(self.name, self.type, nullable=self.nullable, metadata={"unit": self.unit})

    @property
    def expected(self) -> str:
        """Return the values that are accepted, in words."""
        if self.allowed:
            return f"one of {', '.join(self.allowed)}"
        if self.pattern:
            return f"text like {self.unit}"
        if self.type == pa.string():
            return "a text"
        kind = "a whole number" if self.type == pa.int64() else "a finite number"
        return f"{kind} at least {self.minimum:g} and at most {self.maximum:g}"

    def accepts(self, value: Any) -> bool:
        """Tell whether `value` (of the column's type) is allowed."""
        if value is None:
            return self.nullable
        if isinstance(value, str):
            return (not self.allowed or value in self.allowed) and (not self.pattern or bool(self._matches(value)))
        return bool(self.minimum <= value <= self.maximum)

    def takes(self, stored: pa.DataType) -> bool:
        """Tell whether a file may hold the column as a type: truth values and times are no numbers."""
        inner = stored.value_type if pa.types.is_dictionary(stored) else stored
        return self.type == pa.string() or not (pa.types.is_boolean(inner) or pa.types.is_temporal(inner))

    def _matches(self, value: str) -> re.Match[str] | None:
        return re.fullmatch(self.pattern, value)


_Row = TypeVar("_Row", ScoreRow, CostRow, TimingRow, ThroughputRow, ServingRow)


@dataclass(frozen=True)
class _Table(Generic[_Row]):
    """A kind of table.

    Attributes:
        record: the type of a row.
        columns: all columns, in order.
        key: names of the columns that identify a row.
        check_row: refuses a row whose columns do not fit each other.
        rebuild: the command that makes the table anew.
        check_all: refuses rows that do not fit each other.
    """

    record: type[_Row]
    columns: tuple[_Column, ...]
    key: tuple[str, ...]
    check_row: Callable[[_Row], None]
    rebuild: str
    check_all: Callable[[Sequence[_Row], Path], None] | None = None

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([column.field for column in self.columns])


def _count(name: str, unit: str, minimum: int, maximum: int = MAX_NUMBER, nullable: bool = False) -> _Column:
    return _Column(name, pa.int64(), unit, minimum=minimum, maximum=maximum, nullable=nullable)


def _number(name: str, unit: str, minimum: float, maximum: float = _LARGEST_RATE, nullable: bool = False) -> _Column:
    return _Column(name, pa.float64(), unit, minimum=minimum, maximum=maximum, nullable=nullable)


def _text(name: str, unit: str, allowed: tuple[str, ...] = (), pattern: str = "", nullable: bool = False) -> _Column:
    return _Column(name, pa.string(), unit, allowed=allowed, pattern=pattern, nullable=nullable)


def _check_score(row: ScoreRow) -> None:
    Attention.parse(row.attention)
    Ffn.parse(row.ffn)


def _check_cost(row: CostRow) -> None:
    if row.component == "attention":
        Attention.parse(row.variant)
    elif row.component == "ffn":
        Ffn.parse(row.variant)
    elif row.variant != ANY_VARIANT:
        raise InputError(f"variant {row.variant!r} of component {row.component}: expected {ANY_VARIANT!r}")


def _check_throughput(row: ThroughputRow) -> None:
    taken = (row.measured_ms, row.measured_tokens_per_s, row.measured_spread, row.machine, row.versions)
    if {value is None for value in taken} != {row.modelled_tokens_per_s is not None}:
        raise InputError("expected either modelled_tokens_per_s, or all of measured_*, machine and versions")


def _check_serving(row: ServingRow) -> None:
    if (row.measured_tokens_per_s is None) != (row.errors == row.requests):
        raise InputError("expected measured_tokens_per_s where, and only where, a request came whole")
    if row.buffered > row.requests - row.errors:
        raise InputError("expected no more buffered requests than came whole")


def _check_hashes(rows: Sequence[ScoreRow], path: Path) -> None:
    """Refuse shards of a replacement that were scored with different tensors: their mean would mean nothing."""
    first: dict[tuple[Any, ...], tuple[int, str]] = {}
    for index, row in enumerate(rows):
        key = (row.replacement, row.weights, row.around)
        earlier, weights_hash = first.setdefault(key, (index, row.weights_hash))
        if weights_hash != row.weights_hash:
            raise InputError(
                f"{path}: rows {earlier} and {index} score {row.replacement.name} ({row.weights}) with different "
                f"weights_hash ({weights_hash[:12]}, {row.weights_hash[:12]}); remove the stale rows"
            )


_SPAN = _count("span", "blocks", 1, MAX_BLOCKS)
_SCORE_COLUMNS = (
    _count("first_block", "block index", 0, MAX_BLOCKS - 1),
    _SPAN,
    _text("attention", "variant name"),
    _text("ffn", "variant name"),
    _text("weights", "name", get_args(Weights)),
    _text("weights_hash", "hash"),
    _text("around", "'parent' or hash"),
    _count("sequence_shard", "shard index", 0),
    _count("document", "document number", 0),
    _count("tokens", "tokens", 1),
    _number("kl", "nats/token", _SMALLEST_KL, _LARGEST_NATS),
    _number("lm_loss", "nats/token", 0, _LARGEST_NATS),
    _number("top1_agreement", "share of tokens", 0, 1),
    _number("cosine", "cosine", -_LARGEST_COSINE, _LARGEST_COSINE),
)
_SCENARIO = _text("scenario", "'128/128' (tokens in/tokens out)", pattern=r"[1-9][0-9]{0,8}/[1-9][0-9]{0,8}")
_SETTING_COLUMNS = (
    _text("hardware", "name"),
    _text("engine", "name"),
    _text("precision", "name", get_args(Precision)),
    _count("tensor_parallel", "devices", 1),
    _SCENARIO,
    _count("batch", "sequences", 1),
)
_COST_COLUMNS = (
    _text("component", "name", get_args(Component)),
    _text("variant", "variant name"),
    _count("first_block", "block index", 0, MAX_BLOCKS - 1, nullable=True),
    _SPAN,
    *_SETTING_COLUMNS,
    _number("prefill_ms", "ms/batch", 0),
    _number("decode_ms", "ms/step", 0),
    _count("weight_bytes", "bytes", 0),
    _count("kv_bytes_per_token", "bytes/token", 0),
    _count("params", "parameters", 0),
    _text("origin", "name", get_args(Origin)),
    _text("how", "text"),
)
_TIMING_COLUMNS = (
    *_COST_COLUMNS,
    _text("machine", "text"),
    _text("versions", "text"),
    _text("dtype", "name"),
    _count("threads", "threads", 1),
    _count("repeats", "timings", 1),
    _number("spread", "share of median", 0),
)
_TOKENS_PER_S = "tokens/s"
_THROUGHPUT_COLUMNS = (
    _text("model", "name", ("parent", "child")),
    _text("phase", "name", get_args(Phase)),
    *_SETTING_COLUMNS,
    _count("threads", "threads", 1, nullable=True),
    _text("machine", "text", nullable=True),
    _text("versions", "text", nullable=True),
    _number("measured_ms", "ms", 0, nullable=True),
    _number("measured_tokens_per_s", _TOKENS_PER_S, 0, nullable=True),
    _number("measured_spread", "share of median", 0, nullable=True),
    _number("predicted_tokens_per_s", _TOKENS_PER_S, 0, nullable=True),
    _text("predicted_hardware", "name", nullable=True),
    _number("modelled_tokens_per_s", _TOKENS_PER_S, 0, nullable=True),
    _text("how", "text"),
)
_SCORES = _Table(
    ScoreRow,
    _SCORE_COLUMNS,
    ("first_block", "span", "attention", "ffn", "weights", "around", "sequence_shard"),
    _check_score,
    "dvc repro score_blocks",
    _check_hashes,
)
_SETTING = tuple(column.name for column in _SETTING_COLUMNS)
_COST_KEY = (*_SETTING, "component", "variant", "first_block", "span")
_COSTS = _Table(CostRow, _COST_COLUMNS, _COST_KEY, _check_cost, "dvc repro measure_costs")
_TIMINGS = _Table(TimingRow, _TIMING_COLUMNS, _COST_KEY, _check_cost, "puzzle time-machine NAME")

_THROUGHPUT_KEY = (*_SETTING, "phase", "model")
_THROUGHPUT = _Table(
    ThroughputRow, _THROUGHPUT_COLUMNS, _THROUGHPUT_KEY, _check_throughput, "dvc repro benchmark_throughput"
)
_SERVING = _Table(
    ServingRow,
    (
        _text("name", "name"),
        _text("model", "name"),
        _text("url", "text"),
        _count("devices", "devices", 1),
        _SCENARIO,
        _count("input_tokens", "tokens", 1),
        _count("output_tokens", "tokens", 1),
        _count("concurrency", "requests", 1),
        _text("prompt_kind", "name", get_args(PromptKind)),
        _text("route", "name", get_args(Route)),
        _count("requests", "requests", 1),
        _count("errors", "requests", 0),
        _text("error_kinds", "text"),
        _count("buffered", "requests", 0),
        _number("counted_input_tokens", "tokens", 0, nullable=True),
        _number("counted_output_tokens", "tokens", 0, nullable=True),
        _text("counted_by", "text"),
        _number("seconds", "s", 0),
        _number("measured_tokens_per_s", _TOKENS_PER_S, 0, nullable=True),
        _number("measured_user_tokens_per_s", _TOKENS_PER_S, 0, nullable=True),
        *(_number(f"ttft_p{percentile}_ms", "ms", 0, nullable=True) for percentile in (50, 95, 99)),
        *(_number(f"itl_p{percentile}_ms", "ms", 0, nullable=True) for percentile in (50, 95, 99)),
    ),
    ("name", "scenario", "input_tokens", "output_tokens", "prompt_kind", "concurrency"),
    _check_serving,
    "puzzle benchmark-server NAME=URL",
)


def read_scores(path: Path, takes_foreign: bool = False) -> tuple[ScoreRow, ...]:
    """Read and check a table of scores; `takes_foreign`: a user may have made it, so that it needs no seal.

    Raises:
        InputError: the file is missing or empty, a column is missing, stands twice or has another type or unit, a value
            is null, NaN, out of range or no known name, two rows describe the same measurement, or the shards of one
            replacement were measured with different weights.
        DamagedFileError: the file is not Parquet (nor CSV, JSON, if its suffix says so), or not what was sealed.
    """
    return _read(path, _SCORES, takes_foreign)


def write_scores(path: Path, rows: Iterable[ScoreRow]) -> None:
    """Write scores, sorted; the same rows in any order give the same bytes. Raises InputError as on reading."""
    _write(path, tuple(rows), _SCORES)


def read_costs(path: Path, takes_foreign: bool = False) -> tuple[CostRow, ...]:
    """Read and check a table of costs; as :func:`read_scores`."""
    return _read(path, _COSTS, takes_foreign)


def write_costs(path: Path, rows: Iterable[CostRow]) -> None:
    """Write costs, sorted; the same rows in any order give the same bytes. Raises InputError as on reading."""
    _write(path, tuple(rows), _COSTS)


def read_timings(path: Path) -> tuple[TimingRow, ...]:
    """Read and check a table of timings, also a user's; errors as in :func:`read_scores`."""
    return _read(path, _TIMINGS, takes_foreign=True)


def timings_named(name: str) -> Path:
    """Return the file in storage/timings with this name.

    Raises:
        InputError: no file, or more than one, has the name.
    """
    candidates = [TIMINGS / f"{name}{suffix}" for suffix in _SUFFIXES]
    files = [path for path in candidates if path.is_file()]
    if len(files) == 1:
        return files[0]
    if files:
        raise InputError(
            f"measure_costs.timings names {name!r}, which {' and '.join(map(str, files))} are; keep one of them"
        )
    has = ", ".join(sorted(file.stem for file in TIMINGS.glob("*") if file.suffix in _SUFFIXES)) or "none"
    raise InputError(
        f"measure_costs.timings names {name!r}, but {TIMINGS / name}.parquet is missing (has: {has}); time that "
        f"machine with `puzzle time-machine {name}`, bring a table of that name (.parquet, .csv, "
        ".json), or take the name out"
    )


def read_timings_or_costs(path: Path) -> tuple[TimingRow, ...] | tuple[CostRow, ...]:
    """Read a table of timings, or one of costs that a user brings, which has fewer columns; errors as above."""
    loaded = _load(path, _TIMINGS, takes_foreign=True)
    if {column.name for column in _TIMINGS.columns} <= set(loaded.column_names):
        return _rows(loaded, path, _TIMINGS, takes_foreign=True)
    return _rows(loaded, path, _COSTS, takes_foreign=True)


def write_timings(path: Path, rows: Iterable[TimingRow]) -> None:
    """Write timings, sorted; the same rows in any order give the same bytes. Raises InputError as on reading."""
    _write(path, tuple(rows), _TIMINGS)


def read_throughput(path: Path) -> tuple[ThroughputRow, ...]:
    """Read and check throughput.parquet; errors as in :func:`read_scores`."""
    return _read(path, _THROUGHPUT)


def write_throughput(path: Path, rows: Iterable[ThroughputRow]) -> None:
    """Write throughput, sorted; the same rows in any order give the same bytes. Raises InputError as on reading."""
    _write(path, tuple(rows), _THROUGHPUT)


def read_serving(path: Path) -> tuple[ServingRow, ...]:
    """Read and check serving.parquet; errors as in :func:`read_scores`."""
    return _read(path, _SERVING)


def write_serving(path: Path, rows: Iterable[ServingRow]) -> None:
    """Write speeds of servers, sorted. Raises InputError as on reading."""
    _write(path, tuple(rows), _SERVING)


def _read(path: Path, table: _Table[_Row], takes_foreign: bool = False) -> tuple[_Row, ...]:
    return _rows(_load(path, table, takes_foreign), path, table, takes_foreign)


def _way_out(table: _Table[_Row], takes_foreign: bool) -> str:
    if not takes_foreign:
        return to_run(table.rebuild)
    yours = "expected a Parquet, CSV or JSON file with a row for every measurement; correct your file or its path"
    return f"{yours}, or {to_run(table.rebuild)} for this project's"


def _load(path: Path, table: _Table[_Row], takes_foreign: bool) -> pa.Table:
    """Read columns of a Parquet file, or of what users write: CSV with a header line, JSON as a list of objects."""
    if not path.is_file():
        problem = "is no file" if path.exists() else "is missing"
        raise InputError(f"{path} {problem}; {_way_out(table, takes_foreign)}")
    kind = {".csv": "CSV", ".json": "JSON"}.get(path.suffix)
    if kind is None:
        return read_table(path, table.rebuild, takes_foreign)
    try:
        if kind == "CSV":
            types = {column.name: column.type for column in table.columns}
            return csv.read_csv(path, convert_options=csv.ConvertOptions(column_types=types))
        rows = parse(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it holds other values")
        names = dict.fromkeys(itertools.chain.from_iterable(rows))
        return pa.table({name: [row.get(name) for row in rows] for name in names})
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        form = f"{kind} file" + (": a list of objects" if kind == "JSON" else "")
        raise DamagedFileError(f"{path} is not a {form} ({error}); correct it") from error


def _rows(loaded: pa.Table, path: Path, table: _Table[_Row], takes_foreign: bool) -> tuple[_Row, ...]:
    values = {column.name: _values(loaded, column, path) for column in table.columns}
    if unknown := [name for name in loaded.column_names if name not in values]:
        _log.info("%s: ignoring the columns %s", path, ", ".join(unknown))
    if not loaded.num_rows:
        raise InputError(f"{path} has no rows; {_way_out(table, takes_foreign)}")
    rows = tuple(table.record(**dict(zip(values, row, strict=True))) for row in zip(*values.values(), strict=True))
    _check_rows(rows, table, path)
    return rows


def _write(path: Path, rows: tuple[_Row, ...], table: _Table[_Row]) -> None:
    for column in table.columns:
        _check_values([getattr(row, column.name) for row in rows], column, path)
    _check_rows(rows, table, path)
    rows = tuple(sorted(rows, key=lambda row: [(-1 if v is None else v) for v in _key(row, table)]))
    arrays = [pa.array([getattr(row, column.name) for row in rows], column.type) for column in table.columns]
    write_table(path, pa.Table.from_arrays(arrays, schema=table.schema))


def _values(loaded: pa.Table, column: _Column, path: Path) -> list[Any]:
    """Return the checked values of one column of a file."""
    if column.name not in loaded.column_names:
        close = difflib.get_close_matches(column.name, loaded.column_names, n=1)
        hint = f" (is it {close[0]}?)" if close else ""
        raise InputError(f"{path} has no column {column.name!r} [{column.unit}]{hint}; has: {_names(loaded)}")
    if (times := loaded.column_names.count(column.name)) > 1:
        raise InputError(f"{path} has the column {column.name!r} {times} times; keep one")
    field = loaded.schema.field(column.name)
    unit = (field.metadata or {}).get(b"unit", column.unit.encode()).decode(errors="replace")
    if unit != column.unit:
        raise InputError(f"{path}: column {column.name} is in {unit!r}, expected {column.unit!r}; convert it")
    if not column.takes(field.type):
        raise InputError(f"{path}: column {column.name}: expected {column.expected}, found {field.type}; convert it")
    try:
        values: list[Any] = loaded.column(column.name).cast(column.type).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{path}: column {column.name}: expected {column.expected}, found {error}") from error
    _check_values(values, column, path)
    return values


def _names(loaded: pa.Table) -> str:
    return ", ".join(loaded.column_names) or "none"


def _check_values(values: Sequence[Any], column: _Column, path: Path) -> None:
    for index, value in enumerate(values):
        if not column.accepts(value):
            raise InputError(
                f"{path}, row {index}, column {column.name} [{column.unit}]: expected {column.expected}, "
                f"found {'nothing' if value is None else reprlib.repr(value)}"
            )


def _check_rows(rows: Sequence[_Row], table: _Table[_Row], path: Path) -> None:
    """Check what depends on several columns, and refuse two rows that describe the same measurement."""
    seen: dict[tuple[Any, ...], int] = {}
    for index, row in enumerate(rows):
        try:
            table.check_row(row)
        except InputError as error:
            raise InputError(f"{path}, row {index}: {error}") from None
        key = _key(row, table)
        if key in seen:
            shared = ", ".join(f"{name}={value}" for name, value in zip(table.key, key, strict=True))
            raise InputError(f"{path}: rows {seen[key]} and {index} are both for {shared}; keep one")
        seen[key] = index
    if table.check_all:
        table.check_all(rows, path)


def _key(row: _Row, table: _Table[_Row]) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in table.key)
