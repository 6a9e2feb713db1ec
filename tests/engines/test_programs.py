"""Programs that models write do no harm: every attempt fails, and its effect is not there afterwards."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage.files import InputError
from tasks.engines import confine
from tasks.engines.programs import Limits, check_confinement, runs_to_its_end

LIMITS = Limits(seconds=1, memory_mib=256)


def attempt(action: str) -> str:
    """A program that runs to its end only if the action works."""
    return f"import os, socket, subprocess, threading\n{action}\n"


def test_a_program_that_is_right_runs_to_its_end_and_one_that_is_wrong_does_not() -> None:
    function = "import math, typing, re, collections, heapq, hashlib\ndef twice(x):\n    return 2 * x\n"
    assert runs_to_its_end(f"{function}assert twice(2) == 4\nprint('fine')", LIMITS)
    assert not runs_to_its_end(f"{function}assert twice(2) == 5", LIMITS)


@pytest.mark.parametrize("leaves", ["exit()", "import os; os._exit(0)", "raise SystemExit(0)"])
def test_a_program_that_leaves_before_its_tests_has_not_passed(leaves: str) -> None:
    assert not runs_to_its_end(f"{leaves}\nassert False", LIMITS)


@pytest.mark.parametrize(
    "action",
    [
        "os.fork()",
        "subprocess.run(['true'])",
        "threading.Thread(target=int).start()",
        "socket.socket()",
        "socket.socketpair()",
        pytest.param(f"os.kill({os.getpid()}, 0)", id="os.kill"),
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (60, 60))",
        "os.setuid(0); os.setgroups([0])",
        "bytearray(300 << 20)",
        "rows = []\nwhile True: rows.append(bytearray(10 << 20))",
    ],
)
def test_no_process_no_network_no_signal_no_memory(action: str) -> None:
    assert not runs_to_its_end(attempt(action), LIMITS)


def test_a_server_that_listens_is_not_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        assert not runs_to_its_end(attempt(f"socket.create_connection({server.getsockname()!r})"), LIMITS)
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_file_is_written_changed_or_removed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("as it was", encoding="utf-8")
    for action in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(kept)!r}, 'a')",
        f"os.open({str(kept)!r}, os.O_RDONLY | os.O_TRUNC)",
        f"os.truncate({str(kept)!r}, 0)",
        f"os.unlink({str(kept)!r})",
        f"os.chmod({str(kept)!r}, 0)",
        f"os.mkdir({str(tmp_path / 'folder')!r})",
        f"os.execv('/bin/sh', ['sh', '-c', 'echo x > {tmp_path}/new'])",
    ):
        assert not runs_to_its_end(attempt(action), LIMITS), action
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text(encoding="utf-8") == "as it was"


@pytest.mark.parametrize("waits", ["import time; time.sleep(60)", "while True: pass"])
def test_a_program_that_does_not_end_is_ended(waits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.engines.programs._START_S", 0.5)
    began = time.monotonic()
    assert not runs_to_its_end(waits, LIMITS)
    assert time.monotonic() - began < 50


def test_nothing_of_the_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert runs_to_its_end("import os; assert 'OPENAI_API_KEY' not in os.environ", LIMITS)


def test_where_programs_cannot_be_confined_none_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_confinement(LIMITS)
    careless = tmp_path / "confine.py"
    careless.write_text("import os, sys\nos.execv(sys.executable, [sys.executable, '-I', '-'])\n", encoding="utf-8")
    monkeypatch.setattr(confine, "__file__", str(careless))
    assert runs_to_its_end("pass", LIMITS), "the test's own assumption: this one runs programs"
    with pytest.raises(InputError, match="cannot keep them from network, processes and files"):
        check_confinement(LIMITS)


def test_the_filters_jumps_stay_within_it() -> None:
    """The kernel refuses a filter that is longer, or that jumps behind its end."""
    for machine in ("x86_64", "aarch64"):
        program = confine.filter_program(machine)
        assert len(program) < 4096
        for index, (_, holds, fails, _) in enumerate(program):
            assert index + 1 + max(holds, fails) <= len(program) - (index + 1 < len(program))


def test_confine_needs_the_standard_library_alone() -> None:
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='imported')"
    ended = subprocess.run([sys.executable, "-I", "-S", "-c", code, confine.__file__], check=False)
    assert ended.returncode == 0
