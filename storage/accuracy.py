"""accuracy.json: how much of the parent's accuracy a target's children keep on benchmarks. No torch.

measure_accuracy writes it; the report reads it. Accuracies are shares of 1: of questions answered right, of programs
that pass, of the summary's words, or an MT-Bench rating over 10.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from storage.files import write_sealed
from storage.json_records import read_record
from storage.paths import Paths

RATING = "rating"
"""The metric of MT-Bench: a judge's rating over 10."""


@dataclass(frozen=True)
class Estimate:
    """A number that was measured on a sample of questions, and its standard error."""

    mean: float
    stderr: float


@dataclass(frozen=True)
class ChildAccuracy:
    """A child's accuracy beside the parent's on the same questions; every error is that of paired answers.

    Attributes:
        accuracy: the child's accuracy.
        difference: child - parent.
        preserved: child / parent; None where the parent is at chance.
        above_chance: (child - chance) / (parent - chance); None where the parent is at chance, or chance is 0, where it
            would be `preserved` again.
    """

    accuracy: Estimate
    difference: Estimate
    preserved: Estimate | None
    above_chance: Estimate | None


@dataclass(frozen=True)
class BenchmarkAccuracy:
    """Accuracy of parent and children on one benchmark.

    Attributes:
        name: the benchmark's name in tables.
        metric: what is counted for each question.
        version: version of the task and of what asked it.
        limit: the first so many questions that were asked; None is all.
        questions: number of questions.
        questions_digest: digest of the questions and the prompts around them.
        chance: a guesser's accuracy.
        parent_at_chance: whether the parent is not two standard errors above `chance`.
        parent: the parent's accuracy.
        children: the children's, by state.
    """

    name: str
    metric: str
    version: str
    limit: int | None
    questions: int
    questions_digest: str
    chance: float
    parent_at_chance: bool
    parent: Estimate
    children: Mapping[str, ChildAccuracy]

    @property
    def parent_guesses(self) -> bool:
        """Tell whether the parent does no better than a guesser; where chance is 0, nobody guesses."""
        return self.parent_at_chance and self.chance > 0


@dataclass(frozen=True)
class ChildLoss:
    """A child's log-loss, nats/token, and by how much it is above the parent's; one document gives no error."""

    loss: float
    difference: float
    difference_stderr: float | None


@dataclass(frozen=True)
class PositionBucket:
    """Log-loss at positions `first` .. `end` - 1 of documents, nats/token; errors are clustered by document."""

    first: int
    end: int
    tokens: int
    documents: int
    parent: float
    children: Mapping[str, ChildLoss]


@dataclass(frozen=True)
class CombinedQuality:
    """(10 x MT-Bench + MMLU) / 2 of the announcement's figure, as a share of 1."""

    parent: Estimate
    children: Mapping[str, Estimate]


@dataclass(frozen=True)
class Accuracy:
    """The content of accuracy.json."""

    target: str
    dtype: str
    benchmarks: tuple[BenchmarkAccuracy, ...]
    combined: CombinedQuality | None
    positions: tuple[PositionBucket, ...]


def read_accuracy(target: str, paths: Paths) -> Accuracy:
    """Read the accuracy.json of a target; raises as :func:`storage.json_records.read_record`."""
    return read_record(paths.accuracy(target), Accuracy, f"dvc repro measure_accuracy@{target}")


def write_accuracy(path: Path, accuracy: Accuracy) -> None:
    """Write accuracy.json."""
    write_sealed(path, asdict(accuracy))
