"""The command against scripted servers: a table and pictures, rows that stay, errors that are one line."""

import subprocess
import sys
from pathlib import Path

from storage.tables import read_serving
from tests.openai_server import Manner, scripted


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", "benchmark-server", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_parent_then_child_in_one_table(tmp_path: Path) -> None:
    out = tmp_path / "serving.parquet"
    common = ["--concurrencies", "1,2", "--length-scale", "0.05", "--rounds", "2", "--out", str(out)]
    with scripted("whole") as parent, scripted("whole", "500") as child:
        first = run(f"parent={parent.url}", "--devices", "2", *common)
        second = run(f"child={child.url}#scripted", *common)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    rows = read_serving(out)
    assert [(row.name, row.concurrency, row.devices, row.errors) for row in rows] == [
        ("child", 1, 1, 1),
        ("child", 2, 1, 2),
        ("parent", 1, 2, 0),
        ("parent", 2, 2, 0),
    ]
    assert {(row.input_tokens, row.output_tokens) for row in rows} == {(6, 6)}
    assert second.stdout.count("ERRORS: HTTP 500") == 2
    assert "parent  " in second.stdout  # compared with what the first run measured
    assert max(map(len, second.stdout.splitlines()[:-1])) <= 100  # the last names the files
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "128/128, sent as 6/6" in out.with_suffix(".svg").read_text()


def test_what_cannot_be_measured_is_one_error_and_no_table(tmp_path: Path) -> None:
    out = tmp_path / "serving.parquet"
    with scripted("429") as busy:
        lost = run("parent=http://127.0.0.1:9/v1", "--out", str(out))
        other = run(f"parent={busy.url}#llama", "--out", str(out))
        refused = run(f"parent={busy.url}", "--concurrencies", "1", "--length-scale", "0.1", "--out", str(out))
        prompts = [tuple(request["prompt"]) for request in busy.requests]
    assert [ended.returncode for ended in (lost, other, refused)] == [2, 2, 2]
    assert "no server answers at http://127.0.0.1:9/v1/models" in lost.stderr
    assert "no model 'llama', name one of them" in other.stderr
    assert "no request came back whole (parent: HTTP 429 x3" in refused.stderr
    assert len(set(prompts)) == len(prompts) == 4
    assert not list(tmp_path.iterdir())


def test_arguments_say_what_they_expect() -> None:
    for arguments, expected in {
        ("parent",): "expected NAME=http://HOST:PORT/v1",
        ("a=http://h/v1", "--scenarios", "128"): "expected INPUT/OUTPUT tokens",
        ("a=http://h/v1", "--concurrencies", "0"): "expected numbers of at least 1",
        ("a=http://h/v1", "--rounds", "1,2"): "expected a number of at least 1",
        ("a=http://h/v1", "--length-scale", "nan"): "expected a number above 0",
        ("a=http://me:pw@h/v1",): "no password or key in the URL",
        ("a=http://h/v1", "--out", "x.csv"): "the table is a .parquet file",
        ("a=http://h/v1", "a=http://g/v1"): "two servers have the same NAME",
    }.items():
        ended = run(*arguments)
        assert ended.returncode == 2
        assert expected in ended.stderr


def test_a_scenario_that_fails_does_not_end_the_others_and_another_model_does_not_mix(tmp_path: Path) -> None:
    """The server refuses the first scenario's four requests, then works: its rows have errors and no speed."""
    out = tmp_path / "serving.parquet"
    common = ["--concurrencies", "1", "--length-scale", "0.05", "--out", str(out)]
    manners: list[Manner] = ["500", "500", "500", "500", "whole", "whole", "whole", "whole"]
    with scripted(*manners) as server:
        first = run(f"parent={server.url}", "--scenarios", "2048/128,128/128", *common)
        again = run(f"parent={server.url}", "--devices", "4", *common)
        prompts = [tuple(request["prompt"]) for request in server.requests]
    assert first.returncode == 0, first.stderr
    results = {row.scenario: (row.errors, row.measured_tokens_per_s is None) for row in read_serving(out)}
    assert results == {"2048/128": (3, True), "128/128": (0, False)}
    assert len({prompt[:6] for prompt in prompts}) == len(prompts) == 8  # none begins as another of 6 tokens or more
    assert again.returncode == 2
    assert "has parent as scripted on 1 devices, this one is scripted on 4" in again.stderr
