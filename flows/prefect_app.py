"""This clone's Prefect server as a process of its own; flows/server.py starts it, and stops it.

It is Prefect's application behind a gate that lets in programs of this machine and the server's own pages, but no page
that a browser has from elsewhere: such a page could deploy commands and have `make serve` run them.

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
from typing import TextIO

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows import HOME, LOCAL_NAMES
from storage.files import InputError, read_sealed, write_sealed

STATE = HOME / "server.json"
LIVES = HOME / "serving.lock"
_LOOK_SECONDS = 1.0
_END_SECONDS = 5
"""How long a request that is open may last on when the server ends."""
_HTTP_PORT = 80


def _origins(port: int) -> list[str]:
    """The origins of the server's own pages, as browsers write them."""
    suffix = "" if port == _HTTP_PORT else f":{port}"
    return [f"http://{name}{suffix}" for name in LOCAL_NAMES]


class Gate:
    """An ASGI application that answers programs of this machine and the server's own pages, and nobody else."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        """Stand before `app`, which listens on this port of 127.0.0.1."""
        self._app = app
        self._origins = _origins(port)
        self._hosts = {f"{name}:{port}" for name in LOCAL_NAMES} | {name.partition("//")[2] for name in self._origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        refusal = None if scope["type"] == "lifespan" else self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, _unframed(send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": refusal[1]})
        else:
            code, reason = refusal
            await JSONResponse({"detail": reason}, code)(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """HTTP status and reason, None for a request that may come in."""
        headers = Headers(scope=scope)
        hosts = [host.lower() for host in headers.getlist("host")]
        if len(hosts) != 1 or hosts[0] not in self._hosts:  # a name of another's that resolves to this machine
            return 421, f"Host is {', '.join(hosts) or 'missing'}, expected {' or '.join(sorted(self._hosts))}"
        senders = headers.getlist("origin")
        if any(sender not in self._origins for sender in senders):
            return 403, f"a page of {', '.join(senders)} may not use this server"
        sites = set(headers.getlist("sec-fetch-site")) - {"same-origin", "none"}
        if sites and not senders and not _opens_a_page(scope, headers):
            return 403, "a page of another origin may not use this server"
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            return _refused_body(headers)
        return None


def _opens_a_page(scope: Scope, headers: Headers) -> bool:
    """Whether somebody followed a link to the UI, to see it as a page of its own."""
    return (
        scope["type"] == "http"
        and scope["method"] == "GET"
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
        and not scope["path"].startswith("/api")
    )


def _refused_body(headers: Headers) -> tuple[int, str] | None:
    """A refusal of what forms and simple requests of any page can send: a body that is not declared as JSON."""
    kinds = [kind.partition(";")[0].strip().lower() for kind in headers.getlist("content-type")]
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    if kinds != ["application/json"] and (kinds or has_body):
        return 415, f"Content-Type is {', '.join(kinds) or 'missing'}, expected application/json"
    return None


def _unframed(send: Send) -> Send:
    """`send`, with a header by which no other page can lay the UI under its own and catch clicks."""

    async def send_unframed(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["X-Frame-Options"] = "DENY"
        await send(message)

    return send_unframed


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
        state = {"pid": os.getpid(), "port": port}
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
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(_origins(port)),
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
