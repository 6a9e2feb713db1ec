"""This clone's one Prefect server on 127.0.0.1: found if it runs, started if not.

Run: `python -m flows.server start`, `python -m flows.server stop`. PUZZLE_PORT chooses the port (default: any free);
a PREFECT_API_URL in the environment names a server that already runs, and then none is started here.
"""

import argparse
import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from flows import HOME
from storage.files import InputError, read_json, write_json

_STATE = HOME / "server.json"
_LOG = HOME / "server.log"
_START_SECONDS = 120
_LAST_PORT = 65_535


def ensure() -> tuple[str, bool]:
    """The API address of a running server, and whether this call started it.

    Raises:
        InputError: PUZZLE_PORT is no port or in use by another program, or the server did not come up (with its last
            words) or no longer answers.
    """
    if inherited := os.environ.get("PREFECT_API_URL"):
        return inherited, False
    with _locked():
        if (url := _running()) is not None:
            return url, False
        return _start(), True


def stop() -> bool:
    """Stop this clone's server; whether there was one."""
    with _locked():
        if not _STATE.is_file():
            return False
        pid, port = _state()
        found = _is_ours(pid, port)
        if found:
            os.killpg(pid, signal.SIGTERM)
            deadline = time.monotonic() + 20
            while _is_ours(pid, port) and time.monotonic() < deadline:
                time.sleep(0.1)
            if _is_ours(pid, port):
                os.killpg(pid, signal.SIGKILL)
        _STATE.unlink()
        return found


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One process at a time looks for the server or starts it."""
    HOME.mkdir(exist_ok=True)
    with (HOME / "server.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _state() -> tuple[int, int]:
    """Process and port of the server that this clone started last."""
    state = read_json(_STATE, f"rm {_STATE}")
    return int(state["pid"]), int(state["port"])


def _running() -> str | None:
    """The address of this clone's server once it answers, None if there is none.

    A server that lives is waited for: on a busy machine it may be slow, and a second one would share its database.
    """
    if not _STATE.is_file():
        return None
    pid, port = _state()
    url = f"http://127.0.0.1:{port}/api"
    deadline = time.monotonic() + _START_SECONDS
    while _is_ours(pid, port):
        if _answers(url):
            return url
        if time.monotonic() > deadline:
            raise InputError(f"this clone's Prefect server (process {pid}) does not answer at {url}; run `make stop`")
        time.sleep(0.2)
    return None


def _is_ours(pid: int, port: int) -> bool:
    """Whether the process lives and is the Prefect server of this port, not another program that got its number."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        listed = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, check=False)
        command = listed.stdout
    return b"prefect" in command and str(port).encode() in command


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as reply:
            return bool(json.load(reply) is True)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def _start() -> str:
    port = _free_port(_wanted_port())
    url = f"http://127.0.0.1:{port}/api"
    environment = {**os.environ, "PREFECT_API_URL": url, "PREFECT_SERVER_UI_API_URL": url}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with _LOG.open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + _START_SECONDS
    while not _answers(url):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            last = " | ".join(_LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-3:])
            raise InputError(f"the Prefect server did not start on 127.0.0.1:{port}; its last words: {last} ({_LOG})")
        time.sleep(0.2)
    write_json(_STATE, {"pid": process.pid, "port": port})
    return url


def _wanted_port() -> int:
    """PUZZLE_PORT, 0 (any) if it is not set."""
    given = os.environ.get("PUZZLE_PORT", "0")
    if not given.isdecimal() or int(given) > _LAST_PORT:
        raise InputError(f"PUZZLE_PORT is {given!r}, expected a port: a number from 1 to {_LAST_PORT}, or 0 for any")
    return int(given)


def _free_port(wanted: int) -> int:
    """`wanted` if nobody listens there, any free port for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise InputError(
                f"port {wanted} on 127.0.0.1 is in use by another program; set PUZZLE_PORT to a free port, or unset it"
            ) from error
        return int(probe.getsockname()[1])


def main() -> None:
    """Start or stop the server."""
    parser = argparse.ArgumentParser(description="This clone's Prefect server on 127.0.0.1.")
    parser.add_argument("action", choices=("start", "stop"))
    action = parser.parse_args().action
    try:
        if action == "stop":
            said = "stopped the Prefect server" if stop() else "no Prefect server of this clone is running"
        else:
            url, started = ensure()
            said = f"{'started' if started else 'found'} the Prefect server: {url.removesuffix('/api')}"
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    sys.stdout.write(f"{said}\n")


if __name__ == "__main__":
    main()
