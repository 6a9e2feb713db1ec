"""What a load measured, by hand."""

import dataclasses

import pytest

from storage.records import ServingLoad
from tasks.engines.client import Answer
from tasks.engines.load import summary

LOAD = ServingLoad(
    name="parent",
    model="model",
    url="http://127.0.0.1:8000/v1",
    devices=2,
    scenario="128/128",
    input_tokens=16,
    output_tokens=3,
    concurrency=2,
    prompt_kind="token ids",
    route="direct",
)


def test_rates_and_percentiles_by_hand() -> None:
    """Two whole answers of 3 tokens and a failed one, in 4 s: 6 tokens / 4 s."""
    row = summary(
        LOAD,
        [
            Answer(10.0, 12.0, (1.0, 1.5, 2.0), 16, 3),  # 2 tokens in 1 s after the first
            Answer(10.0, 14.0, (2.0, 3.0, 4.0), 16, 3),  # 2 tokens in 2 s
            Answer(11.0, 13.0, (0.1,), None, 1, "HTTP 429", "slow\n down"),
        ],
    )
    assert (row.requests, row.errors, row.error_kinds) == (3, 1, "HTTP 429 x1 (HTTP 429: slow down)")
    assert row.seconds == 4.0
    assert row.measured_tokens_per_s == 1.5
    assert row.measured_user_tokens_per_s == 1.5  # the median of 2 and 1
    assert row.ttft_p50_ms == 1500.0
    assert row.ttft_p99_ms == pytest.approx(1990.0)
    assert row.itl_p50_ms == 750.0  # of 500, 500, 1000, 1000
    assert row.itl_p99_ms == pytest.approx(1000.0)
    assert row.counted_input_tokens == 16


def test_an_event_of_several_tokens_counts_as_several() -> None:
    """Of four events with 2 tokens each, three came after the first: 6 tokens in 3 s."""
    row = summary(LOAD, [Answer(0.0, 5.0, (1.0, 2.0, 3.0, 4.0), 16, 8)])
    assert row.measured_user_tokens_per_s == 2.0


def test_a_buffered_answer_has_no_rate_of_a_user_and_leaves_that_of_others() -> None:
    buffered = Answer(0.0, 2.0, (2.0, 2.0, 2.0), 16, 3)
    row = summary(LOAD, [buffered, Answer(0.0, 2.0, (1.0, 1.5, 2.0), 16, 3)])
    assert (row.buffered, row.measured_user_tokens_per_s, row.itl_p50_ms) == (1, 2.0, 500.0)
    row = summary(LOAD, [buffered])
    assert (row.measured_tokens_per_s, row.measured_user_tokens_per_s, row.itl_p50_ms) == (1.5, None, None)


def test_one_token_alone_is_not_buffered() -> None:
    assert summary(LOAD, [Answer(0.0, 1.0, (1.0,), 16, 1)]).buffered == 0


def test_who_counted_is_kept() -> None:
    usage = Answer(0.0, 4.0, (1.0, 2.0), 16, 4)
    row = summary(LOAD, [usage, dataclasses.replace(usage, output_tokens=2, counted_by="our tokenizer")])
    assert (row.counted_output_tokens, row.counted_by) == (3.0, "our tokenizer, usage")


def test_nothing_whole_is_no_speed() -> None:
    row = summary(LOAD, [Answer(0.0, 1.0, error="timeout"), Answer(0.0, 1.0, error="timeout")])
    assert (row.measured_tokens_per_s, row.ttft_p50_ms, row.itl_p50_ms) == (None, None, None)
    assert row.error_kinds == "timeout x2"
