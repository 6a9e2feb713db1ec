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


def test_a_table_says_what_was_buffered_who_counted_and_what_a_proxy_carried() -> None:
    counted = Answer(0.0, 2.0, (2.0,), 17, 3, counted_by="our tokenizer", text="abc")
    text_load = dataclasses.replace(LOAD, prompt_kind="text", route="proxy")
    row = summary(text_load, [counted, counted])
    longer = dataclasses.replace(row, concurrency=64, counted_output_tokens=9.5)
    lines = load_table([row, longer]).splitlines()
    assert "16 tokens as text in, at most 3 out" in lines[1]
    assert lines[4].split()[:5] == ["2", "2", "0", "3.0", "buffered"]
    assert "  2 at once, BUFFERED: 2 of 2 answers came at once, so first token = last, no rate per user" in lines
    assert "  2 at once: measured THROUGH A PROXY" in lines
    assert "  medians of 3 to 9.5 tokens came out, counted by our tokenizer" in lines
    assert max(map(len, lines)) <= 100


def test_text_prompts_are_no_equal_work_to_a_fixed_length() -> None:
    """The child's row of text prompts stands apart, without a ratio, and with a note."""
    parent, child, _ = rows()
    plain = dataclasses.replace(child, prompt_kind="text", route="proxy", scenario="2048/128")
    fixed = dataclasses.replace(parent, scenario="2048/128")
    table = comparison_table([fixed, plain])
    line = next(line for line in table.splitlines() if "2048/128 *" in line)
    assert line.split()[3:5] == ["child", "3.0"] and line.split()[-1] == "-"
    assert "* text prompts: answers may be shorter" in table
    assert "through a proxy, whose time counts: child" in table
    assert max(map(len, table.splitlines())) <= 100


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
