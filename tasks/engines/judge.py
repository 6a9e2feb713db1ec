"""A judge behind an OpenAI HTTP API (/chat/completions): prompts go in, what it says comes out, in order."""

import asyncio
from collections.abc import Sequence
from typing import Any

import aiohttp

from storage.files import InputError
from tasks.engines.client import Endpoint

_TRIES = 4
_TIMEOUT_S = 300.0
_BUSY = {408, 409, 425, 429, 500, 502, 503, 504}
"""HTTP states after which the same request may succeed."""


async def replies(judge: Endpoint, prompts: Sequence[str], requests_at_once: int, wait_s: float = 2.0) -> list[str]:
    """Ask a judge all prompts, at temperature 0.

    Args:
        judge: base URL, model and key.
        prompts: what it is asked, a message of a user each.
        requests_at_once: requests that are open at any time.
        wait_s: seconds before a busy server is asked again; twice as many each time.

    Raises:
        InputError: the server does not answer after four tries, refuses the request, or answers in another form.
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
    problem = ""
    for attempt in range(_TRIES):
        if attempt:
            await asyncio.sleep(wait_s * 2 ** (attempt - 1))
        try:
            async with session.post(f"{judge.url}/chat/completions", json=body) as response:
                if response.status == 200:
                    return _content(await response.json(content_type=None), judge)
                problem = f"HTTP {response.status}"
                if response.status not in _BUSY:
                    break
        except (aiohttp.ClientError, TimeoutError) as error:
            problem = str(error) or "timeout"
        except ValueError as error:
            raise InputError(f"the judge at {judge.url} does not answer in JSON ({error}); correct the URL") from error
    hint = "; set OPENAI_API_KEY" if problem in ("HTTP 401", "HTTP 403") else ""
    raise InputError(f"the judge {judge.model} at {judge.url} does not answer ({problem}); check URL and model{hint}")


def _content(answer: Any, judge: Endpoint) -> str:
    try:
        content: str = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"{judge.url} answers in another form than the OpenAI API; correct the URL") from error
    return content if isinstance(content, str) else ""
