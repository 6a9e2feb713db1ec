"""The gate before a server of this machine: programs and the server's own pages come in, pages from elsewhere do not.

A browser lets any page send requests to 127.0.0.1, and a name of somebody else's can resolve to it (DNS rebinding). So
a request has to name this machine as its Host, an Origin has to be the server's own, and what is sent has to be JSON.
"""

import asyncio
import re
import socket
import threading

import httpx
import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows import LOCAL_NAMES
from storage.files import InputError

_HTTP_PORT = 80
_LOCAL_PAGE = re.compile(rf"https?://({'|'.join(map(re.escape, LOCAL_NAMES))})(:\d{{1,5}})?")
_NOT_PASSED_ON = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host", "authorization"}
"""Headers that belong to one connection; requests to the server behind get the last two anew."""


def origins(port: int) -> list[str]:
    """Return the origins of a server's own pages, as browsers write them."""
    suffix = "" if port == _HTTP_PORT else f":{port}"
    return [f"http://{name}{suffix}" for name in LOCAL_NAMES]


class Gate:
    """An ASGI application that answers programs of this machine and the server's own pages, and nobody else."""

    def __init__(self, app: ASGIApp, port: int, *, takes_local_pages: bool = False) -> None:
        """Stand before `app`, which listens on this port of 127.0.0.1.

        Args:
            app: the application.
            port: the port.
            takes_local_pages: pages that other servers of this machine gave to a browser may come in as well.
        """
        self._app = app
        self._origins = origins(port)
        self._hosts = {f"{name}:{port}" for name in LOCAL_NAMES} | {name.partition("//")[2] for name in self._origins}
        self._takes_local_pages = takes_local_pages

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
        """Return HTTP status and reason, None for a request that may come in."""
        headers = Headers(scope=scope)
        hosts = [host.lower() for host in headers.getlist("host")]
        if len(hosts) != 1 or hosts[0] not in self._hosts:  # a name of another's that resolves to this machine
            return 421, f"Host is {', '.join(hosts) or 'missing'}, expected {' or '.join(sorted(self._hosts))}"
        senders = headers.getlist("origin")
        if not all(self._is_own(sender) for sender in senders):
            return 403, f"a page of {', '.join(senders)} may not use this server"
        sites = set(headers.getlist("sec-fetch-site")) - {"same-origin", "none"}
        if sites and not senders and not _opens_a_page(scope, headers):
            return 403, "a page of another origin may not use this server"
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            return _refused_body(headers)
        return None

    def _is_own(self, origin: str) -> bool:
        return origin in self._origins or (self._takes_local_pages and _LOCAL_PAGE.fullmatch(origin) is not None)


def _opens_a_page(scope: Scope, headers: Headers) -> bool:
    """Tell whether somebody followed a link to the UI, to see it as a page of its own."""
    return (
        scope["type"] == "http"
        and scope["method"] == "GET"
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
        and not scope["path"].startswith("/api")
    )


def _refused_body(headers: Headers) -> tuple[int, str] | None:
    """Return a refusal of what forms and simple requests of any page can send: a body that is not declared as JSON."""
    kinds = [kind.partition(";")[0].strip().lower() for kind in headers.getlist("content-type")]
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    if kinds != ["application/json"] and (kinds or has_body):
        return 415, f"Content-Type is {', '.join(kinds) or 'missing'}, expected application/json"
    return None


def _unframed(send: Send) -> Send:
    """Return `send`, with a header by which no other page can lay the UI under its own and catch clicks."""

    async def send_unframed(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["X-Frame-Options"] = "DENY"
        await send(message)

    return send_unframed


class Forward:
    """An ASGI application that has another HTTP server answer: one that wants a key, and is known to this process."""

    def __init__(self, address: str, key: str) -> None:
        """Stand for the server at `address` (http://HOST:PORT), which takes requests with this key alone."""
        self._address, self._key = httpx.URL(address), key
        self._client = httpx.AsyncClient(timeout=None, trust_env=False, limits=httpx.Limits())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and its answer back, as it streams; whoever hangs up ends the work on it."""
        body = await Request(scope, receive).body()
        passing = asyncio.create_task(self._pass(scope, body, send))
        leaving = asyncio.ensure_future(receive())
        await asyncio.wait({passing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if passing.done():
            passing.result()  # raises what went wrong on the way to the other server
        passing.cancel()
        await asyncio.gather(passing, leaving, return_exceptions=True)

    async def _pass(self, scope: Scope, body: bytes, send: Send) -> None:
        path = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        headers = [*_passed_on(scope["headers"]), (b"authorization", f"Bearer {self._key}".encode())]
        url = self._address.copy_with(raw_path=path)
        async with self._client.stream(scope["method"], url, headers=headers, content=body) as answer:
            start = {"type": "http.response.start", "status": answer.status_code}
            await send({**start, "headers": _passed_on(answer.headers.raw)})
            async for piece in answer.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def _passed_on(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name, text) for name, text in headers if name.decode("latin-1").lower() not in _NOT_PASSED_ON]


def listening_on(port: int, way_out: str) -> socket.socket:
    """Return a socket that listens on `port` of 127.0.0.1, on any free one for 0.

    Raises:
        InputError: another program has it; the message ends in `way_out`.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
        listening.listen()  # from now on nobody else can have it
    except OSError as error:
        listening.close()
        raise InputError(f"port {port} on 127.0.0.1 cannot be used ({error.strerror}); {way_out}") from error
    return listening


def serve_in_thread(listening: socket.socket, address: str, key: str) -> None:
    """Answer what comes to a socket, behind the gate, with the server at `address`; until the process ends."""
    gate = Gate(Forward(address, key), listening.getsockname()[1], takes_local_pages=True)
    config = uvicorn.Config(gate, workers=1, log_level="error", proxy_headers=False, lifespan="off", ws="none")
    threading.Thread(target=uvicorn.Server(config).run, args=([listening],), daemon=True).start()
