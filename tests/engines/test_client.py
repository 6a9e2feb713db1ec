"""The client against a server that behaves and one that does not: every request ends, with its tokens or its error."""

import asyncio
from collections.abc import Sequence

import pytest

from storage.files import InputError
from tasks.engines.client import Answer, Endpoint, load, models
from tests.openai_server import Manner, Scripted, scripted

TOKENS = 5


def ask(
    server: Scripted, requests: int, concurrency: int = 1, key: str | None = None, stall_s: float = 20.0
) -> list[Answer]:
    ended: list[int] = []
    prompts: Sequence[Sequence[int]] = [[number, 7, 7] for number in range(requests)]
    endpoint = Endpoint(server.url, "scripted", key)
    answers = asyncio.run(load(endpoint, prompts, TOKENS, concurrency, stall_s, lambda: ended.append(1)))
    assert len(ended) == requests
    return answers


@pytest.mark.parametrize("manner", ["whole", "torn", "no usage", "odd usage", "opening event", "null choices"])
def test_a_whole_answer_has_all_its_tokens_however_they_are_cut(manner: Manner) -> None:
    with scripted(manner) as server:
        (answer,) = ask(server, 1)
    assert (answer.error, answer.output_tokens, len(answer.arrivals)) == (None, TOKENS, TOKENS)
    assert (answer.input_tokens, answer.counted_by) == ((None, "events") if "usage" in manner else (3, "usage"))
    assert list(answer.arrivals) == sorted(answer.arrivals)
    assert 0 < answer.arrivals[0] <= answer.arrivals[-1] <= answer.ended - answer.started


@pytest.mark.parametrize(
    ("manner", "error", "arrived"),
    [
        ("stall", "timeout", 2),
        ("pings only", "timeout", 2),
        ("drop", "stream dropped", 2),
        ("no done", "stream dropped", TOKENS),
        ("429", "HTTP 429", 0),
        ("500", "HTTP 500", 0),
        ("garbage", "malformed event", 2),
        ("list", "malformed event", 2),
        ("error", "error event", 2),
        ("endless line", "malformed event", 2),
        ("deep", "malformed event", 2),
        ("huge usage", "malformed event", TOKENS),
        ("half a pair", "error event", 2),
        ("short", "too few tokens", TOKENS - 1),
        ("mute", "no text", 0),
    ],
)
def test_what_goes_wrong_is_an_error_of_that_request_alone(manner: Manner, error: str, arrived: int) -> None:
    with scripted("whole", manner, "whole") as server:
        before, wrong, after = ask(server, 3, stall_s=1.0 if error == "timeout" else 20.0)
    assert (before.error, after.error) == (None, None)
    assert (wrong.error, len(wrong.arrivals)) == (error, arrived)
    assert "\ud800" not in wrong.detail


@pytest.mark.parametrize("manner", ["one event", "one write"])
def test_an_answer_that_comes_at_once_is_buffered(manner: Manner) -> None:
    with scripted(manner) as server:
        (answer,) = ask(server, 1)
    assert (answer.error, answer.output_tokens, answer.is_buffered) == (None, TOKENS, True)


@pytest.mark.parametrize("refused", ["ignore_eos", "min_tokens", "stream_options", "list"])
def test_a_server_that_refuses_what_not_all_take_answers_a_text(refused: str) -> None:
    """A list is a prompt of token ids. The answer ends where the model ends it, and is whole."""
    with scripted("whole") as server:
        server.refuses = (refused,)
        (ids,) = ask(server, 1)
        (text,) = asyncio.run(load(Endpoint(server.url, "scripted"), ["a b c"], TOKENS, 1, 20.0, lambda: None))
    assert (ids.error, ids.detail) == ("HTTP 400", f'{{"error": "{refused} is not taken"}}')
    assert (text.error, text.text, text.counted_by) == (None, " a" * (TOKENS - 2), "events")


def test_nothing_listens() -> None:
    with scripted("whole") as server:
        pass
    (answer,) = ask(server, 1)
    assert answer.error == "no connection"
    with pytest.raises(InputError, match="no server answers at"):
        asyncio.run(models(server.url, None, 2.0))


def test_so_many_requests_are_open_and_no_more() -> None:
    with scripted("whole") as server:
        assert [answer.error for answer in ask(server, 12, concurrency=4)] == [None] * 12
    assert server.most_open == 4
    assert sorted(request["prompt"][0] for request in server.requests) == list(range(12))


def test_it_asks_for_a_fixed_length_and_sends_the_key() -> None:
    with scripted("whole") as server:
        ask(server, 1, key="secret")
        assert asyncio.run(models(server.url, "secret", 2.0)) == ["scripted"]
    (request,) = server.requests
    assert (request["max_tokens"], request["min_tokens"]) == (5, 5)
    assert request["ignore_eos"] is True and request["stream"] is True
    assert server.keys == ["Bearer secret"]


def test_a_key_that_a_server_repeats_is_not_kept() -> None:
    with scripted("429") as server:
        (answer,) = ask(server, 1, key="secret")
    assert answer.error == "HTTP 429"
    assert "busy, Bearer ***" in answer.detail and "secret" not in answer.detail


def test_what_is_no_list_of_models() -> None:
    with scripted("whole") as server, pytest.raises(InputError, match="answered HTTP 404"):
        asyncio.run(models(server.url.removesuffix("/v1"), None, 2.0))


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ("[" * 200_000, "is no list of models; the URL must be"),
        ('{"data": [{"id": "a\\ud800"}]}', r"names a model 'a\\ud800', expected printable text"),
        ('{"data": [{"id": "a\\u001b[2J"}]}', r"names a model 'a\\x1b\[2J', expected printable text"),
    ],
)
def test_an_odd_list_of_models_is_refused(listed: str, words: str) -> None:
    with scripted("whole") as server, pytest.raises(InputError, match=words):
        server.listed = listed
        asyncio.run(models(server.url, None, 2.0))


@pytest.mark.parametrize("key", ["secret\n", "secret\udcff"])
def test_a_key_that_no_header_takes_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(InputError, match=r"^OPENAI_API_KEY holds a line end") as caught:
        Endpoint("http://127.0.0.1:1/v1", "scripted", key)
    assert "secret" not in str(caught.value)
