"""One Prefect server per clone: found, started once, stopped; ports that are taken; processes that are not ours."""

import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from flows.server import _checked
from storage.files import InputError
from tests.clone import ROOT, Clone, Ended


def _at(folder: Path, **environment: str) -> Clone:
    """This checkout's code with `folder` as its clone."""
    return Clone(folder, {"PYTHONPATH": str(ROOT), **environment})


@dataclass(frozen=True)
class Running:
    """A folder whose server runs, and how the two commands ended that started it at the same time."""

    clone: Clone
    starts: tuple[Ended, Ended]

    @property
    def pid(self) -> int:
        """The server's process."""
        return int(json.loads((self.clone.folder / ".prefect/server.json").read_text())["pid"])

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(json.loads((self.clone.folder / ".prefect/server.json").read_text())["port"])

    @property
    def api(self) -> str:
        """Its API's address."""
        return f"http://127.0.0.1:{self.port}/api"


OTHERS = {
    "PREFECT_API_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:///others.db",
    "prefect_server_api_auth_string": "somebody:secret",
    "PREFECT_SERVER_API_BASE_PATH": "/elsewhere",
    "PREFECT_API_KEY": "secret",
    "PREFECT_HOME": "others-home",
    "PREFECT_PROFILE": "others",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "HTTP_PROXY": "http://127.0.0.1:1",
    "HTTPS_PROXY": "http://127.0.0.1:1",
    "ALL_PROXY": "http://127.0.0.1:1",
    "NO_PROXY": ".corp.example",
    "WEB_CONCURRENCY": "4",
    "SSL_CERT_FILE": "/nonexistent",
}
"""What users have in their environments for other servers of Prefect; a proxy and certificates that are not there."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    clone = _at(tmp_path_factory.mktemp("server"), **OTHERS)
    (clone.folder / ".env").write_text("PREFECT_API_URL=http://127.0.0.1:1/api\nPREFECT_API_ENABLE_HTTP2=perhaps\n")
    (clone.folder / "prefect.toml").write_text("server = [")
    (clone.folder / "pyproject.toml").write_text('[tool.prefect.server.database]\nconnection_url = "sqlite:///o.db"\n')
    try:
        with ThreadPoolExecutor() as pool:
            first, second = (pool.submit(clone.must, "flows.server", "start") for _ in range(2))
        yield Running(clone, (first.result(), second.result()))
    finally:
        clone.must("flows.server", "stop")


def _address(ended: Ended) -> str:
    return ended.out.split()[-1]


def _one_error(ended: Ended, *words: str, code: int = 2) -> None:
    assert ended.code == code
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ")
    assert [word for word in words if word not in line] == []


def test_two_stages_that_start_at_once_share_one_server(running: Running) -> None:
    assert sorted(ended.out.split()[0] for ended in running.starts) == ["found", "started"]
    (address,) = {_address(ended) for ended in running.starts}
    with urllib.request.urlopen(f"{address}/api/health") as reply:
        assert json.load(reply) is True


def test_a_server_that_is_slow_to_answer_is_not_started_again(running: Running) -> None:
    """On a machine that trains, its answer may take longer than one question waits."""
    before = running.pid
    os.killpg(before, signal.SIGSTOP)
    try:
        asking = running.clone.start("flows.server", "start")
        time.sleep(3)  # longer than one question
        assert asking.poll() is None
    finally:
        os.killpg(before, signal.SIGCONT)
    out, _ = asking.communicate(timeout=60)
    assert out.split()[0] == "found"
    assert running.pid == before


def test_it_is_this_clones_own_whatever_the_user_has_set_for_prefect(running: Running) -> None:
    """The server came up with OTHERS around it, and with a prefect.toml that is none: the database is this folder's."""
    with temporary_settings({PREFECT_API_URL: running.api}), get_client(sync_client=True) as client:
        client.create_flow_from_name("a flow")
    with sqlite3.connect(running.clone.folder / ".prefect/prefect.db") as database:
        assert database.execute("select name from flow").fetchall() == [("a flow",)]
    assert list(running.clone.folder.rglob("*o*.db")) == []
    assert not (running.clone.folder / "others-home").exists()


def test_a_server_named_in_the_environment_is_used(running: Running, tmp_path: Path) -> None:
    for address in (running.api, f"{running.api}/"):
        elsewhere = _at(tmp_path, PREFECT_API_URL=address)
        assert _address(elsewhere.must("flows.server", "start")) == running.api.removesuffix("/api")
    assert not (tmp_path / ".prefect").exists()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/api", "HERE", "127.0.0.1:4200", "file:///etc/passwd", "http://[", "http://h:99999/api"]
)
def test_an_address_where_no_server_answers_is_one_error(url: str, running: Running, tmp_path: Path) -> None:
    """HERE: the server's address without /api, where its UI answers."""
    given = url.replace("HERE", running.api.removesuffix("/api"))
    ended = _at(tmp_path, PREFECT_API_URL=given).run("flows.server", "start")
    _one_error(ended, "PREFECT_API_URL", given, "http://HOST:PORT/api", "unset it")


@pytest.mark.parametrize("url", ["http://me:s3cret@127.0.0.1:1/api", "http://127.0.0.1:1/api?key=s3cret", "a:s3cret@b"])
def test_credentials_in_the_address_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(InputError, match=r"give credentials by PREFECT_API_AUTH_STRING or PREFECT_API_KEY") as caught:
        _checked(url)
    assert "s3cret" not in str(caught.value)


@given(
    st.text()
    | st.text(max_size=5).map(lambda text: f"http://127.0.0.1:1{text}")
    | st.text(max_size=5).map(lambda text: f"{text}http://127.0.0.1:1/api")
    | st.text(alphabet="-.:@[]#?%\\/ \t0x\x00é", max_size=8).map(lambda text: f"http://{text}/api")
)
def test_any_text_as_the_address_is_one_error(url: str) -> None:
    """Also `xn--a`, which is no name, though it looks like one."""
    for address in (url, "http://xn--a/api"):
        with pytest.raises(InputError, match="PREFECT_API_URL"):
            _checked(address)


def test_blanks_around_the_address_are_none_of_it(running: Running) -> None:
    """Prefect's client refuses them, once the stage has begun."""
    assert _checked(f" {running.api}/\n") == running.api


def _status(port: int, method: str, path: str, headers: dict[str, str], body: bytes | None) -> int:
    """The answer to a request as it is written: Host and all."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    for name, value in {"Host": f"127.0.0.1:{port}", **headers}.items():
        connection.putheader(name, value.replace("PORT", str(port)))
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    return connection.getresponse().status


JSON = {"Content-Type": "application/json"}
LINK = {
    "Accept": "text/html",
    "Sec-Fetch-Site": "cross-site",
    "Sec-Fetch-Mode": "navigate",
    "Sec-Fetch-Dest": "document",
}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "LOCALHOST:PORT"}, 200),
        ({"Origin": "http://127.0.0.1:PORT", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "http://localhost:PORT", "Sec-Fetch-Site": "cross-site"}, 200),  # the UI under its other name
        ({"Host": "rebound.example"}, 421),
        ({"Host": "rebound.example:PORT"}, 421),
        ({"Host": "127.0.0.1:1"}, 421),
        ({"Host": "127.0.0.1:PORT.rebound.example"}, 421),
        ({"Origin": "http://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "https://127.0.0.1:PORT"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        (LINK, 403),
    ],
    ids=str,
)
def test_a_read_is_for_programs_and_the_servers_own_pages(
    headers: dict[str, str], status: int, running: Running
) -> None:
    assert _status(running.port, "GET", "/api/health", headers, None) == status
    assert _status(running.port, "OPTIONS", "/api/flows/", headers, None) == (405 if status == 200 else status)


def test_a_link_from_elsewhere_opens_the_ui_as_a_page_but_in_no_frame(running: Running) -> None:
    for ui in ("/flows", "/v2/flows"):
        assert _status(running.port, "GET", ui, LINK, None) == 200
        assert _status(running.port, "GET", ui, {**LINK, "Sec-Fetch-Dest": "iframe"}, None) == 403
        page = urllib.request.Request(f"{running.api.removesuffix('/api')}{ui}", headers={"Accept": "text/html"})
        with urllib.request.urlopen(page) as reply:
            assert reply.headers["X-Frame-Options"] == "DENY"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (JSON, 201),
        ({"Content-Type": "application/json; charset=utf-8", "Origin": "http://127.0.0.1:PORT"}, 201),
        ({**JSON, "Origin": "http://elsewhere.example"}, 403),
        ({**JSON, "Host": "rebound.example:PORT"}, 421),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "text/plain; application/json"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({}, 415),
    ],
    ids=str,
)
def test_a_write_is_json_of_no_other_page_with_a_token(headers: dict[str, str], status: int, running: Running) -> None:
    with urllib.request.urlopen(f"{running.api}/csrf-token?client=test") as reply:
        token = {"Prefect-Csrf-Client": "test", "Prefect-Csrf-Token": json.load(reply)["token"]}
    body = json.dumps({"name": secrets.token_hex(4)}).encode()
    assert _status(running.port, "POST", "/api/flows/", {**headers, **token}, body) == status
    assert _status(running.port, "POST", "/api/flows/", headers, body) == (403 if status == 201 else status)


@pytest.mark.parametrize("path", ["events/in", "events/out", "logs/out", "task_runs/subscriptions/scheduled"])
def test_a_websocket_is_for_programs_and_the_servers_own_pages(path: str, running: Running) -> None:
    def opens(**headers: str) -> bool:
        url = f"ws://127.0.0.1:{running.port}/api/{path}"
        try:
            with connect(url, proxy=None, subprotocols=[Subprotocol("prefect")], additional_headers=headers):
                return True
        except InvalidStatus as refused:
            assert refused.response.status_code == 403
            return False

    assert opens()
    assert opens(Origin=f"http://127.0.0.1:{running.port}")
    assert not opens(Origin="http://elsewhere.example")
    assert not opens(Origin="http://127.0.0.1:1")


def test_a_port_in_use_is_one_error(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        _one_error(_at(tmp_path, PUZZLE_PORT=port).run("flows.server", "start"), port, "in use", "PUZZLE_PORT")
    assert not (tmp_path / ".prefect/server.json").exists()


@pytest.mark.parametrize("port", ["many", "-1", "65536", "", "1" * 5000])
def test_what_is_no_port_is_one_error(port: str, tmp_path: Path) -> None:
    _one_error(_at(tmp_path, PUZZLE_PORT=port).run("flows.server", "start"), repr(port)[:40], "1 to 65535")


def test_another_program_with_the_servers_number_is_left_alone(tmp_path: Path) -> None:
    """After a restart of the machine the number in server.json may be anybody's; other clones run Prefect as well."""
    wait = "import sys; print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", wait, "prefect", "--port", "4300"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        state = tmp_path / ".prefect/server.json"
        state.parent.mkdir()
        state.write_text(json.dumps({"pid": other.pid, "port": 4200}))
        stopped = _at(tmp_path).must("flows.server", "stop")
        assert stopped.out == "no Prefect server of this clone is running\n"
        assert other.poll() is None
        assert not state.exists()
        other.communicate(b"")


def test_a_damaged_record_is_mended_by_the_server_that_lives(running: Running) -> None:
    pid, state = running.pid, running.clone.folder / ".prefect/server.json"
    whole = state.read_text()
    for damaged in (None, "", "{", "[1]", whole.replace(str(pid), "1")):  # the last: `make stop` would end another's
        state.unlink() if damaged is None else state.write_text(damaged)
        assert running.clone.must("flows.server", "start").out.split()[0] == "found"
        assert (state.read_text(), running.pid) == (whole, pid)


def test_a_damaged_record_of_no_server_is_none(tmp_path: Path) -> None:
    state = tmp_path / ".prefect/server.json"
    state.parent.mkdir()
    state.write_text("{")
    assert _at(tmp_path).must("flows.server", "stop").out == "no Prefect server of this clone is running\n"
    assert not state.exists()


def _servers(folder: Path) -> set[int]:
    """Processes of servers that a command in this folder started."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,args="], capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=1) for line in listed.splitlines() if "flows.prefect_app" in line]
    return {int(pid) for pid, _ in lines if os.path.realpath(f"/proc/{pid}/cwd") == str(folder.resolve())}


def test_a_server_whose_starter_was_killed_is_known_and_ends_with_its_folder(tmp_path: Path) -> None:
    clone = _at(tmp_path)
    clone.kill_when((tmp_path / ".prefect/server.log").exists, "flows.server", "start")
    clone.must("flows.server", "start")
    (server,) = _servers(tmp_path)
    assert json.loads((tmp_path / ".prefect/server.json").read_text())["pid"] == server
    shutil.rmtree(tmp_path / ".prefect", ignore_errors=True)
    end = time.monotonic() + 120
    while _servers(tmp_path):
        assert time.monotonic() < end
        shutil.rmtree(tmp_path / ".prefect", ignore_errors=True)
        time.sleep(0.2)


def test_stop_leaves_no_server(running: Running) -> None:
    """Last: it takes the server of this file."""
    pid = running.pid
    assert running.clone.must("flows.server", "stop").out == "stopped the Prefect server\n"
    assert not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes()
    assert running.clone.must("flows.server", "stop").out == "no Prefect server of this clone is running\n"
