"""What a load measured, by hand; tables that fit a terminal."""

import dataclasses

import pytest

from storage.records import ServingLoad, ServingRow
from tasks.engines.client import Answer
from tasks.engines.load import comparison_table, load_table, summary

ASKED = ServingLoad(
    name="parent",
    model="model",
    url="http://127.0.0.1:8000/v1",
    devices=2,
    scenario="128/128",
    input_tokens=16,
    output_tokens=3,
    concurrency=2,
)


def test_rates_and_percentiles_by_hand() -> None:
    """Two whole answers of 3 tokens and a failed one, in 4 s: 6 tokens / 4 s."""
    row = summary(
        ASKED,
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


def test_nothing_whole_is_no_speed() -> None:
    row = summary(ASKED, [Answer(0.0, 1.0, error="timeout"), Answer(0.0, 1.0, error="timeout")])
    assert (row.measured_tokens_per_s, row.ttft_p50_ms, row.itl_p50_ms) == (None, None, None)
    assert row.error_kinds == "timeout x2"


def rows() -> list[ServingRow]:
    answers = [Answer(0.0, 2.0, (1.0, 1.5, 2.0), 17, 3)] * 2
    parent = summary(ASKED, [*answers, Answer(0.0, 1.0, error="stream dropped", detail="x" * 300)])
    child = summary(dataclasses.replace(ASKED, name="child", devices=1), [dataclasses.replace(answers[0], ended=1.0)])
    other = dataclasses.replace(parent, name="child", scenario="2048/2048", input_tokens=2048, output_tokens=2048)
    return [parent, child, other]


def test_a_servers_table_tells_errors_and_scaled_lengths() -> None:
    text = load_table(rows()[:1])
    assert "ERRORS: stream dropped x1 (stream dropped: xxx" in text
    assert "chatbot 128/128: 16 tokens in, 3 out (SCALED); the server counts 17 in" in text
    assert max(map(len, text.splitlines())) <= 100


def test_servers_are_compared_per_device_at_equal_work() -> None:
    """The parent makes 6 tokens in 2 s on 2 devices, 1.5 a device; the child 3 in 1 s on one."""
    lines = comparison_table(rows()).splitlines()
    parent, child, alone = (line.split() for line in lines[2:5])
    assert parent[:4] == ["chatbot", "128/128", "parent", "1.5"]
    assert child[2:4] == ["child", "3.0"]
    assert (parent[-1], child[-1], alone[-1]) == ("1.000", "2.000", "-")
    assert "SCALED: 128/128 as 16/3" in lines[-1]
    silent = dataclasses.replace(rows()[0], name="silent", measured_tokens_per_s=None, errors=3)
    line = next(line for line in comparison_table([*rows(), silent]).splitlines() if "silent" in line)
    assert line.split()[2:] == ["silent", "-", "2", "2", "3", "-"]
    assert max(map(len, lines)) <= 100
