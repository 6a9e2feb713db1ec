"""A client that loads a server of the OpenAI HTTP API (vLLM, TensorRT-LLM, NIM, llama.cpp) and times its streams.

In: an endpoint, prompts of token ids or of text, the number of tokens to generate, the number of requests at once. Out:
for each request the times of its tokens, or its error; a failed request is neither retried nor left out.
"""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from storage.files import InputError

CountedBy = Literal["usage", "events", "our tokenizer"]

_LONGEST_LINE = 1 << 20
"""Bytes of one streamed event; a longer one is malformed."""
_COUNTS = ("prompt_tokens", "completion_tokens")
_HINTS = {
    **dict.fromkeys((401, 403), "; set OPENAI_API_KEY"),
    407: "; write its user and password into the environment's variable, http://USER:PASSWORD@HOST:PORT",
}
_MOST_TOKENS = (1 << 31) - 1
"""No request has more, in or out; an event that counts more is malformed."""


@dataclass(frozen=True)
class Endpoint:
    """A server: its base URL (with /v1), the name of a model, a key that is never stored or shown, a proxy or none."""

    url: str
    model: str
    key: str | None = None
    proxy: str | None = None

    def __post_init__(self) -> None:
        if self.key and not (self.key.isascii() and self.key.isprintable()):
            raise InputError(
                "OPENAI_API_KEY holds a line end or another mark that no header takes; set it to the key alone"
            )

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of every request."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


@dataclass(frozen=True)
class Answer:
    """One request: seconds from its start to each event of a token, how many tokens came, who counted, or an error.

    Events without text before the first text are no tokens: servers open a stream with one, before they compute. Later
    ones are: a token's text may wait for the next one's. `error` is a kind, such as `HTTP 429`, `timeout` or `stream
    dropped`; None says that all tokens came.
    """

    started: float
    ended: float
    arrivals: tuple[float, ...] = ()
    input_tokens: int | None = None
    output_tokens: int = 0
    error: str | None = None
    detail: str = ""
    counted_by: CountedBy = "usage"
    text: str = ""

    @property
    def is_buffered(self) -> bool:
        """Tell whether all its tokens came at once, so that it shows no speed of one user."""
        return self.output_tokens > 1 and self.arrivals[:1] == self.arrivals[-1:]


class _FailedError(Exception):
    """The error that ended a request early: its kind, and the details."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


class _Stream:
    """The events of one answer, as they come."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self.texts: list[str] = []
        self.usage: dict[str, Any] = {}
        self.is_done = False

    def take(self, line: bytes, now: float) -> bool:
        """Take one line of the stream.

        Returns:
            Whether it was an event; blank lines, and comments that keep the connection alive, are none.
        """
        if not line.startswith(b"data:"):
            return False
        data = line[5:].strip()
        if data == b"[DONE]":
            self.is_done = True
            return True
        try:
            event = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise _FailedError("malformed event", data[:80].decode(errors="replace")) from error
        if isinstance(event, dict) and event.get("error"):
            raise _FailedError("error event", str(event["error"])[:80])
        try:
            usage = event.get("usage") or self.usage
            self.usage = {name: usage[name] for name in _COUNTS if _is_count(usage.get(name))}
            choices = event.get("choices") or []  # null beside the usage of some servers
            text = "".join(choice.get("text") or "" for choice in choices)
            is_last = all(choice.get("finish_reason") is not None for choice in choices)
        except (AttributeError, TypeError, ValueError) as error:
            raise _FailedError("malformed event", data[:80].decode(errors="replace")) from error
        if text or (self.arrivals and not is_last):
            self.arrivals.append(now)
            self.texts.append(text)
        return True

    @property
    def count(self) -> int:
        """Return the tokens that the server counted, else the events."""
        counted: int = self.usage.get("completion_tokens", len(self.arrivals))
        return counted


def _is_count(value: object) -> bool:
    """Tell whether a server counted; ValueError where it counts more than any request has."""
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    if value > _MOST_TOKENS:
        raise ValueError("too large a count")
    return value >= 0


def environment_proxy(url: str) -> str | None:
    """Return the proxy that the environment names for a URL; None where it names none, or no_proxy has the host."""
    parts, proxies = urlsplit(url), getproxies()
    proxy = None if proxy_bypass(parts.netloc) else proxies.get(parts.scheme) or proxies.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


async def models(endpoint_url: str, key: str | None, seconds: float, proxy: str | None = None) -> list[str]:
    """Names of the models that a server has; a proxy is asked only where one is given.

    Raises:
        InputError: the server does not answer, or not as the OpenAI API does.
    """
    url = f"{endpoint_url}/models"
    timeout, route = aiohttp.ClientTimeout(total=seconds), " through the proxy" if proxy else ""
    try:
        async with (
            aiohttp.ClientSession(
                timeout=timeout, headers=Endpoint(endpoint_url, "", key).headers, proxy=proxy
            ) as session,
            session.get(url) as response,
        ):
            if response.status != 200:
                hint = _HINTS.get(response.status, "")
                raise InputError(f"{url}{route} answered HTTP {response.status}, expected a list of models{hint}")
            return [_name(model["id"], url) for model in (await response.json(content_type=None))["data"]]
    except InputError:
        raise
    except (aiohttp.ClientError, TimeoutError) as error:
        way_out = "start it, or correct the URL"
        if not proxy and environment_proxy(url):
            way_out += ", or give --proxy: without it the environment's proxy is not asked"
        raise InputError(f"no server answers at {url}{route} ({_cause(error) or 'timeout'}); {way_out}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{url} is no list of models; the URL must be the API's base, ending in /v1") from error


def _cause(error: Exception) -> str:
    """Return what an error says, without the proxy's address, which may hold a password."""
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return f"the proxy answered HTTP {error.status}{_HINTS.get(error.status, '')}"
    return str(error)


def _name(model: object, url: str) -> str:
    name = str(model)
    if not name.isprintable():
        raise InputError(f"{url} names a model {name[:80]!a}, expected printable text; serve it under another name")
    return name


async def load(
    endpoint: Endpoint,
    prompts: Sequence[Sequence[int] | str],
    output_tokens: int,
    concurrency: int,
    stall_s: float,
    ended: Callable[[], object],
) -> list[Answer]:
    """Send all prompts, `concurrency` at once: whenever an answer is whole, the next request starts.

    Args:
        endpoint: the server.
        prompts: token ids of each request, all of one length; or text, for servers that take no ids.
        output_tokens: tokens to generate for each prompt, whatever the model would choose; behind a text at most so
            many, since nothing is sent then that only some servers take.
        concurrency: requests that are open at any time.
        stall_s: seconds without an event after which a request has failed.
        ended: called after each request.

    Returns:
        An answer for every prompt, in their order.
    """
    answers: dict[int, Answer] = {}
    waiting = iter(enumerate(prompts))
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall_s)
    async with aiohttp.ClientSession(
        # one connection for each request: a server may close a kept connection just as it is used again
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=timeout,
        headers=endpoint.headers,
        proxy=endpoint.proxy,
    ) as session:

        async def user() -> None:
            for index, prompt in waiting:
                answers[index] = await _ask(session, endpoint, prompt, output_tokens, stall_s)
                ended()

        await asyncio.gather(*(user() for _ in range(min(concurrency, len(prompts)))))
    return [answers[index] for index in range(len(prompts))]


async def _ask(
    session: aiohttp.ClientSession, endpoint: Endpoint, prompt: Sequence[int] | str, output_tokens: int, stall_s: float
) -> Answer:
    """Send one request and read its stream to the end or to an error."""
    body: dict[str, object] = {
        "model": endpoint.model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0.0,
        "stream": True,
    }
    fewest_tokens = 1
    if not isinstance(prompt, str):
        fewest_tokens = output_tokens
        body |= {
            "prompt": list(prompt),
            "min_tokens": output_tokens,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
    stream, started = _Stream(), time.perf_counter()
    error, detail = None, ""
    try:
        await _read(session, f"{endpoint.url}/completions", body, stream, started, stall_s)
        _check_whole(stream, fewest_tokens)
    except _FailedError as failed:
        error, detail = failed.kind, failed.detail
    except TimeoutError:
        error = "timeout"
    except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, ConnectionResetError) as dropped:
        error, detail = "stream dropped", str(dropped)
    except aiohttp.ClientError as lost:
        error, detail = "no connection", _cause(lost)
    return Answer(
        started,
        time.perf_counter(),
        tuple(stream.arrivals),
        stream.usage.get("prompt_tokens"),
        stream.count,
        error,
        (detail.replace(endpoint.key, "***") if endpoint.key else detail).encode(errors="replace").decode(),
        "usage" if "completion_tokens" in stream.usage else "events",
        "".join(stream.texts),
    )


async def _read(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], stream: _Stream, started: float, stall_s: float
) -> None:
    """Read the stream until it is done; TimeoutError where no event comes for `stall_s`.

    Events that are read at once came at one time: nothing is known of when each was computed.
    """
    loop, rest = asyncio.get_running_loop(), b""
    async with asyncio.timeout(stall_s) as stall, session.post(url, json=body) as response:
        if response.status != 200:
            raise _FailedError(
                f"HTTP {response.status}", (await response.content.read(300)).decode(errors="replace")[:80]
            )
        async for part in response.content.iter_any():
            now = time.perf_counter() - started
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if stream.take(line, now):
                    stall.reschedule(loop.time() + stall_s)
                if stream.is_done:
                    return
            if len(rest) > _LONGEST_LINE:
                raise _FailedError("malformed event", f"a line of more than {_LONGEST_LINE} bytes")
        stream.take(rest, time.perf_counter() - started)


def _check_whole(stream: _Stream, fewest_tokens: int) -> None:
    """Raise the error of an answer that ended early: it is no measurement of so many tokens."""
    if not stream.is_done:
        raise _FailedError("stream dropped", "it ended without [DONE]")
    if stream.count < fewest_tokens:
        raise _FailedError("too few tokens", f"{stream.count} of {fewest_tokens}")
    if not stream.arrivals:
        raise _FailedError("no text", f"{stream.count} tokens, and no event with text")
