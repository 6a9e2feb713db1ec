"""Accuracy of parent and children on the same questions: means, paired differences, what is preserved, a table.

"Accuracy preserved" = child / parent (the 51B's announcement). It says nothing where the parent itself guesses, so it
is left out there.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storage.files import digest_of

PARENT = "parent"
_ABOVE_CHANCE = 2.0
"""Standard errors by which a parent must beat a guesser."""


@dataclass(frozen=True)
class Question:
    """A multiple-choice question: the model reads `prompt`, a space and a choice; `answer` is the right one's index."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Answers:
    """One model's answers to a task, a value per question.

    `asked` identifies the question and the prompt around it; `right` is 1.0 or 0.0; `chance` is 1 / number of choices.
    """

    asked: tuple[str, ...]
    right: tuple[float, ...]
    chance: tuple[float, ...]


def compare(models: Mapping[str, Answers]) -> dict[str, Any]:
    """Compare children with the parent on one task.

    Args:
        models: answers by name of the model; PARENT is one of them, and all were asked the same, at least 2 questions.

    Returns:
        questions, asked (digest of questions and prompts), chance (a guesser's accuracy), parent_at_chance, and
        `models`: accuracy and stderr of each; of children also difference (child - parent on the same questions) and
        accuracy_preserved (child / parent), each with its standard error. accuracy_preserved is None where the parent
        is not 2 standard errors of a guesser's accuracy above chance.
    """
    parent = models[PARENT]
    for answers in models.values():
        assert answers.asked == parent.asked, "models were asked different questions"
    count, chance = len(parent.right), statistics.fmean(parent.chance)
    guesser_stderr = math.sqrt(sum(p * (1 - p) for p in parent.chance)) / count
    accuracy, _ = mean_and_stderr(parent.right)
    at_chance = accuracy - chance <= _ABOVE_CHANCE * guesser_stderr
    return {
        "questions": count,
        "asked": digest_of(list(parent.asked)),
        "chance": chance,
        "parent_at_chance": at_chance,
        "models": {
            name: _accuracy(one) | ({} if name == PARENT else _against(parent, one, at_chance))
            for name, one in models.items()
        },
    }


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, as lm-eval computes them: sample standard deviation / sqrt(number)."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def _accuracy(answers: Answers) -> dict[str, float]:
    accuracy, stderr = mean_and_stderr(answers.right)
    return {"accuracy": accuracy, "stderr": stderr}


def _against(parent: Answers, child: Answers, at_chance: bool) -> dict[str, float | None]:
    """Difference and ratio on the same questions; the ratio's standard error by linearisation (delta method)."""
    pairs = list(zip(child.right, parent.right, strict=True))
    difference, difference_stderr = mean_and_stderr([mine - theirs for mine, theirs in pairs])
    found: dict[str, float | None] = {"difference": difference, "difference_stderr": difference_stderr}
    if at_chance:
        return {**found, "accuracy_preserved": None, "accuracy_preserved_stderr": None}
    accuracy = statistics.fmean(parent.right)
    ratio = statistics.fmean(child.right) / accuracy
    _, residual_stderr = mean_and_stderr([mine - ratio * theirs for mine, theirs in pairs])
    return {**found, "accuracy_preserved": ratio, "accuracy_preserved_stderr": residual_stderr / accuracy}


def accuracy_table(accuracy: Mapping[str, Any]) -> str:
    """accuracy.json for people, at most 100 columns; percent, ± one standard error."""
    if not accuracy["tasks"]:
        return f"{accuracy['target']}: {accuracy['note']}\n"
    lines = [f"{accuracy['target']:<16} {'accuracy, %':>14} {'child - parent':>16} {'accuracy preserved, %':>23}"]
    for task in accuracy["tasks"]:
        chance = f"chance {100 * task['chance']:.1f} %"
        lines.append(f"{task['name']}: {task['questions']} questions, {task['metric']}, {chance}")
        lines += [_row(name, model, task["parent_at_chance"]) for name, model in task["models"].items()]
    lines.append(f"measured with {accuracy['harness']}, {accuracy['dtype']}; ± one standard error, same questions")
    return "\n".join([*lines, ""])


def _row(name: str, model: Mapping[str, float | None], at_chance: bool) -> str:
    row = f"  {name:<14} {_percent(model['accuracy'], model['stderr']):>14}"
    if name == PARENT:
        return row + ("   at chance: nothing to preserve" if at_chance else "")
    preserved = "-" if at_chance else _percent(model["accuracy_preserved"], model["accuracy_preserved_stderr"])
    return f"{row} {_percent(model['difference'], model['difference_stderr'], '+'):>16} {preserved:>23}"


def _percent(value: float | None, stderr: float | None, sign: str = "") -> str:
    assert value is not None
    assert stderr is not None
    return f"{100 * value:{sign}.1f} ± {100 * stderr:.1f}"
