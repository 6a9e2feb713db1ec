"""Tables of servers under load, by hand; they fit a terminal."""

import dataclasses

from storage.records import ServingRow
from tasks.drawing.serving_text import comparison_table, load_table
from tasks.engines.client import Answer
from tasks.engines.load import summary
from tests.engines.test_load import LOAD


def rows() -> list[ServingRow]:
    answers = [Answer(0.0, 2.0, (1.0, 1.5, 2.0), 17, 3)] * 2
    parent = summary(LOAD, [*answers, Answer(0.0, 1.0, error="stream dropped", detail="x" * 300)])
    child = summary(dataclasses.replace(LOAD, name="child", devices=1), [dataclasses.replace(answers[0], ended=1.0)])
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
