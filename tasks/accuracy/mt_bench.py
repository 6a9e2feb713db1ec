"""MT-Bench: models answer questions of two turns in a chat, a judge behind an OpenAI HTTP API rates each answer.

In: questions, and the judge's URL, model and key (environment). Out: the mean rating of each question's turns, over 10.
"""

import asyncio
import os
from collections.abc import Sequence

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from storage.accuracy import RATING
from storage.accuracy_sections import MtBench
from storage.code_digest import code_digest
from storage.files import InputError, digest_of
from tasks.accuracy.models import Keep, PlannedBenchmark
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


def planned_mt_bench(settings: MtBench, seed: int) -> PlannedBenchmark:
    """Read the questions; the judge is asked for a first rating before a model answers, so that a wrong URL shows soon.

    Raises:
        InputError: the file cannot be used; of asking: the judge does not answer, or rates nothing.
    """
    questions = _questions(settings)
    judge = Endpoint(settings.judge_url.rstrip("/"), settings.judge_model, os.environ.get(_KEY))
    asked = digest_of([[question.category, question.turns, question.reference] for question in questions])

    def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, keep: Keep) -> Answers:
        def answers() -> dict[str, list[list[str]]]:
            _ratings(judge, [judge_prompt(questions[0], questions[0].turns[:1])], 1)
            shown = tqdm(questions, desc=NAME, unit="question", disable=None)
            return {
                "texts": [
                    _answers(model, tokenizer, question, settings.max_tokens, seed + index)
                    for index, question in enumerate(shown)
                ]
            }

        prompts = [
            judge_prompt(question, texts[: turn + 1])
            for question, texts in zip(questions, keep("answers", answers)["texts"], strict=True)
            for turn in range(len(texts))
        ]
        ratings = iter(_ratings(judge, prompts, settings.requests_at_once))
        means = [sum(next(ratings) for _ in question.turns) / len(question.turns) for question in questions]
        return Answers(asked, tuple(mean / HIGHEST for mean in means), (0.0,) * len(means))

    code = code_digest("tasks.accuracy.mt_bench:planned_mt_bench")
    asking = settings.model_dump(exclude={"path", "requests_at_once"})
    return PlannedBenchmark(
        benchmark=Benchmark(NAME, RATING, f"judged by {settings.judge_model}", settings.limit),
        key={"questions": asked, "asking": asking, "seed": seed, "code": code},
        ask=ask,
        chat=True,
    )


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
        left = [index for index in range(len(prompts)) if index not in ratings]
        said = asyncio.run(replies(judge, [prompts[index] for index in left], requests_at_once)) if left else []
        for index, reply in zip(left, said, strict=True):
            if (number := rating(reply)) is not None:
                ratings[index] = number
    if len(ratings) < len(prompts):
        raise InputError(
            f"the judge {judge.model} at {judge.url} gave no rating of the form [[5]] for "
            f"{len(prompts) - len(ratings)} of {len(prompts)} answers, asked {_ROUNDS} times; name a stronger judge in "
            "measure_accuracy.mt_bench"
        )
    return [ratings[index] for index in range(len(prompts))]
