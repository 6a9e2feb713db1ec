"""The gate's way to the server behind it; what it refuses, the tests of both servers try on them."""

import asyncio
import socket
from typing import Any

import httpx
import pytest

from flows.gate import Forward, listening_on, serve_in_thread
from storage.files import InputError


@pytest.fixture
def through(monkeypatch: pytest.MonkeyPatch) -> tuple[socket.socket, socket.socket]:
    """Return a connection of a client that has sent a question, and the connection on which the server behind got it.

    The proxy of the environment, which nobody is, is not asked for a server of this machine.
    """
    for name, text in (("http_proxy", "http://127.0.0.1:9"), ("no_proxy", "")):
        monkeypatch.setenv(name, text)
        monkeypatch.setenv(name.upper(), text)
    behind, front = listening_on(0, ""), listening_on(0, "")
    serve_in_thread(front, f"http://127.0.0.1:{behind.getsockname()[1]}", "a secret")
    port = front.getsockname()[1]
    client = socket.create_connection(("127.0.0.1", port), timeout=60)
    head = f"POST /v1/x%2Fy?a=%20b HTTP/1.1\r\nHost: localhost:{port}\r\nAuthorization: Bearer theirs\r\n"
    client.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{{}}".encode())
    behind.settimeout(60)
    server, _ = behind.accept()
    server.settimeout(60)
    return client, server


def _read_until(connection: socket.socket, end: bytes) -> bytes:
    received = b""
    while not received.endswith(end):
        piece = connection.recv(4096)
        assert piece, received
        received += piece
    return received


def test_a_request_arrives_as_it_was_with_the_key_and_the_answer_streams(
    through: tuple[socket.socket, socket.socket],
) -> None:
    client, server = through
    request = _read_until(server, b"\r\n\r\n{}")
    assert request.startswith(b"POST /v1/x%2Fy?a=%20b HTTP/1.1\r\n")
    assert [line for line in request.lower().split(b"\r\n") if line.startswith(b"authorization")] == [
        b"authorization: bearer a secret"
    ]
    server.sendall(
        b"HTTP/1.1 202 OK\r\nX-Theirs: 1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n"
    )
    head = _read_until(client, b"3\r\none\r\n").lower()  # before the answer has ended
    assert head.startswith(b"http/1.1 202")
    assert b"x-theirs: 1\r\n" in head and b"x-frame-options: deny\r\n" in head
    assert b"connection: close" not in head, "it is of the connection behind"
    server.sendall(b"3\r\ntwo\r\n0\r\n\r\n")
    assert _read_until(client, b"0\r\n\r\n") == b"3\r\ntwo\r\n0\r\n\r\n"


def test_whoever_hangs_up_ends_the_work_on_the_answer(through: tuple[socket.socket, socket.socket]) -> None:
    client, server = through
    _read_until(server, b"\r\n\r\n{}")
    client.close()
    assert server.recv(1) == b""


def test_what_goes_wrong_on_the_way_to_the_server_behind_is_raised() -> None:
    """Nobody listens there any more."""
    with listening_on(0, "") as closed:
        port = closed.getsockname()[1]
    messages = iter([{"type": "http.request", "body": b""}])

    async def receive() -> dict[str, Any]:
        for message in messages:
            return message
        stays: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        return await stays

    async def send(message: Any) -> None:
        raise AssertionError(message)

    scope = {"type": "http", "method": "GET", "raw_path": b"/", "query_string": b"", "headers": []}
    with pytest.raises(httpx.ConnectError):
        asyncio.run(Forward(f"http://127.0.0.1:{port}", "a secret")(scope, receive, send))


def test_a_port_that_is_taken_is_one_error() -> None:
    with listening_on(0, "") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} on 127.0.0.1 cannot be used .*; choose another"):
            listening_on(port, "choose another")
