"""One Prefect server per clone: found, started once, stopped; ports that are taken; processes that are not ours."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    clone = _at(tmp_path_factory.mktemp("server"))
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


def test_a_server_named_in_the_environment_is_used(tmp_path: Path) -> None:
    elsewhere = _at(tmp_path, PREFECT_API_URL="http://127.0.0.1:1/api")
    assert elsewhere.must("flows.server", "start").out.split() == [
        *("found", "the", "Prefect", "server:", "http://127.0.0.1:1")
    ]
    assert not (tmp_path / ".prefect").exists()


def test_a_port_in_use_is_one_error(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        _one_error(_at(tmp_path, PUZZLE_PORT=port).run("flows.server", "start"), port, "in use", "PUZZLE_PORT")
    assert not (tmp_path / ".prefect/server.json").exists()


@pytest.mark.parametrize("port", ["many", "-1", "65536", ""])
def test_what_is_no_port_is_one_error(port: str, tmp_path: Path) -> None:
    _one_error(_at(tmp_path, PUZZLE_PORT=port).run("flows.server", "start"), repr(port), "1 to 65535")


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


@pytest.mark.parametrize("action", ["start", "stop"])
def test_a_damaged_state_file_is_one_error(action: str, tmp_path: Path) -> None:
    state = tmp_path / ".prefect/server.json"
    state.parent.mkdir()
    state.write_text("{")
    _one_error(_at(tmp_path).run("flows.server", action), f"rm {state}", code=4)


def test_stop_leaves_no_server(running: Running) -> None:
    """Last: it takes the server of this file."""
    pid = running.pid
    assert running.clone.must("flows.server", "stop").out == "stopped the Prefect server\n"
    assert not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes()
    assert running.clone.must("flows.server", "stop").out == "no Prefect server of this clone is running\n"
