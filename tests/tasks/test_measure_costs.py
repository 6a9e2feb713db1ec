"""measure_costs: timings in git joined with a modelled GPU; a table that lacks a variant is refused at once."""

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from storage.files import InputError
from storage.params import Params
from storage.parent import Parent
from storage.paths import TIMINGS, Paths
from storage.records import ANY_VARIANT, Component, CostRow, TimingRow
from storage.scenario import Scenario, Setting
from storage.tables import read_costs, read_timings, write_timings
from tasks.commands.time_machine import time_llamacpp
from tasks.measure_costs import write_cost_table
from tasks.puzzle.costs.cost_table import CostTable, model_speed
from tasks.puzzle.costs.engine_model import ENGINES, Model, Platform, estimate
from tasks.puzzle.costs.hardware import device_named
from tasks.puzzle.costs.sizes import component_sizes
from tasks.puzzle.search_space import attention_variants, ffn_variants, parent_attention, parent_blocks, parent_ffn
from tests.settings import tiny_params


def timings(params: Params, paths: Paths, *, linear: bool) -> list[TimingRow]:
    """Make up timings of every component of the parent at 8/8, batch 1."""
    config, bld = Parent(paths.parent).config, params.distill_blocks
    names: list[tuple[Component, str]] = [("attention", kind.name) for kind in attention_variants(config, linear)]
    names += [("ffn", kind.name) for kind in ffn_variants(config, bld.ffn_ratios, bld.width_multiple, linear)]
    names += [("embedding", ANY_VARIANT), ("head", ANY_VARIANT), ("step", ANY_VARIANT)]
    rows = []
    for number, (component, variant) in enumerate(names):
        sizes = component_sizes(config, component, variant, "float32")
        rows.append(
            TimingRow(
                component=component,
                variant=variant,
                first_block=None,
                span=1,
                hardware="laptop",
                engine="torch",
                precision="float32",
                tensor_parallel=1,
                scenario="8/8",
                batch=1,
                prefill_ms=0.0 if variant == "no_op" else 1.0 + number,
                decode_ms=0.0 if variant == "no_op" else 0.1 + number,
                weight_bytes=sizes.weight_bytes,
                kv_bytes_per_token=sizes.kv_bytes_per_token,
                params=sizes.params,
                origin="measured",
                how="made up",
                machine="laptop",
                versions="none",
                dtype="float32",
                threads=1,
                repeats=1,
                spread=0.0,
            )
        )
    return rows


@pytest.fixture
def case(finished: tuple[Params, Paths], monkeypatch: pytest.MonkeyPatch) -> tuple[Params, Paths]:
    """Return params that name the timings of `laptop`, in a folder that has no such table yet."""
    _, paths = finished
    monkeypatch.chdir(paths.root)
    return tiny_params(
        measure_costs={"timings": ["laptop"], "scenarios": ["8/8"], "batches": [1], "hardware": ["h100-sxm"]}
    ), paths


def test_timed_and_modelled_rows_stand_side_by_side(case: tuple[Params, Paths]) -> None:
    params, paths = case
    rows = timings(params, paths, linear=True)  # more than the params ask for
    write_timings(TIMINGS / "laptop.parquet", rows)
    write_cost_table.fn(params, paths)
    table = read_costs(paths.costs)
    timed = {(row.component, row.variant): row.decode_ms for row in table if row.hardware == "laptop"}
    assert timed == {(row.component, row.variant): row.decode_ms for row in rows}
    assert {(row.hardware, row.origin) for row in table} == {("laptop", "measured"), ("h100-sxm", "modelled")}
    modelled = {(row.component, row.variant) for row in table if row.origin == "modelled"}
    assert timed.keys() - modelled == {("attention", "linear"), ("ffn", "linear")}


def test_all_modelled_engines_and_every_degree_have_rows(case: tuple[Params, Paths]) -> None:
    """The roofline knows one device; an engine's rows are those of its model."""
    params, paths = case
    engines = ("roofline", *ENGINES)
    settings = {"engines": engines, "tensor_parallel": (1, 2), "timings": (), "precision": "fp8"}
    costs = params.measure_costs.model_copy(update=settings)
    write_cost_table.fn(params.model_copy(update={"measure_costs": costs}), paths)
    table = read_costs(paths.costs)
    assert {(row.engine, row.tensor_parallel) for row in table} == {
        *(("roofline", 1), ("tensorrt-llm", 1), ("tensorrt-llm", 2)),
        *(("tensorrt-llm-inflight", 1), ("tensorrt-llm-inflight", 2)),
    }
    config = Parent(paths.parent).config
    model = Model(config, ((parent_attention(config), parent_ffn(config)),) * config.num_blocks)
    for degree, engine in itertools.product((1, 2), ENGINES.values()):
        setting = Setting("h100-sxm", engine.name, "fp8", degree, "8/8", 1)
        summed = model_speed(CostTable(table), parent_blocks(config), setting)
        whole = estimate(model, Platform(device_named("h100-sxm"), engine, "fp8"), Scenario(8, 8), degree, 1)
        assert (summed.prefill_ms, summed.decode_ms) == pytest.approx((whole.prefill_ms, whole.step_ms))


def test_a_precision_that_hardware_has_no_units_for_is_refused(case: tuple[Params, Paths]) -> None:
    params, paths = case
    update = {"hardware": ("a100-80gb-sxm",), "precision": "fp8", "timings": ()}
    costs = params.measure_costs.model_copy(update=update)
    with pytest.raises(InputError, match=r"a100-80gb-sxm has no units for fp8"):
        write_cost_table.fn(params.model_copy(update={"measure_costs": costs}), paths)


def test_timings_without_a_variant_are_refused(case: tuple[Params, Paths]) -> None:
    params, paths = case
    with_linear = params.model_copy(
        update={"distill_blocks": params.distill_blocks.model_copy(update={"linear": True})}
    )
    write_timings(TIMINGS / "laptop.parquet", timings(params, paths, linear=False))
    write_cost_table.fn(params, paths)
    before = paths.costs.read_bytes()
    with pytest.raises(
        InputError, match=r"laptop\.parquet has no attention linear, ffn linear on laptop.*puzzle time-machine laptop"
    ):
        write_cost_table.fn(with_linear, paths)
    assert paths.costs.read_bytes() == before


def test_tokens_of_a_variant_that_is_none_are_refused_here_already(case: tuple[Params, Paths]) -> None:
    params, paths = case
    write_timings(TIMINGS / "laptop.parquet", timings(params, paths, linear=False))
    bld = params.distill_blocks.model_copy(update={"variant_tokens": {"ffn_49": 64}})
    with pytest.raises(InputError, match="variant_tokens names 'ffn_49', the library has kv_2, kv_1"):
        write_cost_table.fn(params.model_copy(update={"distill_blocks": bld}), paths)


def test_timings_without_a_component_of_every_model_are_refused(case: tuple[Params, Paths]) -> None:
    params, paths = case
    rows = [row for row in timings(params, paths, linear=False) if row.component != "head"]
    write_timings(TIMINGS / "laptop.parquet", rows)
    with pytest.raises(InputError, match="has no head"):
        write_cost_table.fn(params, paths)


def test_timings_that_are_not_there_are_named(case: tuple[Params, Paths]) -> None:
    params, paths = case
    with pytest.raises(InputError, match=r"names 'laptop', but storage/timings/laptop\.parquet is missing"):
        write_cost_table.fn(params, paths)
    assert not Path(paths.costs).exists()


def brought(params: Params, paths: Paths) -> list[dict[str, Any]]:
    """Return what a user measured elsewhere: no machine, no repeats, and bytes of another layout."""
    names = list(CostRow.__dataclass_fields__)
    rows = [{name: getattr(row, name) for name in names} for row in timings(params, paths, linear=False)]
    return [row | {"engine": "my-engine", "weight_bytes": row["weight_bytes"] + 64} for row in rows]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".parquet"])
def test_a_table_that_a_user_brings_is_costed_like_any_other(suffix: str, case: tuple[Params, Paths]) -> None:
    params, paths = case
    rows = brought(params, paths)
    path = TIMINGS / f"laptop{suffix}"
    path.parent.mkdir(parents=True)
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".csv":
        csv.write_csv(pa.Table.from_pylist(rows), path)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    write_cost_table.fn(params, paths)
    setting = Setting("laptop", "my-engine", "float32", 1, "8/8", 1)
    table = CostTable(read_costs(paths.costs))
    config = Parent(paths.parent).config
    speed = model_speed(table, parent_blocks(config), setting)
    decode_ms = {(row["component"], row["variant"]): row["decode_ms"] for row in rows}
    attention, ffn = ("attention", parent_attention(config).name), ("ffn", parent_ffn(config).name)
    fixed = sum(decode_ms[component, ANY_VARIANT] for component in ("embedding", "head", "step"))
    assert speed.decode_ms == pytest.approx(config.num_blocks * (decode_ms[attention] + decode_ms[ffn]) + fixed)
    assert table.row(setting, "ffn", ffn[1]).how == "made up"


def test_a_brought_table_of_another_parent_or_twice_is_refused(case: tuple[Params, Paths]) -> None:
    params, paths = case
    rows = brought(params, paths)
    TIMINGS.mkdir(parents=True)
    (TIMINGS / "laptop.json").write_text(json.dumps([rows[0] | {"params": 7}, *rows[1:]]))
    with pytest.raises(InputError, match="the costs of laptop are another parent's: attention kv_2 has 7 params"):
        write_cost_table.fn(params, paths)
    (TIMINGS / "laptop.csv").write_text("component\n")
    with pytest.raises(InputError, match=r"laptop\.csv and .*laptop\.json are; keep one"):
        write_cost_table.fn(params, paths)
    assert not paths.costs.exists()


def test_llama_cpp_needs_no_cost_of_what_it_does_not_run(case: tuple[Params, Paths]) -> None:
    params, paths = case
    linear = params.model_copy(update={"distill_blocks": params.distill_blocks.model_copy(update={"linear": True})})
    rows = [row for row in timings(params, paths, linear=True) if (row.component, row.variant) != ("ffn", "linear")]
    write_timings(TIMINGS / "laptop.parquet", [dataclasses.replace(row, engine="llama.cpp") for row in rows])
    write_cost_table.fn(linear, paths)
    write_timings(TIMINGS / "laptop.parquet", rows)
    with pytest.raises(InputError, match="no ffn linear on laptop, torch"):
        write_cost_table.fn(linear, paths)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_llama_cpp_is_timed_beside_torch(
    qk_norm: bool, case: tuple[Params, Paths], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny parent is timed in earnest, with few designs: every variant that llama.cpp has, and torch's rows stay.

    With qk-norm it has no linear attention, and where blocks differ no head of its own: an untied one is timed tied.
    """
    params, paths = case
    qwen3 = SimpleNamespace(config=dataclasses.replace(Parent(paths.parent).config, qk_norm=True, tie_embeddings=False))
    if qk_norm:
        monkeypatch.setattr("tasks.commands.time_machine.Parent", lambda _: qwen3)
    costs = params.measure_costs.model_copy(update={"repeats": 2, "threads": 1})
    params = params.model_copy(update={"measure_costs": costs})
    monkeypatch.setattr("tasks.commands.time_machine._DESIGNS", 3)
    path, config = TIMINGS / "laptop.parquet", Parent(paths.parent).config
    torch_rows = timings(params, paths, linear=False)
    write_timings(path, torch_rows)
    time_llamacpp(params, paths, "laptop", path)
    rows = read_timings(path)
    assert {row for row in rows if row.engine == "torch"} == set(torch_rows)
    timed = {(row.component, row.variant): row for row in rows if row.engine == "llama.cpp"}
    attentions = {("attention", attention.name) for attention in attention_variants(config, linear=not qk_norm)}
    assert {component for component in timed if component[0] == "attention"} == attentions
    assert ("ffn", "linear") not in timed and ("ffn", "no_op") in timed
    assert {row.precision for row in timed.values()} == {"float16"}
    assert all("xllamacpp" in row.versions and "least squares over 4 whole models" in row.how for row in timed.values())
    assert min(row.decode_ms for row in timed.values()) >= 0 < max(row.decode_ms for row in timed.values())
    assert sorted(paths.root.glob("tmp*")) == []
