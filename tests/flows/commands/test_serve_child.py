"""The command as it runs: two servers of the real llama.cpp that answer over HTTP, their end, and what stops them."""

import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from flows import cli
from flows.commands import serve_child
from tasks.engines.llamacpp import LlamaCpp
from tests.flows.commands.test_chat import CONTEXT, ROOT, completed, write_run

FILES = {"small": "children/small/exports/gguf-f32/small-F32.gguf", "parent": "parent_exports/gguf-f16/parent-F16.gguf"}
PORT = "{port}"
JSON = {"Content-Type": "application/json"}
SMALL = ("--target", "small", "--format", "gguf-f32")


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[tuple["subprocess.Popen[str]", list[str]]]:
    """Yield the command in the folder of a run, once it serves: the process, and what it printed."""
    with subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "serve-child", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            lines: list[str] = []
            while not lines or not lines[-1].endswith("Ctrl-C ends\n"):
                lines.append(process.stdout.readline())
                assert lines[-1], process.stderr.read()
            yield process, [line.rstrip("\n") for line in lines]
        finally:
            process.kill()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def printed(run: Path) -> Iterator[list[str]]:
    """Yield what the command printed, child and parent being served; Ctrl-C ends it with 0."""
    with serving(run, *SMALL, "--port", "0", "--parallel", "3", "--context", "512") as (process, lines):
        yield lines
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert process.stderr.read() == "small as gguf-f32 beside parent as gguf-f16: not the same precision\n"


def _urls(printed: list[str]) -> dict[str, str]:
    """Return model -> address, from the first lines."""
    rows = (line.split() for line in printed[: printed.index("")])
    return {name: url for name, url in rows if url.endswith("/v1")}


def _reply(url: str, body: dict[str, Any] | None = None, **headers: str) -> http.client.HTTPResponse:
    """Send a request and return the answer to GET, or to POST of a body."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    text = None if body is None else json.dumps(body)
    connection.request("POST" if body else "GET", urlsplit(url).path, text, headers)
    return connection.getresponse()


def test_the_lines_to_paste_ask_child_and_parent(printed: list[str], run: Path) -> None:
    """Each has a curl line, whose answer is the greedy one of that model's file."""
    urls = _urls(printed)
    assert list(urls) == ["small", "parent"]
    for name, line in zip(urls, (line for line in printed if line.startswith("curl ")), strict=True):
        program, url, flag, header, data, body = shlex.split(line)
        assert (program, url, flag, data) == ("curl", f"{urls[name]}/chat/completions", "-H", "-d")
        key, _, value = header.partition(": ")
        answer = json.load(_reply(url, json.loads(body), **{key: value}))
        engine = LlamaCpp(run / "artifacts" / FILES[name], 1, 1, 512)
        expected = completed(engine, [("user", "What is gravity?")], 128)
        assert answer["choices"][0]["message"]["content"] == expected
        assert answer["model"] == name
    load = f"puzzle benchmark-server child={urls['small']} parent={urls['parent']} --concurrencies 1,2"
    assert load in printed
    assert printed[-1].startswith("3 requests of up to 512 tokens each at once")


def test_each_server_names_its_model(printed: list[str]) -> None:
    for name, url in _urls(printed).items():
        (model,) = json.load(_reply(f"{url}/models"))["data"]
        assert (model["id"], model["meta"]["n_ctx"]) == (name, 512)


def test_an_answer_streams(printed: list[str]) -> None:
    body = {"messages": [{"role": "user", "content": "one"}], "max_tokens": 20, "temperature": 0}
    for url in _urls(printed).values():
        whole = json.load(_reply(f"{url}/chat/completions", body, **JSON))["choices"][0]["message"]["content"]
        data = [
            line[6:] for line in _reply(f"{url}/chat/completions", {**body, "stream": True}, **JSON) if line.strip()
        ]
        texts = [json.loads(event)["choices"][0]["delta"].get("content") for event in data[:-1]]
        assert data[-1] == b"[DONE]\n"
        assert len([text for text in texts if text]) == 20
        assert "".join(text or "" for text in texts) == whole


def test_they_listen_on_this_machine_only(printed: list[str]) -> None:
    """127.0.0.2 is this machine as well, and would answer if they listened everywhere."""
    for url in _urls(printed).values():
        address = urlsplit(url)
        assert address.hostname == "127.0.0.1"
        with socket.socket() as probe, pytest.raises(OSError):
            probe.settimeout(5)
            probe.connect(("127.0.0.2", address.port))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (JSON, 200),
        ({**JSON, "Host": f"localhost:{PORT}"}, 200),
        ({**JSON, "Origin": "http://localhost:3000"}, 200),
        ({**JSON, "Host": "rebound.example"}, 421),
        ({**JSON, "Host": f"rebound.example:{PORT}"}, 421),
        ({**JSON, "Host": f"127.0.0.1:{PORT}.rebound.example"}, 421),
        ({**JSON, "Host": "127.0.0.1:1"}, 421),
        ({**JSON, "Origin": "http://rebound.example"}, 403),
        ({**JSON, "Origin": "http://localhost.rebound.example:3000"}, 403),
        ({**JSON, "Origin": "null"}, 403),
        ({**JSON, "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({}, 415),
    ],
    ids=str,
)
def test_pages_of_the_web_may_not_ask(headers: dict[str, str], status: int, printed: list[str]) -> None:
    """Nor pages whose name resolves to this machine; pages of its own may, and read the answer."""
    for url in _urls(printed).values():
        port = str(urlsplit(url).port)
        sent = {name: text.replace(PORT, port) for name, text in headers.items()}
        reply = _reply(f"{url}/completions", {"prompt": "one", "max_tokens": 1}, **sent)
        assert reply.status == status
        origin = headers.get("Origin") if status == 200 else None
        assert reply.getheader("Access-Control-Allow-Origin") == origin


def test_llamacpp_itself_wants_a_key(run: Path) -> None:
    """Its own port is any that is free, and checks no Host."""
    engine = LlamaCpp(run / "artifacts" / FILES["parent"], 1, 1, 256, quiet=True)
    question = {"prompt": "one", "max_tokens": 1}
    assert _reply(f"{engine.url}/completions", question, **JSON).status == 401
    assert _reply(f"{engine.url}/completions", question, **JSON, Authorization=f"Bearer {engine.key}").status == 200


def test_sigterm_ends_it_with_0_while_an_answer_streams(run: Path) -> None:
    """llama.cpp would go on until the stream has ended: half a minute, measured."""
    long = {"messages": [{"role": "user", "content": "one"}], "stream": True, "max_tokens": CONTEXT, "ignore_eos": True}
    arguments = ("--port", "0", "--no-parent", "--parallel", "1", "--context", str(CONTEXT))
    with serving(run, *SMALL, *arguments) as (process, lines):
        urls = _urls(lines)
        assert list(urls) == ["small"]
        assert "parent" not in "".join(lines)
        stream = _reply(f"{urls['small']}/chat/completions", long, **JSON)
        assert stream.readline().startswith(b"data: ")
        process.terminate()
        assert process.wait(5) == 0


# --- what stops it ---------------------------------------------------------------------------------------------------


def refused(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Return the one line of a command that ends with an exit code, in this process."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve-child", *arguments])
    signal.signal(signal.SIGINT, before)
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (code, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_a_port_that_is_taken_is_one_error_before_anything_is_loaded(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run)
    monkeypatch.setattr(serve_child, "loaded", None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = int(other.getsockname()[1])
        error = refused((*SMALL, "--port", str(port)), capsys)
        assert f"port {port} on 127.0.0.1 cannot be used (Address already in use); choose another with --port" in error
        error = refused((*SMALL, "--port", str(port - 1)), capsys)
        assert f"port {port} on 127.0.0.1" in error
        assert "it is the parent's; choose another --port, or --no-parent" in error
    error = refused((*SMALL, "--port", "65535"), capsys)
    assert "--port 65535 leaves none for the parent" in error


def test_what_is_not_there_is_one_error(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run)
    free = ("--port", "0")
    assert "unknown target 'smal', did you mean small?" in refused(("--target", "smal", *free), capsys)
    assert "has: gguf-f32" in refused(("--target", "small", *free), capsys)
    long = (*SMALL, *free, "--context", str(2 * CONTEXT))
    assert f"small was made for {CONTEXT} tokens of context" in refused(long, capsys)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "xllamacpp", None)
        assert "llama.cpp is not installed" in refused((*SMALL, *free), capsys)
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifacts" / FILES["parent"]).unlink()
    assert refused((*SMALL, *free), capsys).endswith("run `dvc repro export_parent`\n")
    (tmp_path / "artifacts" / FILES["small"]).unlink()
    assert refused((*SMALL, *free), capsys).endswith("run `dvc repro export_child@small`\n")


def test_a_damaged_file_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its checksum is compared before llama.cpp sees it."""
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifacts" / FILES["small"]).write_bytes(b"GGUF and no more")
    message = refused((*SMALL, "--port", "0"), capfd, code=4)
    assert "small-F32.gguf is damaged" in message and "dvc repro export_child@small" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--port", "99999"), "expected a port: a number from 1 to 65535"),
        (("--parallel", "0"), "expected a number of at least 1"),
        (("--context", "many"), "expected a number of at least 1"),
    ],
)
def test_arguments_say_what_they_expect(
    arguments: tuple[str, str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve-child", *SMALL, *arguments])
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err
