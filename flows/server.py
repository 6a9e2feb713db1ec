"""This clone's one Prefect server on 127.0.0.1: found if it runs, started if not.

Every stage and `make serve` call `ensure`; `make stop` stops it. PUZZLE_PORT chooses the port (default: any free port).
A PREFECT_API_URL in the environment names a server that already runs; then none is started.
"""

import argparse
import contextlib
import fcntl
import http.client
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import TextIO

import httpx

from flows import HOME, arguments, without_prefect
from flows.errors import run_cleanly
from flows.gate import listening_on
from flows.prefect_app import LIVES, STATE, ServerState
from storage.files import DamagedFileError, InputError
from storage.json_records import read_record

_LOG = HOME / "server.log"
_START_SECONDS = 120
_END_SECONDS = 20
_ANSWER_SECONDS = 60
"""How long a server of PREFECT_API_URL may take for an answer: its machine may be training."""
_HEALTHY = b"true"


def ensure() -> tuple[str, bool]:
    """Return the API address of a running server, and whether this call started it.

    Raises:
        InputError: PUZZLE_PORT is no port or in use by another program, the server did not come up (with its last
            words) or no longer answers, or no Prefect server answers at PREFECT_API_URL.
    """
    if url_elsewhere := os.environ.get("PREFECT_API_URL"):
        return _checked(url_elsewhere), False
    with _locked() as lock:
        if (url := _running()) is not None:
            return url, False
        return _start(lock), True


def stop() -> bool:
    """Stop this clone's server; tell whether there was one."""
    with _locked():
        state = _state()
        if state is not None:
            pid, _ = state
            for ending in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, ending)
                deadline = time.monotonic() + _END_SECONDS
                while _lives() and time.monotonic() < deadline:
                    time.sleep(0.1)
                if not _lives():
                    break
        STATE.unlink(missing_ok=True)
        return state is not None


@contextlib.contextmanager
def _locked() -> Iterator[TextIO]:
    """Let one process at a time look for the server or start it."""
    HOME.mkdir(exist_ok=True)
    with (HOME / "server.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle


def _lives() -> bool:
    """Tell whether a server of this clone lives: it holds a lock as long as it does."""
    with LIVES.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _state() -> tuple[int, int] | None:
    """Return process and port of the server that lives, None if none does; mend a record that is damaged."""
    deadline = time.monotonic() + _END_SECONDS
    while _lives():
        try:
            state = read_record(STATE, ServerState, "make stop")
        except InputError as error:
            if time.monotonic() > deadline:
                raise DamagedFileError(f"{STATE} stays damaged while a process holds {LIVES}; end it") from error
            time.sleep(0.2)
            continue
        return state.pid, state.port
    return None


def _running() -> str | None:
    """Return the address of this clone's server once it answers, None if there is none.

    A server that lives is waited for: on a busy machine it may be slow, and a second one would share its database.
    """
    deadline = time.monotonic() + _START_SECONDS
    while (state := _state()) is not None:
        pid, port = state
        url = f"http://127.0.0.1:{port}/api"
        if _answers(url):
            return url
        if time.monotonic() > deadline:
            raise InputError(f"this clone's Prefect server (process {pid}) does not answer at {url}; run `make stop`")
        time.sleep(0.2)
    return None


def _answers(url: str) -> bool:
    """Tell whether the server of this machine answers; no proxy is asked."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/health", timeout=2) as reply:
            return bool(reply.read(len(_HEALTHY) + 1) == _HEALTHY)
    except (OSError, ValueError, http.client.HTTPException):
        return False


def _checked(url: str) -> str:
    """Return PREFECT_API_URL, where a Prefect server answers there."""
    way_out = "expected http://HOST:PORT/api of a server that runs; unset it, and this clone starts a server of its own"
    address = url.strip().rstrip("/")
    if re.search("[@?#]", address):  # whose message shows nothing of it
        raise InputError(
            "PREFECT_API_URL holds more than http://HOST:PORT/api (a user, a password, a query); take that out, and "
            "give credentials by PREFECT_API_AUTH_STRING or PREFECT_API_KEY"
        )
    try:
        parts = httpx.URL(address)  # as Prefect's client reads it
        is_address = parts.scheme in ("http", "https") and bool(parts.host) and parts.port != 0
    except (httpx.InvalidURL, ValueError):  # brackets, a port that is no number; a name that is none
        is_address = False
    if not is_address:
        raise InputError(f"PREFECT_API_URL is {url!r}, {way_out}")
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=_ANSWER_SECONDS) as reply:
            is_prefect = reply.read(len(_HEALTHY) + 1) == _HEALTHY
    except urllib.error.HTTPError as error:
        is_prefect = error.code in (401, 403)  # Prefect's client has what it takes to get in
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise InputError(f"no Prefect server answers at PREFECT_API_URL {url} ({reason}); {way_out}") from error
    if not is_prefect:
        raise InputError(f"what answers at PREFECT_API_URL {url} is no Prefect API; {way_out}")
    return address


def _start(lock: TextIO) -> str:
    """Start a server, which inherits the lock until its state is written; its address once it answers."""
    way_out = "set PUZZLE_PORT to a free port, or unset it"
    with listening_on(_chosen_port(), way_out) as listening, _LOG.open("wb") as log:
        port = listening.getsockname()[1]
        url = f"http://127.0.0.1:{port}/api"
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.prefect_app", str(listening.fileno()), str(lock.fileno())],
            env=without_prefect(dict(os.environ)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(listening.fileno(), lock.fileno()),
        )
    deadline = time.monotonic() + _START_SECONDS
    while not _answers(url):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            last = " | ".join(_LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-3:])
            raise InputError(f"the Prefect server did not start on 127.0.0.1:{port}; its last words: {last} ({_LOG})")
        time.sleep(0.2)
    return url


def _chosen_port() -> int:
    """Return PUZZLE_PORT, 0 (any) if it is not set."""
    try:
        return arguments.port(os.environ.get("PUZZLE_PORT", "0"))
    except argparse.ArgumentTypeError as error:
        raise InputError(f"PUZZLE_PORT is {error}") from None


def main() -> None:
    """Start or stop the server."""
    parser = argparse.ArgumentParser(description="This clone's Prefect server on 127.0.0.1.")
    parser.add_argument("action", choices=("start", "stop"))
    action = parser.parse_args().action
    run_cleanly(_print_stop if action == "stop" else _print_start)


def _print_start() -> None:
    url, started = ensure()
    sys.stdout.write(f"{'started' if started else 'found'} the Prefect server: {url.removesuffix('/api')}\n")


def _print_stop() -> None:
    stopped = stop()
    sys.stdout.write("stopped the Prefect server\n" if stopped else "no Prefect server of this clone is running\n")


if __name__ == "__main__":
    main()
