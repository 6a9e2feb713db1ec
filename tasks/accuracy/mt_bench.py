"""MT-Bench: models answer questions of two turns in a chat, a judge behind an OpenAI HTTP API rates each answer.

In: questions, and the judge's URL, model and key (environment). Out: the mean rating of each question's turns, over 10.
"""

import asyncio
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from storage.accuracy import RATING
from storage.accuracy_sections import MtBench
from storage.code_digest import code_digest
from storage.files import InputError, digest_of
from storage.paths import Paths
from tasks.accuracy.models import Keep, PlannedBenchmark, remembered
from tasks.accuracy.questions import read_rows
from tasks.accuracy.writing import continuations
from tasks.engines.client import Endpoint
from tasks.engines.judge import replies
from tasks.puzzle.model.writing import Drawing
from tasks.puzzle.quality.accuracy import Answers, Benchmark
from tasks.puzzle.quality.mt_bench import HIGHEST, Question, judge_prompt, rating

NAME = "MT-Bench"
_KEY = "OPENAI_API_KEY"
_ROUNDS = 3
"""Times that a judge is asked for a rating that its reply lacks."""
_BATCH = 20
"""Fewest ratings that are kept together: what a judge that fails later does not take along."""


def planned_mt_bench(settings: MtBench, seed: int, paths: Paths) -> PlannedBenchmark:
    """Read the questions, and have the judge give a first rating, unless it once did: a wrong URL shows before a model
    answers.

    Raises:
        InputError: the file cannot be used, the judge does not answer, or it rates nothing.
    """
    questions = _questions(settings)
    judge = Endpoint(settings.judge_url.rstrip("/"), settings.judge_model, os.environ.get(_KEY))
    questions_digest = digest_of([[question.category, question.turns, question.reference] for question in questions])
    first = [judge_prompt(questions[0], questions[0].turns[:1])]
    remembered(paths, _ratings_key(judge, first), lambda: {"ratings": _ratings(judge, first, 1)})

    def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, keep: Keep) -> Answers:
        def texts() -> dict[str, list[list[str]]]:
            progress = tqdm(questions, desc=NAME, unit="question", disable=None)
            answers = [
                _answers(model, tokenizer, question, settings.max_tokens, seed + index)
                for index, question in enumerate(progress)
            ]
            return {"texts": answers}

        answers_key = {
            "part": f"{NAME}, answers",
            "max_tokens": settings.max_tokens,
            "seed": seed,
            "questions": questions_digest,
        }
        answers = keep({**answers_key, "code": code_digest("tasks.accuracy.mt_bench:_answers")}, texts)["texts"]
        prompts = [
            judge_prompt(question, turn_answers[: turn + 1])
            for question, turn_answers in zip(questions, answers, strict=True)
            for turn in range(len(turn_answers))
        ]
        ratings = iter(_kept_ratings(judge, prompts, settings.requests_at_once, keep))
        means = [sum(next(ratings) for _ in question.turns) / len(question.turns) for question in questions]
        return Answers(questions_digest, tuple(mean / HIGHEST for mean in means), (0.0,) * len(means))

    code = code_digest("tasks.accuracy.mt_bench:planned_mt_bench")
    asking = settings.model_dump(exclude={"path", "requests_at_once"})
    return PlannedBenchmark(
        benchmark=Benchmark(NAME, RATING, f"judged by {settings.judge_model}", settings.limit),
        key={"questions": questions_digest, "asking": asking, "seed": seed, "code": code},
        ask=ask,
        chat=True,
    )


def _ratings_key(judge: Endpoint, prompts: Sequence[str]) -> Mapping[str, Any]:
    code = code_digest("tasks.accuracy.mt_bench:_ratings")
    return {"part": f"{NAME}, ratings", "judge": [judge.url, judge.model], "prompts": digest_of(prompts), "code": code}


def _kept_ratings(judge: Endpoint, prompts: Sequence[str], requests_at_once: int, keep: Keep) -> list[float]:
    """Have the judge rate all answers, and keep its ratings batch by batch."""

    def rated(batch: Sequence[str]) -> list[float]:
        record = keep(_ratings_key(judge, batch), lambda: {"ratings": _ratings(judge, batch, requests_at_once)})
        ratings: list[float] = record["ratings"]
        return ratings

    size = max(_BATCH, requests_at_once)
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    return list(itertools.chain.from_iterable(map(rated, batches)))


def _questions(settings: MtBench) -> list[Question]:
    used_by = "measure_accuracy.mt_bench.path"
    rows = read_rows(settings.path, ("turns", "category"), used_by)[: settings.limit]
    if len(rows) < 2 or not all(isinstance(row["turns"], list) and row["turns"] for row in rows):
        raise InputError(f"{settings.path}: expected at least 2 rows with a list of texts in `turns`; see {used_by}")
    return [Question(str(row["category"]), tuple(row["turns"]), tuple(row.get("reference") or ())) for row in rows]


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: Question, max_tokens: int, seed: int
) -> list[str]:
    """Answer the turns of a question one after the other."""
    chat: list[dict[str, str]] = []
    for turn in question.turns:
        chat.append({"role": "user", "content": turn})
        text = str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        drawing = Drawing(question.temperature, 1.0)
        (answer,) = continuations(model, tokenizer, prompt, drawing, max_tokens, [1], seed)
        chat.append({"role": "assistant", "content": answer})
    return [message["content"] for message in chat if message["role"] == "assistant"]


def _ratings(judge: Endpoint, prompts: Sequence[str], requests_at_once: int) -> list[float]:
    """Have the judge rate all answers; replies without a rating are asked for again.

    Raises:
        InputError: the judge does not answer, or gives no rating in three replies.
    """
    ratings: dict[int, float] = {}
    for _ in range(_ROUNDS):
        unrated = [index for index in range(len(prompts)) if index not in ratings]
        judge_replies = (
            asyncio.run(replies(judge, [prompts[index] for index in unrated], requests_at_once)) if unrated else []
        )
        for index, reply in zip(unrated, judge_replies, strict=True):
            if (number := rating(reply)) is not None:
                ratings[index] = number
    if len(ratings) < len(prompts):
        raise InputError(
            f"the judge {judge.model} at {judge.url} gave no rating of the form [[5]] for "
            f"{len(prompts) - len(ratings)} of {len(prompts)} answers, asked {_ROUNDS} times; name a stronger judge in "
            "measure_accuracy.mt_bench"
        )
    return [ratings[index] for index in range(len(prompts))]
