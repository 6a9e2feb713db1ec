"""Costs against hand-computed cases: the roofline's two regimes, sums over an architecture, missing rows."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.files import InputError
from storage.metrics import METRICS, Metric
from storage.records import Component, CostRow, TimingRow
from storage.scenario import Setting
from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.costs.cost_model import ENGINE, modelled_rows
from tasks.puzzle.costs.cost_table import CostTable, from_table, model_sizes, model_speed
from tasks.puzzle.costs.hardware import DEVICES, Device, device_named
from tasks.puzzle.costs.sizes import component_sizes
from tasks.puzzle.search.quantities import Quantity, measure
from tasks.puzzle.search_space import attention_variants, ffn_variants, parent_blocks
from tests.puzzle.test_search_space import DEMO_RATIOS, LLAMA_70B, SMOLLM2

ATTENTIONS = attention_variants(SMOLLM2, linear=True)
FFNS = ffn_variants(SMOLLM2, DEMO_RATIOS, 64, linear=True)
SETTING = Setting("unit", ENGINE, "bfloat16", 1, "128/128", 8)


def _device(flops: float, bandwidth: float) -> Device:
    return Device(
        name="unit",
        description="made up",
        peak_flops={"bfloat16": flops, "fp8": flops, "float32": flops, "float16": flops, "int4": flops},
        memory_bandwidth=bandwidth,
        memory_bytes=1e9,
        total_bytes=1e9,
        link_bandwidth=1e9,
        sources={},
    )


COMPUTE_BOUND = _device(flops=1e9, bandwidth=1e30)
MEMORY_BOUND = _device(flops=1e30, bandwidth=1e6)


def _rows(device: Device, scenario: str = "128/128", batch: int = 8) -> tuple[CostRow, ...]:
    return modelled_rows(
        SMOLLM2, ATTENTIONS, FFNS, device, Setting(device.name, ENGINE, "bfloat16", 1, scenario, batch)
    )


def _row(rows: Sequence[CostRow], component: Component, variant: str) -> CostRow:
    return next(row for row in rows if (row.component, row.variant) == (component, variant))


def test_purely_compute_bound() -> None:
    """1 GFLOP/s: milliseconds are MFLOPs. 2 FLOPs per weight and token; attention 2 x 2 per head element and pair."""
    rows = _rows(COMPUTE_BOUND)
    ffn = _row(rows, "ffn", "ffn_768")
    assert ffn.prefill_ms == pytest.approx(2 * 3 * 576 * 768 * (8 * 128) / 1e6)
    assert ffn.decode_ms == pytest.approx(2 * 3 * 576 * 768 * 8 / 1e6)
    attention = _row(rows, "attention", "kv_3")
    weights = 2 * 576 * 576 + 2 * 576 * 192
    assert attention.prefill_ms == pytest.approx((2 * weights * 8 * 128 + 4 * 8 * 128 * 64 * 576) / 1e6)
    assert attention.decode_ms == pytest.approx((2 * weights * 8 + 4 * 8 * 192 * 576) / 1e6)
    head = _row(rows, "head", "parent")
    assert head.prefill_ms == head.decode_ms == pytest.approx(2 * 49152 * 576 * 8 / 1e6)


def test_purely_memory_bound() -> None:
    """1 MB/s: milliseconds are kB. Weights once a pass, the KV cache of 128 + 128 / 2 tokens a decode step."""
    rows = _rows(MEMORY_BOUND)
    ffn = _row(rows, "ffn", "ffn_768")
    assert ffn.prefill_ms == ffn.decode_ms == pytest.approx(2 * (3 * 576 * 768 + 576) / 1e3)
    attention = _row(rows, "attention", "kv_1")
    weight_bytes = 2 * (2 * 576 * 576 + 2 * 576 * 64 + 576)
    assert attention.decode_ms == pytest.approx((weight_bytes + 8 * 192 * 2 * 64 * 2) / 1e3)
    head = _row(rows, "head", "parent")
    assert head.decode_ms == pytest.approx(2 * 49152 * 576 / 1e3)  # tied: no bytes of its own, read all the same
    assert head.weight_bytes == 2 * 576
    assert _row(rows, "embedding", "parent").decode_ms == pytest.approx(8 * 576 * 2 / 1e3)


def test_a_no_op_and_a_step_take_nothing_in_the_roofline() -> None:
    rows = _rows(COMPUTE_BOUND)
    for component, variant in (("attention", "no_op"), ("ffn", "no_op"), ("step", "parent")):
        row = next(row for row in rows if (row.component, row.variant) == (component, variant))
        assert (row.prefill_ms, row.decode_ms, row.params, row.weight_bytes) == (0, 0, 0, 0)


def test_a_70b_in_fp8_on_an_h100_is_bound_by_reading_its_weights() -> None:
    """A decode step at batch 1 reads 72.7 GB less the embedding (2.1 GB), at 3.35 TB/s: 21.06 ms, and 31 MB of KV."""
    attention, ffn = parent_blocks(LLAMA_70B)[0].attention, parent_blocks(LLAMA_70B)[0].ffn
    setting = Setting("h100-sxm", ENGINE, "fp8", 1, "128/128", 1)
    rows = modelled_rows(LLAMA_70B, [attention], [ffn], device_named("h100-sxm"), setting)
    speed = model_speed(CostTable(rows), parent_blocks(LLAMA_70B), setting)
    read = 72.6554e9 - 128256 * 8192 * 2 + 192 * 163_840
    assert speed.decode_ms == pytest.approx(read / 3.35e12 * 1e3, rel=1e-3)
    assert {row.origin for row in rows} == {"modelled"}


@given(
    st.sampled_from(["128/128", "512/128", "2048/2048"]),
    st.integers(1, 64),
    st.integers(1, 3),
    st.sampled_from([COMPUTE_BOUND, MEMORY_BOUND, DEVICES["h100-sxm"]]),
)
def test_time_grows_with_batch_and_with_every_size(scenario: str, batch: int, more: int, device: Device) -> None:
    small, large = _rows(device, scenario, batch), _rows(device, scenario, batch + more)
    for before, after in zip(small, large, strict=True):
        assert before.prefill_ms <= after.prefill_ms and before.decode_ms <= after.decode_ms
    for component, variants in (("attention", ATTENTIONS), ("ffn", FFNS)):
        rows = [row for row in small if row.component == component]
        assert len(rows) == len(variants)
        for wide, narrow in itertools.pairwise(sorted(rows, key=lambda row: row.params, reverse=True)):
            assert narrow.prefill_ms <= wide.prefill_ms and narrow.decode_ms <= wide.decode_ms


BLOCKS = st.lists(st.tuples(st.sampled_from(ATTENTIONS), st.sampled_from(FFNS)), min_size=1, max_size=6).map(
    lambda pairs: [Replacement(index, 1, a, f) for index, (a, f) in enumerate(pairs)]
)


@given(BLOCKS, st.sampled_from(list(METRICS.values())))
def test_what_the_search_adds_up_is_what_the_model_costs(blocks: list[Replacement], metric: Metric) -> None:
    """Separability: the linear form of every metric equals its independent evaluation."""
    table = CostTable(_rows(MEMORY_BOUND))
    mix = ((SETTING, 1.0),) if metric.speed else ()
    quantity = Quantity(metric, "bfloat16", "unit", ENGINE, mix, batch=8, context=256, workspace_bytes=12345.0)
    total = quantity.fixed_part(table) + sum(quantity.parts_of_blocks(table, blocks))
    value = measure(table, blocks, quantity)
    assert quantity.total_at(value) == pytest.approx(total, rel=1e-12)


def test_request_metrics_by_hand() -> None:
    rows = [replace(row, prefill_ms=0.0, decode_ms=0.0) for row in _rows(COMPUTE_BOUND)]
    rows = [replace(row, prefill_ms=100.0, decode_ms=2.0) if row.component == "head" else row for row in rows]
    speed = model_speed(CostTable(rows), parent_blocks(SMOLLM2), SETTING)
    assert speed.latency_ms == 100 + 128 * 2
    assert speed.throughput == pytest.approx(8 * 128 / 0.356)
    assert speed.decode_throughput == pytest.approx(8 / 0.002)


def test_memory_by_hand() -> None:
    sizes = model_sizes(CostTable(_rows(COMPUTE_BOUND)), parent_blocks(SMOLLM2), "bfloat16")
    assert (sizes.params, sizes.block_params) == (134_515_008, 106_202_880)
    assert sizes.memory_gib(8, 256) == pytest.approx((2 * 134_515_008 + 8 * 256 * 23_040) / 2**30)
    assert sizes.memory_gib(8, 256, tensor_parallel=2) == pytest.approx(sizes.memory_gib(8, 256) / 2)


def test_a_blocks_own_row_comes_before_the_one_for_all() -> None:
    rows = list(_rows(COMPUTE_BOUND))
    of_block_4 = replace(_row(rows, "ffn", "ffn_768"), first_block=4, decode_ms=99.0)
    table = CostTable([*rows, of_block_4])
    assert table.row(SETTING, "ffn", "ffn_768", 4).decode_ms == 99.0
    assert table.row(SETTING, "ffn", "ffn_768", 5) == _row(rows, "ffn", "ffn_768")
    assert table.row(SETTING, "ffn", "ffn_768", 3, span=2) == _row(rows, "ffn", "ffn_768")


def test_a_missing_variant_names_what_the_table_has() -> None:
    rows = [row for row in _rows(COMPUTE_BOUND) if row.variant != "ffn_1536"]
    table = CostTable(rows)
    with pytest.raises(InputError, match=r"no cost of ffn 'ffn_1536' on unit, roofline, .* has ffn: .*ffn_768"):
        model_speed(table, parent_blocks(SMOLLM2), SETTING)
    with pytest.raises(InputError, match=r"no ffn 'ffn_1536' for precision bfloat16 \(has: .*ffn_768 in bfloat16"):
        model_sizes(table, parent_blocks(SMOLLM2), "bfloat16")


def test_a_missing_setting_names_those_that_there_are() -> None:
    table = CostTable(_rows(COMPUTE_BOUND))
    with pytest.raises(InputError, match="the table has unit, roofline, bfloat16, 128/128, batch 8"):
        model_speed(table, parent_blocks(SMOLLM2), replace(SETTING, batch=16))


def test_rows_that_disagree_on_a_size_are_refused() -> None:
    rows = list(_rows(COMPUTE_BOUND))
    other = replace(_row(rows, "ffn", "ffn_768"), hardware="mine", params=1)
    table = CostTable([*rows, other])
    with pytest.raises(InputError, match="2 different sizes of ffn 'ffn_768'"):
        table.sizes("ffn", "ffn_768", "bfloat16")
    assert table.sizes("ffn", "ffn_768", "bfloat16", hardware="mine").params == 1


def test_measured_and_modelled_are_told_apart() -> None:
    rows = _rows(COMPUTE_BOUND)
    measured = [replace(row, hardware="mine", origin="measured") for row in rows]
    table = CostTable([*rows, *measured])
    assert table.origin(SETTING) == "modelled"
    assert table.origin(replace(SETTING, hardware="mine")) == "measured"


def _timing(component: Component, variant: str) -> TimingRow:
    sizes = component_sizes(SMOLLM2, component, variant, "bfloat16")
    return TimingRow(
        component=component,
        variant=variant,
        first_block=None,
        span=1,
        hardware="cpu",
        engine="torch",
        precision="bfloat16",
        tensor_parallel=1,
        scenario="128/128",
        batch=8,
        prefill_ms=3.0,
        decode_ms=0.5,
        weight_bytes=sizes.weight_bytes,
        kv_bytes_per_token=sizes.kv_bytes_per_token,
        params=sizes.params,
        origin="measured",
        how="N against 2N copies",
        machine="2 cores",
        versions="torch 2.13",
        dtype="bfloat16",
        threads=2,
        repeats=9,
        spread=0.031,
    )


def test_timings_become_costs_and_say_how_they_were_taken() -> None:
    (cost,) = from_table([_timing("attention", "kv_1")], SMOLLM2)
    assert type(cost) is CostRow
    assert (cost.prefill_ms, cost.decode_ms, cost.params) == (3.0, 0.5, 2 * 576 * 576 + 2 * 576 * 64 + 576)
    assert cost.how == "N against 2N copies; 2 cores; torch 2.13; bfloat16, 2 threads, 9 repeats, spread 3.1%"


def test_timings_of_another_parent_are_refused() -> None:
    with pytest.raises(InputError, match=r"timings of cpu are another parent's: ffn ffn_768 .*time-machine cpu"):
        from_table([_timing("ffn", "ffn_768")], replace(SMOLLM2, hidden_size=640))


def test_devices_say_where_each_number_is_from_and_unknown_ones_get_a_hint() -> None:
    for device in DEVICES.values():
        sourced = {"peak_flops", "memory_bandwidth", "memory_bytes", "total_bytes", "link_bandwidth"}
        assert set(device.sources) == sourced
        assert 0.85 < device.memory_bytes / device.total_bytes < 1
        assert {"bfloat16", "float16", "int4", "float32"} <= set(device.peak_flops)
        assert ("fp8" in device.peak_flops) == (device.name != "a100-80gb-sxm")  # Ampere multiplies no fp8
    with pytest.raises(InputError, match="did you mean h100-sxm"):
        device_named("h100-smx")


def test_a_span_is_costed_by_its_subblocks() -> None:
    """One child block instead of two parent blocks costs what one block costs."""
    table = CostTable(_rows(COMPUTE_BOUND))
    quantity = Quantity(METRICS["latency_ms"], "bfloat16", "unit", ENGINE, ((SETTING, 1.0),))
    span = Replacement(0, 2, Attention("gqa", 3), Ffn("gated", 1536))
    of_span, of_block = quantity.parts_of_blocks(table, [span, parent_blocks(SMOLLM2)[0]])
    assert of_span == of_block
