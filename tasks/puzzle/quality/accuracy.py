"""Accuracy of parent and children on the same questions: means, paired differences, and a table for people.

In: right or wrong for each question and model. Out: accuracies with standard errors, and "accuracy preserved", which is
child / parent (the 51B's announcement). That ratio says nothing where the parent itself guesses, and is left out there.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

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
    """One model's answers to the questions of a task, a value for each question.

    question_ids: identifies the question and the prompt around it.
    right: 1.0 or 0.0.
    chance: a guesser's accuracy, 1 / number of choices.
    """

    question_ids: tuple[str, ...]
    right: tuple[float, ...]
    chance: tuple[float, ...]


@dataclass(frozen=True)
class ModelAccuracy:
    """Share of questions that a model answers right, and its standard error."""

    accuracy: float
    stderr: float


@dataclass(frozen=True)
class ChildAccuracy(ModelAccuracy):
    """A child's accuracy beside the parent's on the same questions, each value with its standard error.

    difference: child - parent.
    accuracy_preserved: child / parent; None where the parent's accuracy is at chance.
    """

    difference: float
    difference_stderr: float
    accuracy_preserved: float | None
    accuracy_preserved_stderr: float | None


@dataclass(frozen=True)
class Comparison:
    """Accuracy of parent and children on one task.

    questions: number of questions.
    question_digest: digest of the questions and the prompts around them.
    chance: a guesser's accuracy.
    parent_at_chance: whether the parent is not 2 standard errors of a guesser's accuracy above `chance`.
    parent: the parent's accuracy.
    children: the children's accuracy by name.
    """

    questions: int
    question_digest: str
    chance: float
    parent_at_chance: bool
    parent: ModelAccuracy
    children: Mapping[str, ChildAccuracy]

    def to_json(self) -> dict[str, object]:
        """Return the comparison's fields in accuracy.json; the digest of the questions is called `asked` there."""
        models = {PARENT: self.parent, **self.children}
        return {
            "questions": self.questions,
            "asked": self.question_digest,
            "chance": self.chance,
            "parent_at_chance": self.parent_at_chance,
            "models": {name: asdict(accuracy) for name, accuracy in models.items()},
        }


@dataclass(frozen=True)
class TaskAccuracy:
    """A task by its name and metric, and how parent and children did on it."""

    name: str
    metric: str
    comparison: Comparison


def compare(models: Mapping[str, Answers]) -> Comparison:
    """Compare children with the parent on one task.

    Args:
        models: answers by the model's name; the first is PARENT, and all are to the same questions, at least 2.
    """
    parent = models[PARENT]
    for answers in models.values():
        assert answers.question_ids == parent.question_ids, "models were asked different questions"
    count, chance = len(parent.right), statistics.fmean(parent.chance)
    guesser_stderr = math.sqrt(sum(p * (1 - p) for p in parent.chance)) / count
    accuracy, stderr = mean_and_stderr(parent.right)
    at_chance = accuracy - chance <= _ABOVE_CHANCE * guesser_stderr
    return Comparison(
        questions=count,
        question_digest=digest_of(list(parent.question_ids)),
        chance=chance,
        parent_at_chance=at_chance,
        parent=ModelAccuracy(accuracy, stderr),
        children={
            name: _child_accuracy(parent, answers, at_chance) for name, answers in models.items() if name != PARENT
        },
    )


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Compute the mean and its standard error as lm-eval does: sample standard deviation / sqrt(number)."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def _child_accuracy(parent: Answers, child: Answers, at_chance: bool) -> ChildAccuracy:
    """Compare on the same questions; the ratio's standard error comes by linearisation (delta method)."""
    accuracy, stderr = mean_and_stderr(child.right)
    pairs = list(zip(child.right, parent.right, strict=True))
    difference, difference_stderr = mean_and_stderr([mine - theirs for mine, theirs in pairs])
    if at_chance:
        return ChildAccuracy(accuracy, stderr, difference, difference_stderr, None, None)
    parent_accuracy = statistics.fmean(parent.right)
    ratio = accuracy / parent_accuracy
    _, residual_stderr = mean_and_stderr([mine - ratio * theirs for mine, theirs in pairs])
    return ChildAccuracy(accuracy, stderr, difference, difference_stderr, ratio, residual_stderr / parent_accuracy)


def accuracy_table(target: str, tasks: Sequence[TaskAccuracy], measured_with: str) -> str:
    """Format the accuracy on at least one task for people, at most 100 columns; percent, ± one standard error."""
    lines = [f"{target:<16} {'accuracy, %':>14} {'child - parent':>16} {'accuracy preserved, %':>23}"]
    for task in tasks:
        comparison = task.comparison
        chance = f"chance {100 * comparison.chance:.1f} %"
        lines.append(f"{task.name}: {comparison.questions} questions, {task.metric}, {chance}")
        lines.append(_parent_row(comparison))
        lines += [_child_row(name, child) for name, child in comparison.children.items()]
    lines.append(f"measured with {measured_with}; ± one standard error, same questions")
    return "\n".join([*lines, ""])


def _parent_row(comparison: Comparison) -> str:
    row = _model_row(PARENT, comparison.parent)
    return row + ("   at chance: nothing to preserve" if comparison.parent_at_chance else "")


def _child_row(name: str, child: ChildAccuracy) -> str:
    preserved = "-"
    if child.accuracy_preserved is not None and child.accuracy_preserved_stderr is not None:
        preserved = _percent(child.accuracy_preserved, child.accuracy_preserved_stderr)
    difference = _percent(child.difference, child.difference_stderr, "+")
    return f"{_model_row(name, child)} {difference:>16} {preserved:>23}"


def _model_row(name: str, model: ModelAccuracy) -> str:
    return f"  {name:<14} {_percent(model.accuracy, model.stderr):>14}"


def _percent(value: float, stderr: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f} ± {100 * stderr:.1f}"
