"""Tables: what is written is read back, bytes do not depend on row order, every fault gives one clear error."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from storage.files import DamagedFileError, InputError, sha256
from storage.records import CostRow, ScoreRow, ThroughputRow, TimingRow
from storage.tables import (
    read_costs,
    read_scores,
    read_throughput,
    read_timings,
    write_costs,
    write_scores,
    write_throughput,
    write_timings,
)

SCORE = ScoreRow(
    first_block=0,
    span=1,
    attention="kv_1",
    ffn="ffn_1536",
    weights="decoupled",
    weights_hash="ab12",
    around="parent",
    sequence_shard=0,
    document=0,
    tokens=512,
    kl=0.02,
    lm_loss=2.9,
    top1_agreement=0.93,
    cosine=0.98,
)
COST = CostRow(
    component="ffn",
    variant="ffn_768",
    first_block=None,
    span=1,
    hardware="cpu",
    engine="torch",
    precision="bfloat16",
    tensor_parallel=1,
    scenario="128/128",
    batch=8,
    prefill_ms=3.5,
    decode_ms=0.25,
    weight_bytes=2_655_360,
    kv_bytes_per_token=0,
    params=1_327_680,
    origin="measured",
    how="torch, N against 2N copies",
)
TIMING = TimingRow(
    **{name: getattr(COST, name) for name in CostRow.__dataclass_fields__},
    machine="2 cores",
    versions="torch 2.13",
    dtype="bfloat16",
    threads=2,
    repeats=9,
    spread=0.03,
)

MODELLED = ThroughputRow(
    model="child",
    phase="request",
    scenario="128/128",
    batch=512,
    hardware="h100-sxm",
    engine="roofline",
    precision="bfloat16",
    tensor_parallel=1,
    modelled_tokens_per_s=5478.0,
    how="roofline",
)
MEASURED = replace(
    MODELLED,
    phase="decode",
    threads=2,
    machine="2 cores",
    versions="torch 2.13",
    measured_ms=80.0,
    measured_tokens_per_s=100.0,
    measured_spread=0.02,
    modelled_tokens_per_s=None,
)


def _scores() -> list[ScoreRow]:
    return [
        SCORE,
        replace(SCORE, sequence_shard=1, kl=0.03),
        replace(SCORE, first_block=1),
        replace(SCORE, attention="no_op", weights="initial", weights_hash=""),
    ]


def _costs() -> list[CostRow]:
    return [
        COST,
        replace(COST, batch=1),
        replace(COST, first_block=3),
        replace(COST, component="head", variant="parent"),
    ]


def test_round_trips(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores.parquet", _scores())
    assert set(read_scores(tmp_path / "scores.parquet")) == set(_scores())
    write_costs(tmp_path / "costs.parquet", _costs())
    assert set(read_costs(tmp_path / "costs.parquet")) == set(_costs())
    write_timings(tmp_path / "timings.parquet", [TIMING])
    assert read_timings(tmp_path / "timings.parquet") == (TIMING,)
    write_throughput(tmp_path / "throughput.parquet", [MODELLED, MEASURED])
    assert set(read_throughput(tmp_path / "throughput.parquet")) == {MODELLED, MEASURED}


def test_bytes_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    for name, rows in (("a", _costs()), ("b", _costs()[::-1])):
        write_costs(tmp_path / name, rows)
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")


def test_a_table_without_our_metadata_and_with_other_integer_types_is_read(tmp_path: Path) -> None:
    columns = {name: [getattr(COST, name)] for name in CostRow.__dataclass_fields__} | {"note": ["mine"]}
    table = pa.table(columns)
    table = table.set_column(table.column_names.index("batch"), "batch", pa.array([8], pa.int32()))
    pq.write_table(table, tmp_path / "mine.parquet")
    assert read_costs(tmp_path / "mine.parquet", takes_foreign=True) == (COST,)
    with pytest.raises(DamagedFileError, match=r"is damaged .*; run `dvc repro measure_costs`"):
        read_costs(tmp_path / "mine.parquet")


def test_unknown_columns_are_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_timings(tmp_path / "t.parquet", [TIMING])
    with caplog.at_level(logging.INFO, logger="storage.tables"):
        assert read_costs(tmp_path / "t.parquet") == (COST,)
    assert "machine" in caplog.text


def _set(column: str, value: Any, type_: pa.DataType | None = None) -> Callable[[pa.Table], pa.Table]:
    """Return an edit of a table: row 1 of a column gets another value."""

    def edit(table: pa.Table) -> pa.Table:
        index = table.column_names.index(column)
        values = table.column(column).to_pylist()
        values[1] = value
        return table.set_column(index, column, pa.array(values, type_ or table.schema.field(column).type))

    return edit


def _in_unit(unit: bytes) -> Callable[[pa.Table], pa.Table]:
    """Return an edit of a table: a column gets another unit."""

    def edit(table: pa.Table) -> pa.Table:
        index = table.column_names.index("prefill_ms")
        field = pa.field("prefill_ms", pa.float64(), metadata={b"unit": unit})
        return table.set_column(index, field, table.column("prefill_ms"))

    return edit


def _of_type(column: str, type_: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    """Return an edit of a table: a column holds ones of another type."""

    def edit(table: pa.Table) -> pa.Table:
        ones = pa.array([1] * len(table)).cast(type_)
        return table.set_column(table.column_names.index(column), column, ones)

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_set("prefill_ms", float("nan")), ["row 1", "prefill_ms", "nan", "finite", "ms/batch"]),
        (_set("decode_ms", float("inf")), ["row 1", "decode_ms", "inf"]),
        (_set("decode_ms", -0.5), ["row 1", "decode_ms", "-0.5", "at least 0"]),
        (_set("params", -1), ["row 1", "params", "-1"]),
        (_set("params", None), ["row 1", "params", "nothing"]),
        (_set("batch", 0), ["row 1", "batch", "at least 1"]),
        (_set("batch", 1.5, pa.float64()), ["batch", "whole number", "1.5"]),
        (_set("variant", "ffn_big"), ["row 1", "ffn_big", "ffn_<channels>"]),
        (_set("variant", "kv_1"), ["row 1", "kv_1", "ffn_<channels>"]),
        (_set("component", "mlp"), ["row 1", "mlp", "attention, ffn"]),
        (_set("precision", "bf16"), ["row 1", "bf16", "bfloat16"]),
        (_set("scenario", "128:128"), ["row 1", "128:128", "128/128"]),
        (_set("scenario", "9" * 5000 + "/1"), ["row 1", "scenario", "128/128"]),
        (_set("variant", "ffn_" + "9" * 5000), ["row 1", "ffn_9", "ffn_<channels>"]),
        (_set("first_block", 10**9), ["row 1", "first_block", "at most 9999", "1000000000"]),
        (_set("span", 2**62), ["row 1", "span", "at most 10000", str(2**62)]),
        (_set("params", 2**62), ["row 1", "params", "at most 1e+15"]),
        (_set("decode_ms", 1e308), ["row 1", "decode_ms", "at most 1e+12", "1e+308"]),
        (_of_type("batch", pa.bool_()), ["batch", "whole number", "bool"]),
        (_of_type("batch", pa.timestamp("ms")), ["batch", "whole number", "timestamp"]),
        (_of_type("decode_ms", pa.duration("s")), ["decode_ms", "finite number", "duration"]),
        (lambda table: table.append_column("batch", table["batch"]), ["the column 'batch' 2 times"]),
        (_set("origin", "guessed"), ["row 1", "guessed", "measured"]),
        (lambda table: table.drop_columns(["decode_ms"]), ["no column", "decode_ms", "ms/step"]),
        (lambda table: table.rename_columns({"kv_bytes_per_token": "kv_bytes"}), ["kv_bytes_per_token", "is it kv_b"]),
        (_in_unit(b"s/batch"), ["prefill_ms", "'s/batch'", "'ms/batch'"]),
        (_in_unit(b"\xff"), ["prefill_ms", "'\ufffd'", "'ms/batch'"]),
        (lambda table: table.slice(0, 0), ["no rows", "a row for every measurement; correct your file"]),
        (lambda table: pa.concat_tables([table, table.slice(0, 1)]), ["rows 0 and 4", "both", "batch="]),
    ],
)
def test_a_fault_in_a_cost_table_is_one_clear_error(
    tmp_path: Path, edit: Callable[[pa.Table], pa.Table], words: list[str]
) -> None:
    path = tmp_path / "costs.parquet"
    write_costs(path, _costs())
    pq.write_table(edit(pq.read_table(path)).replace_schema_metadata(None), path)
    with pytest.raises(InputError) as caught:
        read_costs(path, takes_foreign=True)
    assert all(word in str(caught.value) for word in [str(path), *words]), str(caught.value)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([replace(SCORE, kl=float("nan"))], ["row 0", "kl", "nats/token"]),
        ([replace(SCORE, kl=-0.5)], ["row 0", "kl", "-0.5"]),
        ([replace(SCORE, kl=1e100)], ["row 0", "kl", "at most 1e+06", "1e+100"]),
        ([replace(SCORE, first_block=10**9)], ["row 0", "first_block", "at most 9999", "1000000000"]),
        ([replace(SCORE, attention="kv_" + "9" * 5000)], ["row 0", "kv_9", "kv_<heads>"]),
        ([replace(SCORE, top1_agreement=1.5)], ["row 0", "top1_agreement", "at most 1"]),
        ([replace(SCORE, cosine=-1.5)], ["row 0", "cosine", "-1.5"]),
        ([replace(SCORE, tokens=0)], ["row 0", "tokens"]),
        ([replace(SCORE, attention="kv_0")], ["row 0", "kv_0", "kv_<heads>"]),
        ([SCORE, SCORE], ["rows 0 and 1", "sequence_shard=0"]),
        ([SCORE, replace(SCORE, sequence_shard=1, weights_hash="cd34")], ["rows 0 and 1", "weights_hash", "stale"]),
    ],
)
def test_faulty_scores_are_refused_before_they_are_written(
    tmp_path: Path, rows: list[ScoreRow], words: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        write_scores(tmp_path / "scores.parquet", rows)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "scores.parquet").exists()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            replace(MEASURED, modelled_tokens_per_s=5478.0),
            ["row 1", "either modelled_tokens_per_s, or all of measured_"],
        ),
        (replace(MEASURED, measured_spread=None), ["row 1", "either modelled_tokens_per_s, or all of measured_"]),
        (replace(MODELLED, batch=8, machine="2 cores"), ["row 1", "either modelled_tokens_per_s, or all of measured_"]),
        (replace(MODELLED, batch=8, modelled_tokens_per_s=None), ["row 1", "either modelled_tokens_per_s"]),
        (replace(MEASURED, measured_tokens_per_s=float("inf")), ["row 1", "measured_tokens_per_s", "inf", "finite"]),
        (replace(MEASURED, model="assembled"), ["row 1", "model", "assembled", "parent, child"]),
        (replace(MODELLED, how="another"), ["rows 0 and 1", "batch=512", "model=child"]),
    ],
)
def test_throughput_is_measured_or_modelled_and_never_both(
    tmp_path: Path, row: ThroughputRow, words: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        write_throughput(tmp_path / "throughput.parquet", [MODELLED, row])
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "throughput.parquet").exists()


def test_a_missing_table_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dvc repro score_blocks"):
        read_scores(tmp_path / "scores.parquet")


@pytest.mark.parametrize("name", [".", "fifo.parquet", "none.csv", "header.csv"])
def test_of_a_table_of_ones_own_the_file_itself_is_the_way_out(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fifo.parquet")
    (tmp_path / "header.csv").write_text(",".join(ScoreRow.__dataclass_fields__) + "\n")
    with pytest.raises(InputError, match="JSON file with a row for every measurement; correct your file or its path"):
        read_scores(tmp_path / name, takes_foreign=True)


def test_a_damaged_table(tmp_path: Path) -> None:
    path = tmp_path / "costs.parquet"
    write_costs(path, _costs())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DamagedFileError, match="not a whole Parquet file"):
        read_costs(path)


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_csv_and_json_hold_what_parquet_holds(tmp_path: Path, suffix: str) -> None:
    write_costs(tmp_path / "costs.parquet", _costs())
    table = pq.read_table(tmp_path / "costs.parquet")
    path = tmp_path / f"costs{suffix}"
    if suffix == ".csv":
        csv.write_csv(table, path)
    else:
        path.write_text(json.dumps(table.to_pylist()))
    assert read_costs(path) == read_costs(tmp_path / "costs.parquet")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("costs.json", '{"component": 1}', "not a JSON file: a list of objects"),
        ("costs.json", "[1, 2]", "not a JSON file: a list of objects"),
        ("costs.json", "[{", "not a JSON file"),
        ("costs.json", "[]", "no column 'component'"),
        ("costs.json", '[{"params": 123456789012345678901234567890}]', "not a JSON file"),
        ("costs.json", "[[]]", "not a JSON file: a list of objects"),
        ("costs.json", '[{"params": 1, "params": 7}]', "the key 'params' stands in an object twice"),
        ("costs.json", '[{"params": 1}, {"params": true}]', "not a JSON file"),
        ("costs.csv", "", "not a CSV file"),
        ("costs.csv", "component,variant\nattention,kv_3,7\n", "not a CSV file"),
        ("costs.csv", "component,variant\nattention,kv_3\n", "no column 'first_block'"),
    ],
)
def test_what_is_no_table_is_one_error(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=words):
        read_costs(tmp_path / name)


def test_csv_text_stays_text_and_json_rows_may_leave_out_what_is_empty(tmp_path: Path) -> None:
    write_costs(tmp_path / "costs.parquet", [replace(row, how="0700") for row in _costs()])
    table = pq.read_table(tmp_path / "costs.parquet")
    csv.write_csv(table, tmp_path / "costs.csv")
    assert {row.how for row in read_costs(tmp_path / "costs.csv")} == {"0700"}
    rows = [{name: value for name, value in row.items() if value is not None} for row in table.to_pylist()]
    rows[-1]["first_block"] = 0
    (tmp_path / "costs.json").write_text(json.dumps(rows))
    costs = read_costs(tmp_path / "costs.json")
    assert [row.first_block for row in costs] == [row.get("first_block") for row in rows]
