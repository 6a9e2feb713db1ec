"""Tables of tokens/s for people: what stands in them, by hand, and that they fit a terminal."""

from dataclasses import replace

from storage.records import ThroughputRow
from tasks.drawing.throughput_text import throughput_tables

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
