"""Accuracy of parent and children on the same questions: means, paired differences, and what is preserved.

In: a number for each question and model. Out: accuracies with standard errors, and "accuracy preserved", which is
child / parent (the 51B's announcement). That ratio says nothing where the parent itself guesses, and is left out there;
where guessing is worth something, the share of the accuracy above chance says more.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from storage.accuracy import RATING, BenchmarkAccuracy, ChildAccuracy, CombinedQuality, Estimate

PARENT = "parent"
MMLU = "mmlu"
"""The benchmark's name where the announcement's figure takes it."""
_ABOVE_CHANCE = 2.0
"""Standard errors by which a parent must beat a guesser."""


@dataclass(frozen=True)
class Answers:
    """One model's answers to the questions of a benchmark.

    Attributes:
        questions_digest: digest of the questions and the prompts around them.
        scores: a number of 0 .. 1 for each question: right or wrong, or a share.
        chance: a guesser's expected score of each question.
    """

    questions_digest: str
    scores: tuple[float, ...]
    chance: tuple[float, ...]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as tables name it: its metric, the version of the task and of what asked it, and a limit."""

    name: str
    metric: str
    version: str
    limit: int | None


def compare(benchmark: Benchmark, models: Mapping[str, Answers]) -> BenchmarkAccuracy:
    """Compare children with the parent on one benchmark.

    Args:
        benchmark: what was asked.
        models: answers by the model's name; the first is PARENT, and all are to the same questions, at least 2.
    """
    parent = models[PARENT]
    for answers in models.values():
        assert answers.questions_digest == parent.questions_digest, "models were asked different questions"
    count, chance = len(parent.scores), statistics.fmean(parent.chance)
    guesser_stderr = math.sqrt(sum(p * (1 - p) for p in parent.chance)) / count
    accuracy = estimate(parent.scores)
    at_chance = accuracy.mean - chance <= _ABOVE_CHANCE * max(guesser_stderr, accuracy.stderr)
    return BenchmarkAccuracy(
        name=benchmark.name,
        metric=benchmark.metric,
        version=benchmark.version,
        limit=benchmark.limit,
        questions=count,
        questions_digest=parent.questions_digest,
        chance=chance,
        parent_at_chance=at_chance,
        parent=accuracy,
        children={
            name: _child_accuracy(parent, answers, chance, at_chance)
            for name, answers in models.items()
            if name != PARENT
        },
    )


def estimate(values: Sequence[float]) -> Estimate:
    """Compute the mean and its standard error as lm-eval does: sample standard deviation / sqrt(number)."""
    return Estimate(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)))


def _child_accuracy(parent: Answers, child: Answers, chance: float, at_chance: bool) -> ChildAccuracy:
    pairs = list(zip(child.scores, parent.scores, strict=True))
    return ChildAccuracy(
        accuracy=estimate(child.scores),
        difference=estimate([mine - theirs for mine, theirs in pairs]),
        preserved=None if at_chance else _ratio(pairs, 0.0),
        above_chance=None if at_chance or chance == 0 else _ratio(pairs, chance),
    )


def _ratio(pairs: Sequence[tuple[float, float]], floor: float) -> Estimate:
    """Divide the means of child and parent above `floor`; the standard error comes by linearisation (delta method)."""
    above = statistics.fmean(theirs for _, theirs in pairs) - floor
    ratio = (statistics.fmean(mine for mine, _ in pairs) - floor) / above
    residual = estimate([(mine - floor) - ratio * (theirs - floor) for mine, theirs in pairs])
    return Estimate(ratio, residual.stderr / above)


def combine(benchmarks: Sequence[BenchmarkAccuracy]) -> CombinedQuality | None:
    """Compute (10 x MT-Bench + MMLU) / 2 as a share of 1; None where one of the two was not measured."""
    ratings = [benchmark for benchmark in benchmarks if benchmark.metric == RATING]
    knowledge = [benchmark for benchmark in benchmarks if benchmark.name == MMLU]
    if not ratings or not knowledge:
        return None
    bench, mmlu = ratings[0], knowledge[0]
    children = {
        name: _mean_of_two(child.accuracy, mmlu.children[name].accuracy) for name, child in bench.children.items()
    }
    return CombinedQuality(_mean_of_two(bench.parent, mmlu.parent), children)


def _mean_of_two(first: Estimate, second: Estimate) -> Estimate:
    """Average two estimates from different questions."""
    return Estimate((first.mean + second.mean) / 2, math.hypot(first.stderr, second.stderr) / 2)
