"""MT-Bench against a stand-in judge: what a model says is rated, and the mean of the ratings comes out."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.accuracy_sections import MtBench
from storage.files import InputError, digest_of
from storage.paths import Paths
from tasks.accuracy import mt_bench
from tasks.accuracy.models import Keep
from tasks.accuracy.mt_bench import planned_mt_bench
from tests.judge_server import Judge, judging

ROWS = [
    {"category": "writing", "turns": ["write a poem", "now shorter"], "reference": []},
    {"category": "math", "turns": ["what is 1 + 1?", "and one more?"], "reference": ["2", "3"]},
]


class _Chat:
    """A tokenizer whose tokens are the characters of a chat, by their code."""

    def apply_chat_template(self, chat: Sequence[dict[str, str]], **_: Any) -> str:
        return "\n".join(f"{message['role']}: {message['content']}" for message in chat)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def planned(judge: Judge, folder: Path) -> Any:
    path = folder / "questions.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    settings = {"path": str(path), "judge_url": judge.url, "judge_model": "stand-in", "requests_at_once": 1}
    return planned_mt_bench(MtBench.model_validate(settings), 0, Paths(folder / "artifacts"))


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant a model: it answers with the number of questions that it has heard."""

    def answer(_: Any, __: Any, prompt: Sequence[int], *___: Any) -> list[str]:
        return [f"answer {''.join(map(chr, prompt)).count('user:')}"]

    monkeypatch.setattr(mt_bench, "continuations", answer)


def test_a_questions_score_is_the_mean_rating_of_its_turns(
    tmp_path: Path, echo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge gives 8 to first answers and 5 to second ones, 2 where it was shown the truth."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")

    def rate(prompt: str) -> str:
        return f"Rating: [[{2 if 'Reference' in prompt else 5 if 'answer 2' in prompt else 8}]]"

    with judging(rate) as judge:
        benchmark = planned(judge, tmp_path)
        answers = benchmark.ask(None, _Chat(), lambda _, make: dict(make()))
    assert answers.scores == (pytest.approx((8 + 5) / 20), pytest.approx(0.2))
    assert (benchmark.benchmark.metric, benchmark.chat) == ("rating", True)
    assert set(judge.keys) == {"Bearer secret"}
    assert any("now shorter" in prompt and "answer 1" in prompt and "answer 2" in prompt for prompt in judge.prompts)


def test_a_reply_without_a_rating_is_asked_for_again(tmp_path: Path, echo: None) -> None:
    replies = itertools.chain(["[[4]]", "no idea"], itertools.repeat("[[6]]"))
    with judging(lambda _: next(replies)) as judge:
        answers = planned(judge, tmp_path).ask(None, _Chat(), lambda _, make: dict(make()))
    assert answers.scores == (0.6, 0.6)
    assert len(judge.requests) == 1 + 4 + 1, "one before the model answers, four answers, one again"


def test_a_judge_that_cannot_rate_is_found_when_planning(tmp_path: Path) -> None:
    with judging(lambda _: "lovely") as judge, pytest.raises(InputError, match="gave no rating"):
        planned(judge, tmp_path)
    with judging(lambda _: 401) as judge, pytest.raises(InputError, match="OPENAI_API_KEY"):
        planned(judge, tmp_path)
    with judging(lambda _: "[[3]]") as judge:
        assert planned(judge, tmp_path).key == planned(judge, tmp_path).key
    assert len(judge.requests) == 1, "the first rating is kept"


def keeping() -> Keep:
    """Return a memory that keeps parts under their keys."""
    parts: dict[str, dict[str, Any]] = {}

    def keep(part: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        name = digest_of(part)
        if name not in parts:
            parts[name] = dict(make())
        return parts[name]

    return keep


def test_what_was_answered_and_rated_is_kept_when_the_judge_fails(
    tmp_path: Path, echo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge fails in the second of two batches; the next try asks it for these alone, and no model."""
    monkeypatch.setattr(mt_bench, "_BATCH", 2)
    keep = keeping()
    replies: Iterator[str] = itertools.chain(["[[4]]"] * 3, itertools.repeat("nothing"))
    with judging(lambda _: next(replies)) as judge:
        with pytest.raises(InputError, match="gave no rating"):
            planned(judge, tmp_path).ask(None, _Chat(), keep)
        before, replies = len(judge.requests), itertools.repeat("[[9]]")
        assert planned(judge, tmp_path).ask(None, None, keep).scores == (0.4, 0.9)
    assert len(judge.requests) == before + 2


def test_another_judge_rates_the_same_answers(tmp_path: Path, echo: None) -> None:
    """The second judge's model is None: it is not asked."""
    keep = keeping()
    with judging(lambda _: "[[4]]") as first, judging(lambda _: "[[9]]") as second:
        assert planned(first, tmp_path).ask(None, _Chat(), keep).scores == (0.4, 0.4)
        assert planned(second, tmp_path).ask(None, None, keep).scores == (0.9, 0.9)
    assert len(second.requests) == 1 + 4
