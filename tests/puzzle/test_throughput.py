"""Modelled throughput against the published table and brute force over settings; predictions against plain sums."""

import math
from dataclasses import replace

import pytest

from storage.files import InputError
from storage.model_config import ModelConfig
from storage.records import Attention, CostRow, Ffn, Precision, Replacement, ThroughputRow
from tasks.puzzle.cost_model import modelled_rows
from tasks.puzzle.costs import GIB, Setting
from tasks.puzzle.engine_model import TENSORRT_LLM, Estimate, Model, estimate
from tasks.puzzle.hardware import device_named
from tasks.puzzle.throughput import best_modelled, predict, throughput_tables
from tasks.puzzle.variants import parent_blocks
from tests.puzzle.test_variants import LLAMA_70B, SMOLLM2

PARENT = parent_blocks(SMOLLM2)
H100_BYTES = device_named("h100-sxm").memory_bytes
# Ten of 30 blocks lack attention, ten have half of the FFN.
CHILD = (
    *(Replacement(index, 1, Attention("no_op"), Ffn("gated", 1536)) for index in range(10)),
    *(Replacement(index, 1, Attention("gqa", 3), Ffn("gated", 768)) for index in range(10, 20)),
    *PARENT[20:],
)


def _best(
    blocks: tuple[Replacement, ...], scenario: str, config: ModelConfig = SMOLLM2, precision: Precision = "bfloat16"
) -> Estimate:
    return best_modelled(config, blocks, device_named("h100-sxm"), precision, scenario)[0]


def test_the_published_table_is_what_is_modelled() -> None:
    """The 70B where four H100s are best, as published: tokens/s per H100 (docs/costs.md has the other rows)."""
    for scenario, published in (("128/2048", 2786), ("128/4096", 1828), ("2048/2048", 1336)):
        found = _best(parent_blocks(LLAMA_70B), scenario, LLAMA_70B, "fp8")
        assert found.tokens_per_s_per_gpu == pytest.approx(published, rel=0.02)
        assert found.tensor_parallel == 4


@pytest.mark.parametrize("scenario", ["128/128", "2048/2048"])
def test_no_batch_and_number_of_devices_that_fits_is_better(scenario: str) -> None:
    model = Model(SMOLLM2, tuple((block.attention, block.ffn) for block in CHILD))
    inputs, outputs = map(int, scenario.split("/"))
    tried = [
        estimate(model, device_named("h100-sxm"), TENSORRT_LLM, "bfloat16", (inputs, outputs), degree, batch)
        for degree in (1, 2, 4, 8)
        for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    ]
    best = _best(CHILD, scenario)
    fitting = [one for one in tried if (one.weights_gib + one.kv_gib) * GIB <= H100_BYTES]
    assert len(fitting) >= 30
    assert best.tokens_per_s_per_gpu == max(one.tokens_per_s_per_gpu for one in fitting)


def test_a_smaller_child_is_never_slower_and_the_parent_as_a_child_is_as_fast() -> None:
    for scenario in ("128/128", "2048/2048"):
        assert _best(PARENT[:], scenario) == _best(PARENT, scenario)
        assert _best(CHILD, scenario).tokens_per_s_per_gpu > _best(PARENT, scenario).tokens_per_s_per_gpu


def test_what_does_not_fit_says_what_to_do() -> None:
    """A 70B in 16 bit has 131.4 GiB of weights; a device of 8 GiB is too small even eight times."""
    small = replace(device_named("h100-sxm"), memory_bytes=8 * GIB)
    with pytest.raises(InputError) as caught:
        best_modelled(LLAMA_70B, parent_blocks(LLAMA_70B), small, "bfloat16", "128/128")
    for word in ("131.4", "8.0 GiB of h100-sxm", "128/128 in bfloat16", "benchmark_throughput", "narrower precision"):
        assert word in str(caught.value)


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
    engine="tensorrt-llm",
    precision="bfloat16",
    tensor_parallel=4,
    modelled_tokens_per_s=2645.0,
    how="engine model",
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
            replace(MODELLED, model="child", batch=16, tensor_parallel=1, modelled_tokens_per_s=5478.0),
            replace(
                MEASURED, model="child", measured_tokens_per_s=120.0, measured_spread=0.03, predicted_tokens_per_s=99
            ),
            MEASURED,
            unpredicted,
            replace(unpredicted, model="child", measured_tokens_per_s=150.0),
        ],
        {"128/128": "128/128"},
    )
    lines = [line.split() for line in text.splitlines()]
    assert ["128/128", "decode", "8", "100.0", "120.0", "1.200", "1.100", "-8.3%", "3.0%"] in lines
    assert ["128/128", "decode", "1", "100.0", "150.0", "1.500", "-", "-", "1.0%"] in lines
    chatbot = lines.index(["chatbot", "128/128", "2,645", "8", "4", "5,478", "16", "1", "2.071"])
    assert lines[chatbot + 1] == ["summarisation/RAG", "2048/128", "300", "4", "4", "600", "9", "4", "2.000"]
    assert "NOT this machine" in text and "bfloat16" in text and "FP8" in text
    for line in text.splitlines():
        assert len(line) <= 100
        assert not ("modelled" in line.lower() and "measured on" in line.lower())


def test_whole_requests_by_hand_at_the_best_measured_batch_and_with_scaled_lengths() -> None:
    """16/32 for 128/256: batch 8 makes 256 tokens in 1 s + 32 x 80 ms, 71.9 a second; batch 1 makes 32."""
    decode = replace(MEASURED, scenario="16/32")
    rows = [decode, replace(decode, phase="prefill", measured_ms=1000.0)]
    rows += [replace(row, batch=1) for row in rows]
    rows += [replace(row, model="child", measured_ms=row.measured_ms / 2) for row in rows if row.measured_ms]
    rows += [replace(row, engine="llama.cpp") for row in rows]
    modelled = [MODELLED, replace(MODELLED, model="child")]
    text = throughput_tables("51B-like", [*rows, *modelled], {"16/32": "128/256"})
    lines = [line.split() for line in text.splitlines()]
    assert lines.count(["16/32", "71.9", "8", "1", "144", "8", "1", "2.000"]) == 2
    assert text.count("lengths are SCALED: 128/256 as 16/32") == 2
    assert "of whole requests per device, MEASURED (llama.cpp, bfloat16)" in text
    assert max(map(len, text.splitlines())) <= 100
