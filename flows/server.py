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


def ensure() -> tuple[str, bool]:
    """The API address of a running server, and whether this call started it.

    Raises:
        InputError: PUZZLE_PORT is in use by another program, or the server did not come up (with its last words).
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
        pid = int(read_json(_STATE, "make stop")["pid"])
        found = _is_ours(pid)
        if found:
            os.killpg(pid, signal.SIGTERM)
            deadline = time.monotonic() + 20
            while _is_ours(pid) and time.monotonic() < deadline:
                time.sleep(0.1)
            if _is_ours(pid):
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


def _running() -> str | None:
    """The address of this clone's server if it answers."""
    if not _STATE.is_file():
        return None
    state = read_json(_STATE, "make stop")
    url = f"http://127.0.0.1:{state['port']}/api"
    return url if _is_ours(int(state["pid"])) and _answers(url) else None


def _is_ours(pid: int) -> bool:
    """Whether the process lives and is a Prefect server, not another program that got its number."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        listed = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, check=False)
        command = listed.stdout
    return b"prefect" in command


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as reply:
            return bool(json.load(reply) is True)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def _start() -> str:
    port = _free_port(int(os.environ.get("PUZZLE_PORT", "0")))
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
    if parser.parse_args().action == "stop":
        sys.stdout.write("stopped the Prefect server\n" if stop() else "no Prefect server of this clone is running\n")
        return
    try:
        url, started = ensure()
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    sys.stdout.write(f"{'started' if started else 'found'} the Prefect server: {url.removesuffix('/api')}\n")


if __name__ == "__main__":
    main()
