"""The search over a block library that others published: no weights, no parent, one JSON object as the answer.

In: a library's file (storage/published_library.py), limits on sums of its stats, the metric to minimise. Out: the
answer that `puzzle search --block-library` prints.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from storage.files import InputError, did_you_mean
from storage.published_library import PublishedVariant, read_published_library
from tasks.puzzle.search.best_child import ONE_POINT, BestChild, alternatives, best_child
from tasks.puzzle.search.infeasible import InfeasibleError
from tasks.puzzle.search.mip import SolverSettings, Status
from tasks.puzzle.search.problem import Choice, Limit, Problem


@dataclass(frozen=True)
class PublishedLibraryQuery:
    """The metric whose sum is to be least, upper limits by stat, and how many alternatives that differ how far."""

    metric: str
    limits: Mapping[str, float]
    alternatives: int = 0
    min_distance: float = 0.2


class LimitAnswer(TypedDict):
    """The choice's use of a limit, in the stat's unit; `slack` and `price` are those of a LimitUse."""

    limit: float
    reached: float
    slack: float
    price: float


class ChoiceAnswer(TypedDict):
    """A choice for every layer with its proof.

    `totals` are by stat, `choices` by layer; `binding` names the limits that have a price.
    """

    status: Status
    metric: str
    objective: float
    bound: float
    gap: float
    seconds: float
    totals: dict[str, float]
    choices: dict[str, str]
    binding: list[str]
    limits: dict[str, LimitAnswer]


class PublishedLibraryAnswer(ChoiceAnswer):
    """The best choice, and further ones that differ from it and from each other."""

    alternatives: list[ChoiceAnswer]


class ConflictAnswer(TypedDict):
    """A limit that cannot be met together with others, and the best that it could be set to with them kept."""

    limit: str
    best: float | None


class InfeasibleAnswer(TypedDict):
    """No choice keeps all limits: the message, which limits are in conflict, and the nearest that can be met."""

    status: Literal["infeasible"]
    message: str
    conflicts: list[ConflictAnswer]
    nearest: dict[str, float]


def search_published_library(
    path: Path, query: PublishedLibraryQuery, settings: SolverSettings
) -> PublishedLibraryAnswer:
    """Find the best choice for every layer.

    Raises:
        InfeasibleError: no choice keeps all limits.
        InputError: the library is wrong, or a metric or stat is not in it.
    """
    variants = read_published_library(path)
    _check_name(query.metric, variants[0].metrics, f"{path} has no metric")
    for name in query.limits:
        _check_name(name, variants[0].stats, f"{path} has no stat")
    problem = _problem(path.name, variants, query)
    best = best_child(problem, settings)
    others = alternatives(problem, settings, ONE_POINT, best, query.alternatives, query.min_distance)
    return {**_choice_answer(best, query), "alternatives": [_choice_answer(other, query) for other in others]}


def infeasible_answer(error: InfeasibleError) -> InfeasibleAnswer:
    """Return the answer where no choice keeps all limits."""
    return {
        "status": "infeasible",
        "message": str(error),
        "conflicts": [{"limit": conflict.limit.name, "best": conflict.best} for conflict in error.conflicts],
        "nearest": error.nearest,
    }


def _check_name(name: str, names: Mapping[str, float], complaint: str) -> None:
    if name not in names:
        raise InputError(f"{complaint} {name!r}{did_you_mean(name, names)} (has: {', '.join(sorted(names))})")


def _problem(
    name: str, variants: Sequence[PublishedVariant], query: PublishedLibraryQuery
) -> Problem[PublishedVariant]:
    choices = tuple(Choice(variant, variant.metrics[query.metric]) for variant in variants)
    limits = []
    for stat, upper in query.limits.items():
        coefficients = tuple(variant.stats[stat] for variant in variants)
        limits.append(Limit(stat, f"{stat} <= {upper:g}", coefficients, constant=0.0, upper=upper))
    return Problem(name, variants[-1].layer + 1, choices, tuple(limits), "--limit")


def _choice_answer(best: BestChild[PublishedVariant], query: PublishedLibraryQuery) -> ChoiceAnswer:
    solution = best.solution
    chosen = [choice.replacement for choice in solution.chosen]
    uses = [use for use in solution.uses if use.name in query.limits]
    totals = {}
    for stat in sorted(chosen[0].stats):
        totals[stat] = math.fsum(variant.stats[stat] for variant in chosen)
    return {
        "status": solution.status,
        "metric": query.metric,
        "objective": solution.objective,
        "bound": solution.bound,
        "gap": solution.gap,
        "seconds": solution.seconds,
        "totals": totals,
        "choices": {f"layer_{variant.layer}": variant.name for variant in chosen},
        "binding": [use.name for use in uses if use.binds],
        "limits": {
            use.name: {"limit": use.allowed, "reached": use.reached, "slack": use.slack, "price": use.price}
            for use in uses
        },
    }
