"""This clone's Prefect server as a process of its own; flows/server.py starts it, and stops it.

It is Prefect's application behind flows/gate.py: a page that a browser has from elsewhere could otherwise deploy
commands and have `make serve` run them.

As long as the process lives it holds the lock `.prefect/serving.lock`, which keeps a second server away from the same
database, and sees to it that `.prefect/server.json` (its process and port) is whole. Without its folder it ends.
"""

import fcntl
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import TextIO

import uvicorn

from flows import HOME
from flows.gate import Gate, origins
from storage.files import InputError, read_sealed, write_sealed

STATE = HOME / "server.json"
LIVES = HOME / "serving.lock"
_LOOK_SECONDS = 1.0
_END_SECONDS = 5
"""How long a request that is open may last on when the server ends."""


@dataclass(frozen=True)
class ServerState:
    """The content of server.json: the process of the server and its port."""

    pid: int
    port: int


def serve(listening: socket.socket, starting: int) -> None:
    """Be this clone's server until a signal comes.

    Args:
        listening: the socket, bound to 127.0.0.1.
        starting: descriptor of the lock that whoever starts a server holds; it is let go of once the state is written,
            so that this server is known even if whoever started it was killed.
    """
    port = listening.getsockname()[1]
    with LIVES.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another server holds {LIVES}")
        state = asdict(ServerState(os.getpid(), port))
        write_sealed(STATE, state)
        os.close(starting)
        threading.Thread(target=_keep, args=(handle, state), daemon=True).start()

        os.environ.update(_settings(port))
        from prefect.server.api.server import create_app  # reads them; and it takes seconds, in which all else is done

        app = Gate(create_app(final=True), port)
        config = uvicorn.Config(
            app, workers=1, log_level="warning", proxy_headers=False, timeout_graceful_shutdown=_END_SECONDS
        )
        uvicorn.Server(config).run([listening])


def _settings(port: int) -> dict[str, str]:
    url = f"http://127.0.0.1:{port}/api"
    return {
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_UI_API_URL": url,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(origins(port)),
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
    }


def _keep(handle: TextIO, state: dict[str, int]) -> None:
    """Write the state anew where it was damaged or removed; end the process where its folder was."""
    while True:
        time.sleep(_LOOK_SECONDS)
        try:
            if not os.path.samestat(os.fstat(handle.fileno()), LIVES.stat()):
                raise FileNotFoundError
            if _state() != state:
                write_sealed(STATE, state)
        except FileNotFoundError:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        except (OSError, InputError):  # a full disk: once more in a moment
            continue


def _state() -> object:
    try:
        return read_sealed(STATE, "make stop")
    except InputError:
        return None


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
