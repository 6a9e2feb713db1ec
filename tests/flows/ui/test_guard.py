"""A guarded command ends with whoever started it, and all that it started too."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

GUARD = [sys.executable, "-m", "flows.ui.guard", sys.executable, "-c"]
# A stage below DVC: it says when it is there, and deaf ones ignore what can be ignored.
STAGE = "import signal, sys, time; {deaf}; open(sys.argv[1], 'w').close(); time.sleep(600)"
ABOVE = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', *sys.argv[1:]]))"
DEAF = "[signal.signal(ending, signal.SIG_IGN) for ending in (signal.SIGINT, signal.SIGTERM)]"


def test_the_exit_code_is_the_commands() -> None:
    for code in (0, 3):
        with subprocess.Popen([*GUARD, f"raise SystemExit({code})"], stdin=subprocess.PIPE) as process:
            assert process.wait(60) == code


@pytest.mark.parametrize("deaf", ["", DEAF], ids=["polite", "deaf"])
def test_the_whole_group_ends_when_the_pipe_closes(deaf: str, tmp_path: Path) -> None:
    """That is what a killed starter's pipe does by itself."""
    started = tmp_path / "started"
    command = [*GUARD, ABOVE, STAGE.format(deaf=deaf or "None"), str(started)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    end = time.monotonic() + 60
    while not started.exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert _alive(process.pid) == 3
    process.stdin.close()
    assert process.wait(60) == -signal.SIGKILL  # the guard goes last
    while _alive(process.pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert _alive(process.pid) == 0


def _alive(group: int) -> int:
    """Return processes of a group that run."""
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True, check=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    return sum(row[0] == str(group) and not row[1].startswith("Z") for row in rows)
