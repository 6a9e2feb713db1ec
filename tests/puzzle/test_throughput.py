"""Modelled throughput against hand-computed rooflines and brute force over batches; predictions against plain sums."""

import math
from dataclasses import replace
from typing import get_args

import pytest

from storage.files import InputError
from storage.records import Attention, CostRow, Ffn, Precision, Replacement, ThroughputRow
from tasks.puzzle.cost_model import ENGINE, modelled_rows
from tasks.puzzle.costs import GIB, CostTable, ModelSpeed, Setting, model_sizes, model_speed
from tasks.puzzle.hardware import Device, device_named
from tasks.puzzle.throughput import MOST_SEQUENCES, best_modelled, predict, throughput_tables
from tasks.puzzle.variants import parent_blocks
from tests.puzzle.test_variants import LLAMA_70B, SMOLLM2

PARENT = parent_blocks(SMOLLM2)
# Ten of 30 blocks lack attention, ten have half of the FFN.
CHILD = (
    *(Replacement(index, 1, Attention("no_op"), Ffn("gated", 1536)) for index in range(10)),
    *(Replacement(index, 1, Attention("gqa", 3), Ffn("gated", 768)) for index in range(10, 20)),
    *PARENT[20:],
)
SLOW_COMPUTE, SLOW_MEMORY = (1e9, 1e30), (1e30, 1e6)


def _device(rates: tuple[float, float], memory_bytes: float) -> Device:
    """A made-up device of (FLOP/s, bytes/s)."""
    flops = dict.fromkeys(get_args(Precision), rates[0])
    return replace(device_named("h100-sxm"), peak_flops=flops, memory_bandwidth=rates[1], memory_bytes=memory_bytes)


def _best(blocks: tuple[Replacement, ...], device: Device, scenario: str = "8/4") -> ModelSpeed:
    return best_modelled(SMOLLM2, blocks, device, "bfloat16", scenario)[0]


def test_bound_by_memory() -> None:
    """1 MB/s: a pass reads blocks and head once, and per sequence a KV cache and a row of the embedding."""
    per_token = 30 * 2 * 3 * 64 * 2
    blocks = 30 * 2 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576)
    matrix, row = 2 * 49152 * 576, 2 * 576
    memory = blocks + matrix + row + 5.9 * 12 * per_token  # room for five requests of 8 + 4 tokens
    prefill_kb = (blocks + matrix + 5 * 8 * (per_token + row)) / 1e3
    decode_kb = (blocks + matrix + 5 * (10 * per_token + row)) / 1e3
    found = _best(PARENT, _device(SLOW_MEMORY, memory))
    assert found.setting.batch == 5
    assert found.throughput == pytest.approx(1e3 * 5 * 4 / (prefill_kb + 4 * decode_kb))


def test_bound_by_compute() -> None:
    """1 GFLOP/s: milliseconds are MFLOPs, the same for every sequence whatever the batch."""
    weights = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    head, attended = 49152 * 576, 30 * 576  # query elements
    prefill = 2 * weights * 8 + 4 * 8 * 4 * attended + 2 * head
    decode = 2 * weights + 4 * 10 * attended + 2 * head
    found = _best(PARENT, _device(SLOW_COMPUTE, 1e9))
    assert found.throughput == pytest.approx(1e3 * 4 / ((prefill + 4 * decode) / 1e6))


@pytest.mark.parametrize("blocks", [PARENT, CHILD], ids=["parent", "child"])
@pytest.mark.parametrize("rates", [SLOW_COMPUTE, SLOW_MEMORY, (1e11, 1e9)])
@pytest.mark.parametrize("room", [1, 2, 7, 37])
def test_no_batch_that_fits_is_better(blocks: tuple[Replacement, ...], rates: tuple[float, float], room: int) -> None:
    """Every batch tried, memory counted by ModelSizes."""
    tables = {
        batch: CostTable(
            modelled_rows(
                SMOLLM2,
                [Attention("gqa", 3), Attention("no_op")],
                [Ffn("gated", 1536), Ffn("gated", 768)],
                _device(rates, 0),
                "bfloat16",
                "8/4",
                batch,
            )
        )
        for batch in range(1, 2 * room + 2)
    }
    sizes = model_sizes(tables[1], blocks, "bfloat16")
    device = _device(rates, sizes.memory_gib(room, 12) * GIB + 100)
    fitting = [batch for batch in tables if sizes.memory_gib(batch, 12) * GIB <= device.memory_bytes]
    assert max(fitting) == room
    speeds = {
        batch: model_speed(tables[batch], blocks, Setting(device.name, ENGINE, "bfloat16", 1, "8/4", batch)).throughput
        for batch in fitting
    }
    found = _best(blocks, device)
    assert found.setting.batch in fitting
    assert found.throughput == speeds[found.setting.batch]
    assert found.throughput == pytest.approx(max(speeds.values()), rel=1e-12)


def test_a_smaller_child_is_never_slower_and_the_parent_as_a_child_is_as_fast() -> None:
    device = device_named("h100-sxm")
    for scenario in ("128/128", "2048/2048"):
        parent, same, child = (_best(blocks, device, scenario) for blocks in (PARENT, PARENT[:], CHILD))
        assert same == parent
        assert child.throughput > parent.throughput
        assert child.setting.batch > parent.setting.batch


def test_a_child_without_a_cache_has_no_endless_batch() -> None:
    blocks = tuple(Replacement(index, 1, Attention("no_op"), Ffn("gated", 768)) for index in range(30))
    found = _best(blocks, device_named("h100-sxm"))
    assert 1 < found.setting.batch <= MOST_SEQUENCES
    assert math.isfinite(found.throughput)


def test_what_does_not_fit_says_what_to_do() -> None:
    """A 70B in 16 bit has 131 GiB of weights, an H100 77; in fp8 it fits."""
    device = device_named("h100-sxm")
    with pytest.raises(InputError) as caught:
        best_modelled(LLAMA_70B, parent_blocks(LLAMA_70B), device, "bfloat16", "128/128")
    for word in ("131.4", "76.8", "128/128", "h100-sxm", "benchmark_throughput.precision"):
        assert word in str(caught.value)
    assert best_modelled(LLAMA_70B, parent_blocks(LLAMA_70B), device, "fp8", "128/128")[0].throughput > 0


def _measured() -> list[CostRow]:
    """Made-up timings of batch 2, a different number in every row."""
    attentions, ffns = [Attention("gqa", 3), Attention("no_op")], [Ffn("gated", 1536), Ffn("gated", 768)]
    rows = modelled_rows(SMOLLM2, attentions, ffns, device_named("h100-sxm"), "bfloat16", "8/4", 2)
    return [
        replace(row, hardware="unit", engine="torch", origin="measured", prefill_ms=1.5**index, decode_ms=1.25**index)
        for index, row in enumerate(rows)
    ]


AT = Setting("unit", "torch", "bfloat16", 1, "8/4", 2)


def test_a_prediction_is_the_sum_over_the_cost_table() -> None:
    rows = _measured()
    by_name = {(row.component, row.variant): row for row in rows}
    parts = [by_name["embedding", "parent"], by_name["head", "parent"], by_name["step", "parent"]]
    parts += 10 * [by_name["attention", "no_op"]] + 20 * [by_name["attention", "kv_3"]]
    parts += 20 * [by_name["ffn", "ffn_1536"]] + 10 * [by_name["ffn", "ffn_768"]]
    found = predict(rows, CHILD, AT)
    assert found is not None
    assert found.prefill_throughput == pytest.approx(1e3 * 2 * 8 / math.fsum(row.prefill_ms for row in parts))
    assert found.decode_throughput == pytest.approx(1e3 * 2 / math.fsum(row.decode_ms for row in parts))


def test_nothing_is_predicted_from_other_settings_other_variants_or_a_model() -> None:
    rows = _measured()
    for setting in (replace(AT, batch=1), replace(AT, precision="float32"), replace(AT, hardware="other")):
        assert predict(rows, CHILD, setting) is None
    assert predict([row for row in rows if row.variant != "ffn_768"], CHILD, AT) is None
    assert predict([replace(row, origin="modelled") for row in rows], CHILD, AT) is None


MEASURED = ThroughputRow(
    model="parent",
    phase="decode",
    scenario="128/128",
    batch=8,
    hardware="AMD EPYC",
    engine="torch",
    precision="bfloat16",
    tensor_parallel=1,
    threads=2,
    machine="AMD EPYC",
    versions="torch 2.13",
    measured_ms=80.0,
    measured_tokens_per_s=100.0,
    measured_spread=0.01,
    predicted_tokens_per_s=90.0,
    predicted_hardware="unit",
    how="median of 3 rounds; predicted from unit, NOT this machine",
)
MODELLED = ThroughputRow(
    model="parent",
    phase="request",
    scenario="128/128",
    batch=8,
    hardware="h100-sxm",
    engine="roofline",
    precision="bfloat16",
    tensor_parallel=1,
    modelled_tokens_per_s=2645.0,
    how="roofline",
)


def test_the_tables_for_people() -> None:
    """Ratios to the parent, and how far the predicted one is from the measured one; never both kinds in a line."""
    unpredicted = replace(MEASURED, batch=1, predicted_tokens_per_s=None, predicted_hardware=None, how="not predicted")
    text = throughput_tables(
        "51B-like",
        [
            replace(MODELLED, scenario="2048/128", batch=4, modelled_tokens_per_s=300.0),
            replace(MODELLED, scenario="2048/128", batch=9, modelled_tokens_per_s=600.0, model="child"),
            MODELLED,
            replace(MODELLED, model="child", batch=16, modelled_tokens_per_s=5478.0),
            replace(
                MEASURED, model="child", measured_tokens_per_s=120.0, measured_spread=0.03, predicted_tokens_per_s=99
            ),
            MEASURED,
            unpredicted,
            replace(unpredicted, model="child", measured_tokens_per_s=150.0),
        ],
    )
    lines = [line.split() for line in text.splitlines()]
    assert ["128/128", "decode", "8", "100.0", "120.0", "1.200", "1.100", "-8.3%", "3.0%"] in lines
    assert ["128/128", "decode", "1", "100.0", "150.0", "1.500", "-", "-", "1.0%"] in lines
    chatbot = lines.index(["chatbot", "128/128", "2,645", "8", "5,478", "16", "2.071"])
    assert lines[chatbot + 1] == ["summarisation/RAG", "2048/128", "300", "4", "600", "9", "2.000"]
    assert "NOT this machine" in text and "bfloat16" in text and "FP8" in text
    for line in text.splitlines():
        assert len(line) <= 100
        assert not ("modelled" in line.lower() and "measured on" in line.lower())
