"""Fifty prompts, answered greedily by llama.cpp; every step is compared with torch."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tasks.engines.llamacpp import LlamaCpp
from tasks.puzzle.model.child import DeciLMForCausalLM

LOG_PROBABILITY_ERROR = 1.3e-3
"""Error that float32 leaves: both add up the same products of 30 blocks in another order; 3e-4 is usual
(docs/runtimes.md)."""
_TOPICS = ("the sea", "prime numbers", "sourdough bread", "a bicycle", "the moon", "volcanoes", "bees", "a sonnet")
_QUESTIONS = ("Explain {} to a child.", "Write one line about {}.", "What is the history of {}?", "List facts on {}:")
_TEXTS = (
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "The capital of France is",
    "1, 2, 4, 8, 16,",
    "Dear Sir or Madam,\n\nI am writing",
    "Il était une fois, dans un",
    "SELECT name, count(*) FROM",
    "# Installation\n\n```bash\npip",
    "In 1969, the first",
    "Q: What is 12 + 30?\nA:",
    "Once upon a time there was a",
    "The quick brown fox",
    "import numpy as np\n\n",
    "Roses are red,\nviolets are",
    "日本の首都は",
    "To be, or not to be:",
    "E = mc^2 means that",
    "Ingredients:\n- 2 eggs\n-",
    "🙂 means",
)
CHATS = tuple(question.format(topic) for topic in _TOPICS for question in _QUESTIONS)
_USERS = 4


@dataclass(frozen=True)
class Parity:
    """Over all positions: the number of greedy tokens that differ, and errors of log-probabilities of the top 20.

    A greedy token counts as different where torch's two best are further apart than the tolerance allows.
    """

    positions: int
    different_tokens: int
    largest_error: float
    mean_error: float


def prompts(tokenizer: Any) -> list[list[int]]:
    """Return fifty prompts as token ids: questions in the chat template, beginnings of texts as they are."""
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": chat}], add_generation_prompt=True, tokenize=False)
        for chat in CHATS
    ]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (*chats, *_TEXTS)]
    assert len(ids) == 50
    return ids


def compare(
    path: Path,
    model: DeciLMForCausalLM,
    questions: Sequence[Sequence[int]],
    harmless: int,
    tokens: int,
    tolerance: float,
) -> Parity:
    """Answer prompts of token ids greedily in llama.cpp, as exactly as it can, and compare every step with torch.

    Args:
        path: the GGUF file, in F32 for the tolerance to mean something.
        model: the same weights in float32.
        questions: the prompts.
        harmless: a token that is a letter.
        tokens: tokens of an answer.
        tolerance: largest error of a log-probability.
    """
    engine = LlamaCpp(path, threads=2, sequences=_USERS, context=max(map(len, questions)) + tokens + 2, exact=True)

    def answer_share(slot: int) -> list[list[dict[str, Any]]]:
        return [_answer(engine, slot, prompt, harmless, tokens) for prompt in questions[slot::_USERS]]

    with ThreadPoolExecutor(_USERS) as users:
        shares = list(users.map(answer_share, range(_USERS)))
    errors, different = [], 0
    for number, prompt in enumerate(questions):
        steps = shares[number % _USERS][number // _USERS]
        tops = [step["top_logprobs"] for step in steps]
        in_torch = _in_torch(model, prompt, [top[0]["id"] for top in tops])
        for top, expected in zip(tops, in_torch, strict=True):
            different += expected.max().item() - expected[top[0]["id"]].item() > 2 * tolerance
            errors += [abs(token["logprob"] - expected[token["id"]].item()) for token in top]
    assert len(errors) == 20 * tokens * len(questions)
    return Parity(len(questions) * tokens, different, max(errors), sum(errors) / len(errors))


def _answer(engine: LlamaCpp, slot: int, prompt: Sequence[int], harmless: int, tokens: int) -> list[dict[str, Any]]:
    """Return steps of a greedy answer, a request for each.

    llama.cpp leaves out the log-probabilities of a token that ends amid a letter. So it is made to generate another
    token, `harmless`; the log-probabilities that it reports are from before that.
    """
    steps: list[dict[str, Any]] = []
    for _ in range(tokens):
        so_far = [*prompt, *(step["top_logprobs"][0]["id"] for step in steps)]
        answer = engine.complete(so_far, 1, logprobs=20, id_slot=slot, logit_bias=[[harmless, 1e4]])
        steps += answer["choices"][0]["logprobs"]["content"]
    return steps


def _in_torch(model: DeciLMForCausalLM, prompt: Sequence[int], answer: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yield log-probabilities of the vocabulary before each token of an answer."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]]), logits_to_keep=len(answer) + 1).logits[0, :-1]
    yield from torch.log_softmax(logits, -1)
