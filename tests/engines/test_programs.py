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
    """Return a program that runs to its end only if the action works."""
    return f"import fcntl, os, socket, subprocess, threading\n{action}\n"


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
        pytest.param(f"fcntl.fcntl(0, fcntl.F_SETOWN, {os.getpid()})", id="F_SETOWN"),
        "fcntl.fcntl(0, 10, 9)",
        "fcntl.fcntl(0, fcntl.F_SETFL, os.O_ASYNC)",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (60, 60))",
        "os.setuid(os.getuid())",
        pytest.param("os.setgroups([0])", marks=pytest.mark.skipif(os.getuid() != 0, reason="root alone may do this")),
        "bytearray(300 << 20)",
        "rows = [bytearray(10 << 20) for _ in range(60)]",
    ],
)
def test_no_process_no_network_no_signal_no_memory(action: str) -> None:
    program = attempt(action)
    unconfined = subprocess.run([sys.executable, "-I", "-"], input=program, text=True, check=False)
    assert unconfined.returncode == 0, "the test's own assumption: nothing but the confinement refuses it"
    assert not runs_to_its_end(program, LIMITS)


def test_a_server_that_listens_is_not_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        assert not runs_to_its_end(attempt(f"socket.create_connection({server.getsockname()!r})"), LIMITS)
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_file_is_written_changed_or_removed(tmp_path: Path) -> None:
    file = tmp_path / "kept"
    file.write_text("as it was", encoding="utf-8")
    for action in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(file)!r}, 'a')",
        f"os.open({str(file)!r}, os.O_RDONLY | os.O_TRUNC)",
        f"os.truncate({str(file)!r}, 0)",
        f"os.unlink({str(file)!r})",
        f"os.chmod({str(file)!r}, 0)",
        f"os.mkdir({str(tmp_path / 'folder')!r})",
        f"os.execv('/bin/sh', ['sh', '-c', 'echo x > {tmp_path}/new'])",
    ):
        assert not runs_to_its_end(attempt(action), LIMITS), action
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert file.read_text(encoding="utf-8") == "as it was"


@pytest.mark.parametrize("waits", ["import time; time.sleep(60)", "while True: pass"])
def test_a_program_that_does_not_end_is_ended(waits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.engines.programs._START_S", 0.5)
    began = time.monotonic()
    assert not runs_to_its_end(waits, LIMITS)
    assert time.monotonic() - began < 50


def test_no_process_is_killed_through_a_pipe() -> None:
    """The kernel sends the owner of an end of a pipe a signal of choice when the other end is written to."""
    victim = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    kill = f"""
import fcntl, os
open_ones = [int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{{name}}")]
writer = max(open_ones)
reader = os.open(f"/proc/self/fd/{{writer}}", os.O_RDONLY)
for command, argument in ((fcntl.F_SETOWN, {victim.pid}), (10, 9), (fcntl.F_SETFL, os.O_ASYNC)):
    try:
        fcntl.fcntl(reader, command, argument)
    except OSError:
        pass
os.write(writer, b"x")
os.read(reader, 1)
"""
    try:
        assert runs_to_its_end(kill, LIMITS), "the test's own assumption: its last lines write to the pipe"
        with pytest.raises(subprocess.TimeoutExpired):
            victim.wait(0.2)
    finally:
        victim.communicate(b"\n")


def test_descriptors_are_copied_and_their_flags_read() -> None:
    reads = ("F_DUPFD, 0", "F_DUPFD_CLOEXEC, 0", "F_GETFD", "F_SETFD, 1", "F_GETFL")
    assert runs_to_its_end(attempt("\n".join(f"fcntl.fcntl(1, fcntl.{command})" for command in reads)), LIMITS)


_UNPRIVILEGED = """
import ctypes, os, sys
for capability in range(64):
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""


def test_an_ordinary_users_processes_are_closed_to_a_program() -> None:
    """Root without capabilities may read what an ordinary user may: the processes of its own."""
    code = """
import os
from tasks.engines.programs import Limits, check_confinement, runs_to_its_end
limits = Limits(seconds=1, memory_mib=256)
assert "OPENAI_API_KEY" in open("/proc/self/environ").read()
check_confinement(limits)
for name in ("environ", "mem", "maps"):
    assert not runs_to_its_end(f"open('/proc/{os.getpid()}/{name}', 'rb')", limits), name
assert runs_to_its_end(f"open('/proc/{os.getpid()}/status', 'rb')", limits), "the test's own assumption: it finds them"
assert open("/proc/self/maps").read(), "what was closed is open again"
"""
    ended = subprocess.run(
        [sys.executable, "-c", _UNPRIVILEGED, code],
        env={**os.environ, "OPENAI_API_KEY": "secret", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


def test_nothing_of_the_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert runs_to_its_end("import os; assert 'OPENAI_API_KEY' not in os.environ", LIMITS)


def test_where_programs_cannot_be_confined_none_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_confinement(LIMITS)
    careless = tmp_path / "confine.py"
    careless.write_text("import os, sys\nos.execv(sys.executable, [sys.executable, '-I', '-'])\n", encoding="utf-8")
    monkeypatch.setattr(confine, "__file__", str(careless))
    assert runs_to_its_end("pass", LIMITS), "the test's own assumption: this one runs programs"
    every_attempt = (
        "a socket, a process, a thread, .*a signal of a pipe, .*writing a file, renaming a file, more memory"
    )
    with pytest.raises(InputError, match=f"does not keep them from {every_attempt}"):
        check_confinement(LIMITS)
    careless.write_text("raise OSError", encoding="utf-8")
    with pytest.raises(InputError, match="none can be confined"):
        check_confinement(LIMITS)
    careless.write_text("import time; time.sleep(60)", encoding="utf-8")
    monkeypatch.setattr("tasks.engines.programs._START_S", 0.1)
    with pytest.raises(InputError, match="had not ended after"):
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
