"""A real S3 server, SeaweedFS, on free ports of 127.0.0.1: it can be killed and started again; one user may only read.

Behind :class:`FaultyProxy` it is slow, answers 500, cuts connections or flips bytes, as a test asks.
"""

import http.client
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import s3fs

_START_SECONDS = 30
_SECRETS = {"puzzle": "puzzle-secret-of-the-tests", "reader": "reader-secret-of-the-tests"}
_RIGHTS = {"puzzle": ["Admin", "Read", "Write", "List", "Tagging"], "reader": ["Read", "List"]}


class S3Server:
    """SeaweedFS with its data in `folder`, running within a `with` block.

    Attributes:
        environment: what a process needs in its environment.
        reader: the same for a user who may not write.
        bucket: the name of a bucket that exists.
    """

    bucket = "puzzle"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        port = _free_port()
        self._command = [*_weed_command(folder, port), f"-bucket={self.bucket}", f"-s3.config={folder / 'users.json'}"]
        users = [
            {"name": name, "credentials": [{"accessKey": name, "secretKey": secret}], "actions": _RIGHTS[name]}
            for name, secret in _SECRETS.items()
        ]
        (folder / "users.json").write_text(json.dumps({"identities": users}))
        self.environment, self.reader = (
            {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": name,
                "AWS_SECRET_ACCESS_KEY": secret,
                "AWS_DEFAULT_REGION": "us-east-1",
            }
            for name, secret in _SECRETS.items()
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()  # nothing of it is kept, and a polite end takes two seconds

    def start(self) -> None:
        """Start the server and wait until the bucket exists."""
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                self._command, env={**os.environ, **self.environment}, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self._wait(self._process)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """End the server with SIGKILL; its data stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def client(self) -> s3fs.S3FileSystem:
        """Return s3fs as the user who may write."""
        return s3fs.S3FileSystem(
            key=self.environment["AWS_ACCESS_KEY_ID"],
            secret=self.environment["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def _wait(self, process: "subprocess.Popen[bytes]") -> None:
        # Asked only once the port answers: s3fs itself waits longer and longer between its attempts.
        store, end = self.client(), time.monotonic() + _START_SECONDS
        while time.monotonic() < end and process.poll() is None:
            if _answers(urlsplit(self.environment["AWS_ENDPOINT_URL"]).port or 0) and store.exists(self.bucket):
                return
            time.sleep(0.1)
        log = (self._folder / "log").read_text()[-2000:]
        raise RuntimeError(f"the S3 server of the tests did not start; its log ends:\n{log}")


def _weed_command(folder: Path, s3_port: int) -> list[str]:
    """Return the command line: every service on a free port, and those that no test needs off."""
    services = ("s3.port.grpc", "master.port", "master.port.grpc", "filer.port", "filer.port.grpc", "volume.port")
    ports = {service: _free_port() for service in (*services, "volume.port.grpc")}
    return [
        *(str(Path(sys.executable).with_name("weed")), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *("-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-admin.port={_low_port()}"),
        *(f"-s3.port={s3_port}", *(f"-{service}={port}" for service, port in ports.items())),
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _low_port() -> int:
    """Return a free port whose 10,000th successor is free too: weed's own worker looks for the admin service there."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        return port


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class FaultyProxy:
    """Stands in front of the server at `url` and passes every request on, unless `fault` does something else."""

    def __init__(self, url: str) -> None:
        self.requests: list[str] = []
        self.before: Callable[[BaseHTTPRequestHandler], bool] = lambda _: False
        """Deals with a request itself where it returns True."""
        self.body: Callable[[BaseHTTPRequestHandler, bytes], bytes] = lambda _, body: body
        """Changes the body of an answer."""
        proxy, address = self, urlsplit(url)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (ConnectionError, http.client.HTTPException):
                    self.close_connection = True

            def _pass_on(self) -> None:
                data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                proxy.requests.append(f"{self.command} {self.path}")
                if proxy.before(self):
                    return
                upstream = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
                upstream.request(self.command, self.path, data, {**self.headers})
                answer = upstream.getresponse()
                body = proxy.body(self, answer.read())
                self.send_response_only(answer.status)
                length = answer.headers["Content-Length"] if self.command == "HEAD" else str(len(body))
                for name, value in answer.headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else body)
                upstream.close()

            def do_GET(self) -> None:
                self._pass_on()

            def do_HEAD(self) -> None:
                self._pass_on()

            def do_PUT(self) -> None:
                self._pass_on()

            def do_POST(self) -> None:
                self._pass_on()

            def do_DELETE(self) -> None:
                self._pass_on()

            def log_message(self, *_: object) -> None:
                """Write nothing to the terminal."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def refuse(request: BaseHTTPRequestHandler, status: int, code: str) -> bool:
    """Answer with an error of S3."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as the test asks</Message></Error>".encode()
    request.send_response_only(status)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
    return True


def cut(request: BaseHTTPRequestHandler) -> bool:
    """Close the connection without an answer."""
    request.close_connection = True
    request.connection.shutdown(socket.SHUT_RDWR)
    return True
