"""The command against scripted servers: a table and pictures, rows that stay, errors that are one line."""

import base64
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from storage.files import InputError
from storage.parquet_files import write_table
from storage.tables import read_serving
from tasks.commands.benchmark_server import LoadSweep, Server, benchmark_servers
from tests.openai_server import Manner, scripted

ROOT = Path(__file__).parents[3]
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


def run(
    *arguments: str, cwd: Path = ROOT, proxies: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command in an environment with these variables on proxies and no others."""
    command = [sys.executable, "-m", "flows.cli", "benchmark-server", *arguments]
    environment = {name: value for name, value in os.environ.items() if name.lower() not in PROXIES}
    environment |= {"PYTHONPATH": str(ROOT), **(proxies or {})}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


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


def test_plain_requests_are_counted_by_usage_or_our_tokenizer(smollm: Path, tmp_path: Path) -> None:
    """The first server tells no usage, the second does; both end their answers two tokens early."""
    (tmp_path / "artifacts").symlink_to(smollm.parent)
    out = tmp_path / "serving.parquet"
    common = ["--concurrencies", "1", "--rounds", "2", "--length-scale", "0.05", "--out", str(out)]
    with scripted("whole") as silent, scripted("usage unasked") as telling:
        silent.refuses = ("ignore_eos", "min_tokens", "stream_options", "list")
        names = [f"silent={silent.url}", f"telling={telling.url}"]
        refused = run(names[0], *common)
        plain = run(*names, "--plain", *common, cwd=tmp_path)
        text = silent.requests[-1]["prompt"]
    assert refused.returncode == 2
    assert "measure it with --plain" in refused.stderr
    assert plain.returncode == 0, plain.stderr
    assert [(row.name, row.prompt_kind, row.counted_output_tokens, row.counted_by) for row in read_serving(out)] == [
        ("silent", "text", 4.0, "our tokenizer"),
        ("telling", "text", 4.0, "usage"),
    ]
    assert len(text.split()) == 6
    assert "6 tokens as text in, at most 6 out" in plain.stdout
    assert "medians of 4 to 4 tokens came out, counted by our tokenizer" in plain.stdout
    assert "medians of 4 to 4 tokens came out, counted by usage" in plain.stdout


def test_plain_requests_need_a_tokenizer(tmp_path: Path) -> None:
    ended = run("parent=http://127.0.0.1:9/v1", "--plain", cwd=tmp_path)
    assert ended.returncode == 2
    assert "run `dvc repro prepare_parent`" in ended.stderr


def test_a_proxy_is_asked_only_with_the_option(tmp_path: Path) -> None:
    """Of a host that only the proxy knows; what the proxy's address holds as a password is kept nowhere."""
    out = tmp_path / "serving.parquet"
    remote = "child=http://model.invalid/v1"
    common = ["--concurrencies", "1", "--length-scale", "0.05", "--out", str(out)]
    with scripted("whole") as proxy:
        address = proxy.url.removesuffix("/v1").replace("//", "//me:pass123@")
        variables = {"http_proxy": address}
        direct = run(remote, *common, proxies=variables)
        asked_before = len(proxy.hosts)
        through = run(remote, "--proxy", *common, proxies=variables)
        local = run(f"child={proxy.url}", "--proxy", *common, proxies=variables)
    assert (direct.returncode, asked_before) == (2, 0)
    assert "or give --proxy: without it the environment's proxy is not asked" in direct.stderr
    assert through.returncode == 0, through.stderr
    assert set(proxy.hosts) == {"model.invalid"}
    assert proxy.proxy_keys[-1] == f"Basic {base64.b64encode(b'me:pass123').decode()}"
    assert "measured THROUGH A PROXY" in through.stdout
    assert [row.route for row in read_serving(out)] == ["proxy"]
    assert "pass123" not in f"{through.stdout}{through.stderr}{pq.read_table(out).to_pylist()}"
    assert local.returncode == 2
    assert "--proxy: the environment names no proxy for http://127.0.0.1" in local.stderr


def test_a_proxy_that_fails_is_one_error_without_its_password(tmp_path: Path) -> None:
    """Nothing listens; a tunnel is refused, as by a proxy that wants another password."""
    with scripted("whole") as proxy:
        refusing = proxy.url.removesuffix("/v1").replace("//", "//me:pass123@")
        for address, scheme, expected in [
            ("me:pass123@127.0.0.1:9", "http", "no server answers at http://model.invalid/v1/models through the proxy"),
            (refusing, "https", "through the proxy (the proxy answered HTTP 404)"),
        ]:
            out = str(tmp_path / "serving.parquet")
            variables = {f"{scheme}_proxy": address}
            ended = run(f"child={scheme}://model.invalid/v1", "--proxy", "--out", out, proxies=variables)
            assert ended.returncode == 2
            assert expected in ended.stderr
            assert "pass123" not in ended.stderr


def test_a_socks_proxy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command leaves it aside unless httpx takes it, which it does where socksio is installed."""
    monkeypatch.setenv("http_proxy", "socks5://me:pass123@127.0.0.1:9")
    sweep = LoadSweep(("128/128",), 0.05, (1,), 1, 1, 20.0, 30_000, uses_proxy=True)
    with pytest.raises(InputError, match=r"is socks5://\.\.\., expected http://HOST:PORT; correct its variable$"):
        benchmark_servers([Server("child", "http://model.invalid/v1", None)], sweep, tmp_path / "serving.parquet")


def test_a_table_of_an_earlier_version_is_one_error(tmp_path: Path) -> None:
    out = tmp_path / "serving.parquet"
    with scripted("whole") as server:
        common = [f"parent={server.url}", "--concurrencies", "1", "--length-scale", "0.05", "--out", str(out)]
        assert run(*common).returncode == 0
        write_table(out, pq.read_table(out).drop_columns(["prompt_kind"]))
        ended = run(*common)
    assert ended.returncode == 2
    assert "has no column 'prompt_kind'" in ended.stderr
    assert "give another --out, or move this table away" in ended.stderr


def test_an_answer_in_one_event_is_printed_as_buffered(tmp_path: Path) -> None:
    out = tmp_path / "serving.parquet"
    with scripted("one event") as server:
        common = ["--concurrencies", "2", "--length-scale", "0.05", "--out", str(out)]
        ended = run(f"parent={server.url}", *common)
    assert ended.returncode == 0, ended.stderr
    (line,) = [line for line in ended.stdout.splitlines() if line.split()[:3] == ["2", "6", "0"]]
    assert line.split()[4] == "buffered"
    assert "2 at once, BUFFERED: 6 of 6 answers came at once" in ended.stdout
    (row,) = read_serving(out)
    assert (row.buffered, row.measured_user_tokens_per_s) == (6, None)
