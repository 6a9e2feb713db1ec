"""A stand-in for a judge behind an OpenAI HTTP API: it answers each prompt as a test's function says, on 127.0.0.1."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Judge:
    """A running stand-in: its base URL, the requests that it got, and the keys that came with them."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    @property
    def prompts(self) -> list[str]:
        """Return the text of every request."""
        return [request["messages"][0]["content"] for request in self.requests]


@dataclass(frozen=True)
class Refusal:
    """An HTTP state with a body, and seconds after which to ask again."""

    state: int
    body: str = ""
    retry_after: str | None = None


@contextmanager
def judging(answer: Callable[[str], str | int | bytes | Refusal]) -> Iterator[Judge]:
    """Serve on a free port; `answer` gives the text for a prompt, an HTTP state, or bytes in place of JSON."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            judge.requests.append({**body, "path": self.path})
            judge.keys.append(self.headers["Authorization"])
            reply = answer(body["messages"][0]["content"])
            content = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
            refusal = reply if isinstance(reply, Refusal) else Refusal(reply if isinstance(reply, int) else 200)
            sent = reply if isinstance(reply, bytes) else refusal.body.encode()
            if isinstance(reply, str):
                sent = json.dumps(content).encode()
            self.send_response(refusal.state)
            if refusal.retry_after:
                self.send_header("Retry-After", refusal.retry_after)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_: Any, **__: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        judge = Judge(f"http://127.0.0.1:{server.server_address[1]}/v1")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield judge
        finally:
            server.shutdown()
