"""A judge over HTTP: replies in order, a busy server is asked again, whatever else is one sentence."""

import asyncio
import itertools
from collections.abc import Iterator

import pytest

from storage.files import InputError
from tasks.engines.client import Endpoint
from tasks.engines.judge import replies
from tests.judge_server import Refusal, judging


def test_replies_come_in_order_and_the_key_goes_along() -> None:
    prompts = [f"prompt {number}" for number in range(7)]
    with judging(lambda prompt: f"reply to {prompt}") as judge:
        answers = asyncio.run(replies(Endpoint(judge.url, "stand-in", "secret"), prompts, 3))
    assert answers == [f"reply to {prompt}" for prompt in prompts]
    assert set(judge.keys) == {"Bearer secret"}
    assert {(request["path"], request["model"], request["temperature"]) for request in judge.requests} == {
        ("/v1/chat/completions", "stand-in", 0)
    }


def test_a_busy_judge_is_asked_again() -> None:
    states: Iterator[int | str] = itertools.chain([429, 503], itertools.repeat("fine"))
    with judging(lambda _: next(states)) as judge:
        assert asyncio.run(replies(Endpoint(judge.url, "stand-in"), ["prompt"], 1, wait_s=0)) == ["fine"]
    assert len(judge.requests) == 3


def test_a_busy_judge_says_when_to_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    refusals = [Refusal(429, retry_after=text) for text in ("7", None, "3600", "Fri, 31 Dec 1999 23:59:59 GMT", "1")]
    states: Iterator[Refusal | str] = itertools.chain(refusals, ["fine"])
    with judging(lambda _: next(states)) as judge:
        assert asyncio.run(replies(Endpoint(judge.url, "stand-in"), ["prompt"], 1)) == ["fine"]
    assert waits == [7, 4, 120, 16, 32]


def test_what_an_error_says_is_shown_without_the_key() -> None:
    body = '{"error": "no credit left for secret-key"}' + "x" * 300
    with judging(lambda _: Refusal(402, body)) as judge, pytest.raises(InputError) as caught:
        asyncio.run(replies(Endpoint(judge.url, "stand-in", "secret-key"), ["prompt"], 1))
    assert 'HTTP 402: {"error": "no credit left for ***"}xxx' in str(caught.value)
    assert "secret-key" not in str(caught.value) and "x" * 201 not in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "problem", "requests"),
    [
        (401, "HTTP 401.*OPENAI_API_KEY", 1),
        (404, "HTTP 404", 1),
        (500, "HTTP 500", 8),
        (b"<html>", "does not answer in JSON", 1),
        (b'{"choices": []}', "another form than the OpenAI API", 1),
    ],
)
def test_what_is_no_reply_is_one_sentence(reply: int | bytes, problem: str, requests: int) -> None:
    with judging(lambda _: reply) as judge, pytest.raises(InputError, match=problem):
        asyncio.run(replies(Endpoint(judge.url, "stand-in"), ["prompt"], 1, wait_s=0))
    assert len(judge.requests) == requests


def test_no_server_is_one_sentence() -> None:
    with judging(lambda _: "gone") as judge:
        pass
    with pytest.raises(InputError, match="does not answer"):
        asyncio.run(replies(Endpoint(judge.url, "stand-in"), ["prompt"], 1, wait_s=0))
