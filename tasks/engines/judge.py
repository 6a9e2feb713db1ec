"""A judge behind an OpenAI HTTP API (/chat/completions): prompts go in, what it says comes out, in order."""

import asyncio
import json
from collections.abc import Sequence

import aiohttp

from storage.files import InputError
from tasks.engines.client import Endpoint

_TRIES = 8
_TIMEOUT_S = 300.0
_LONGEST_WAIT_S = 120.0
_SHOWN = 200
"""Characters of an error's body in a message."""
_BUSY = {408, 409, 425, 429, 500, 502, 503, 504}
"""HTTP states after which the same request may succeed."""


async def replies(judge: Endpoint, prompts: Sequence[str], requests_at_once: int, wait_s: float = 2.0) -> list[str]:
    """Ask a judge all prompts, at temperature 0.

    Args:
        judge: base URL, model and key.
        prompts: what it is asked, a message of a user each.
        requests_at_once: requests that are open at any time.
        wait_s: seconds before a busy server is asked again, unless it names some (Retry-After); twice as many each
            time, up to two minutes.

    Raises:
        InputError: the server does not answer after eight tries, refuses the request, or answers in another form.
    """
    gate = asyncio.Semaphore(requests_at_once)
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, headers=judge.headers) as session:

        async def reply(prompt: str) -> str:
            async with gate:
                return await _reply(session, judge, prompt, wait_s)

        return await asyncio.gather(*(reply(prompt) for prompt in prompts))


async def _reply(session: aiohttp.ClientSession, judge: Endpoint, prompt: str, wait_s: float) -> str:
    body = {"model": judge.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
    problem, asked_wait_s = "", 0.0
    for attempt in range(_TRIES):
        if attempt:
            await asyncio.sleep(min(max(wait_s * 2 ** (attempt - 1), asked_wait_s), _LONGEST_WAIT_S))
        try:
            async with session.post(f"{judge.url}/chat/completions", json=body) as response:
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            problem, asked_wait_s = str(error) or "timeout", 0.0
            continue
        if response.status == 200:
            return _content(content, judge)
        problem = f"HTTP {response.status}{_shown(content, judge)}"
        if response.status not in _BUSY:
            break
        asked_wait_s = _seconds(response.headers.get("Retry-After", ""))
    hint = "; set OPENAI_API_KEY" if problem.startswith(("HTTP 401", "HTTP 403")) else ""
    raise InputError(f"the judge {judge.model} at {judge.url} does not answer ({problem}); check URL and model{hint}")


def _shown(content: bytes, judge: Endpoint) -> str:
    """Return the first of what an error says of itself, without the key."""
    text = " ".join(content.decode(errors="replace").split())
    text = text.replace(judge.key, "***") if judge.key else text
    return f": {text[:_SHOWN]}" if text else ""


def _seconds(retry_after: str) -> float:
    """Return the seconds of a Retry-After; 0 where it names none, or a date."""
    return float(retry_after) if retry_after.isdecimal() else 0.0


def _content(content: bytes, judge: Endpoint) -> str:
    try:
        answer = json.loads(content)
    except ValueError as error:
        raise InputError(f"the judge at {judge.url} does not answer in JSON ({error}); correct the URL") from error
    try:
        text: str = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"{judge.url} answers in another form than the OpenAI API; correct the URL") from error
    return text if isinstance(text, str) else ""
