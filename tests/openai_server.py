"""A server of the OpenAI HTTP API that behaves, or misbehaves, as a test asks for: real sockets on 127.0.0.1."""

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from aiohttp import web

Manner = Literal[
    "whole",
    "torn",  # whole, but comments between events, two events in one write, one event in two
    "no usage",
    "stall",
    "pings only",
    "drop",
    "no done",
    "429",
    "500",  # with a body that is no text
    "odd usage",
    "garbage",
    "list",
    "error",
    "short",
    "endless line",
    "deep",
    "huge usage",
    "half a pair",  # an error event with half a surrogate pair
    "opening event",  # whole, behind an event without text
    "mute",  # no event has text
    "null choices",  # whole, with `choices: null` beside the usage
    "usage unasked",
    "one event",
    "one write",
]


@dataclass
class Scripted:
    """A server that answers in the manners of a script; it keeps the requests and the most that were open at once.

    It is a proxy as well: it answers for whichever host a request names. A request with one of the fields that it
    `refuses`, or with such a kind of prompt, is answered with HTTP 400. Without `ignore_eos` its model ends two tokens
    early, and without `stream_options` it tells no usage.
    """

    manners: Sequence[Manner]
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    proxy_keys: list[str | None] = field(default_factory=list)
    refuses: tuple[str, ...] = ()
    listed: str = '{"data": [{"id": "scripted"}]}'
    open: int = 0
    most_open: int = 0

    async def models(self, request: web.Request) -> web.Response:
        """Answer GET /v1/models."""
        self.hosts.append(request.host)
        return web.json_response(text=self.listed)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Answer POST /v1/completions: a token of text an event, in the manner of this request."""
        manner = self.manners[len(self.requests) % len(self.manners)]
        body = await request.json()
        self.requests.append(body)
        self.keys.append(request.headers.get("Authorization"))
        self.hosts.append(request.host)
        self.proxy_keys.append(request.headers.get("Proxy-Authorization"))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await asyncio.sleep(0.02)  # on a busy machine the next request takes its time
            if refused := [name for name in self.refuses if name in {*body, type(body["prompt"]).__name__}]:
                return web.json_response({"error": f"{refused[0]} is not taken"}, status=400)
            if manner == "429":
                return web.json_response({"error": f"busy, {request.headers.get('Authorization')}"}, status=429)
            if manner == "500":
                return web.Response(body=b"\xff\xfe oops", status=500)
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await self._stream(response, request, manner, body)
            return response
        finally:
            self.open -= 1

    async def _stream(
        self, response: web.StreamResponse, request: web.Request, manner: Manner, body: dict[str, Any]
    ) -> None:
        count = body["max_tokens"] - (manner == "short") - 2 * ("ignore_eos" not in body)
        texts = [" a" if manner != "mute" else ""] * count
        if manner == "one event":
            texts = ["".join(texts)]
        if manner == "opening event":
            texts = ["", *texts]
        events = [_event({"choices": [{"text": text, "finish_reason": None}]}) for text in texts]
        usage: dict[str, Any] = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
        if manner == "odd usage":
            usage = {"prompt_tokens": "many", "completion_tokens": None}
        if manner == "huge usage":
            usage["prompt_tokens"] = 10**400
        closing = [_event({"choices": [{"text": "", "finish_reason": "length"}]})]
        if manner == "usage unasked" or ("stream_options" in body and manner != "no usage"):
            closing += [_event({"choices": None if manner == "null choices" else [], "usage": usage})]
        closing += [b"data: [DONE]\n\n"] if manner != "no done" else []
        if manner == "torn":
            half = len(events[1]) // 2
            events = [b": ping\n\n" + events[0] + events[1][:half], events[1][half:], *events[2:]]
        if manner == "one write":
            events, closing = [b"".join([*events, *closing])], []
        for number, event in enumerate([*events, *closing]):
            if number == 2:
                match manner:
                    case "stall":
                        await asyncio.sleep(30)
                    case "pings only":
                        while True:
                            await response.write(b": ping\n\n")
                            await asyncio.sleep(0.05)
                    case "drop":
                        assert request.transport is not None
                        request.transport.close()
                        return
                    case "garbage":
                        event = b"data: {not json\n\n"
                    case "list":
                        event = b'data: {"choices": [3]}\n\n'
                    case "error":
                        event = _event({"error": {"message": "out of memory"}})
                    case "half a pair":
                        event = _event({"error": "\ud800"})
                    case "deep":
                        event = b"data: " + b"[" * 200_000 + b"\n\n"
                    case "endless line":
                        event = b"data: " + b"x" * (5 << 20)
            await response.write(event)


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


@contextmanager
def scripted(*manners: Manner) -> Iterator[Scripted]:
    """Serve on a free port from a thread; request number n is answered in manner n, over again."""
    server, ready, loop = Scripted(manners), threading.Event(), asyncio.new_event_loop()
    app = web.Application()
    app.router.add_get("/v1/models", server.models)
    app.router.add_post("/v1/completions", server.completions)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"{site.name.rpartition(':')[0]}:{runner.addresses[0][1]}/v1"
        ready.set()

    def serve() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
