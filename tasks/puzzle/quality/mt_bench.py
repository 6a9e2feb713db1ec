"""What MT-Bench asks a judge (Zheng et al. 2023, arXiv 2306.05685, single-answer grading), and the rating in its reply.

The words follow FastChat's judge prompts (Apache-2.0), in one form for both turns.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

HIGHEST = 10
_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
_INSTRUCTION = (
    "Please act as an impartial judge and evaluate the quality of the response provided by an AI assistant to the user "
    "question displayed below. {criteria} {focus}Begin your evaluation by providing a short explanation. Be as "
    "objective as possible. After providing your explanation, you must rate the response on a scale of 1 to 10 by "
    'strictly following this format: "[[rating]]", for example: "Rating: [[5]]".'
)
_QUALITY = (
    "Your evaluation should consider factors such as the helpfulness, relevance, accuracy, depth, creativity, and "
    "level of detail of the response."
)
_CORRECTNESS = (
    "Your evaluation should consider correctness and helpfulness. You will be given a reference answer and the "
    "assistant's answer. Compare the assistant's answer with the reference answer; identify and correct any mistakes."
)
_FOCUS = "Your evaluation should focus on the assistant's answer to the last user question. "

_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}


@dataclass(frozen=True)
class Question:
    """A question of several turns; `reference` has the right answers, or none."""

    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...]

    @property
    def temperature(self) -> float:
        """Return the temperature of the answers: FastChat's for the category, 0 where one answer is right."""
        return _TEMPERATURES.get(self.category, 0.0)


def judge_prompt(question: Question, answers: Sequence[str]) -> str:
    """Ask for a rating of the last of `answers`, those to the first turns of a question."""
    count = len(answers)
    with_reference = len(question.reference) >= count
    criteria = _CORRECTNESS if with_reference else _QUALITY
    parts = [_INSTRUCTION.format(criteria=criteria, focus=_FOCUS if count > 1 else "")]
    if with_reference:
        parts.append(_conversation("Reference Answer", "Reference answer", question.turns, question.reference[:count]))
    parts.append(_conversation("Assistant's Conversation with User", "Assistant", question.turns, answers))
    return "\n\n".join(parts)


def _conversation(title: str, speaker: str, turns: Sequence[str], answers: Sequence[str]) -> str:
    messages = [f"### User:\n{turn}\n\n### {speaker}:\n{answer}" for turn, answer in zip(turns, answers, strict=False)]
    return "\n\n".join([f"<|The Start of {title}|>", *messages, f"<|The End of {title}|>"])


def rating(reply: str) -> float | None:
    """Read the rating in a judge's reply, from 1 to 10; None where there is none."""
    match = _RATING.search(reply)
    number = float(match[1]) if match else None
    return number if number is not None and 1 <= number <= HIGHEST else None
