"""The search over a block library that somebody published: no weights, no parent, one JSON object as the answer.

In: a library file, limits on sums of its stats, the metric to minimise. Out: what flows/search_architecture.py prints.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.block_library import LibraryVariant, read_block_library
from storage.files import InputError
from tasks.puzzle.infeasible import InfeasibleError
from tasks.puzzle.mip import Settings
from tasks.puzzle.problem import Choice, Limit, Problem
from tasks.puzzle.search import ANYWHERE, Best, alternatives, best_child


@dataclass(frozen=True, order=True)
class Named:
    """A variant of a library, as the solver knows it."""

    layer: int
    name: str

    @property
    def parent_blocks(self) -> range:
        """Its layer."""
        return range(self.layer, self.layer + 1)


@dataclass(frozen=True)
class Wanted:
    """What to search for: upper limits by stat, the metric whose sum is least, how many alternatives that differ."""

    metric: str
    limits: Mapping[str, float]
    alternatives: int = 0
    min_distance: float = 0.2


def search_library(path: Path, wanted: Wanted, settings: Settings) -> tuple[dict[str, Any], InfeasibleError | None]:
    """The best choice for every layer, as one JSON object.

    Returns:
        status, objective, bound, gap, seconds, totals (per stat), choices (per layer), binding (names of limits),
        limits (limit, reached, slack, price each) and alternatives; where there is no choice, status "infeasible" with
        message, conflicts and nearest instead, and the error.

    Raises:
        InputError: the library is wrong, or a metric or stat is not in it.
    """
    variants = read_block_library(path)
    _check_name(wanted.metric, variants[0].metrics, f"{path} has no metric")
    for name in wanted.limits:
        _check_name(name, variants[0].stats, f"{path} has no stat")
    problem = _problem(path.name, variants, wanted)
    try:
        best = best_child(problem, settings)
    except InfeasibleError as error:
        conflicts = [{"limit": one.limit.name, "best": one.best} for one in error.conflicts]
        answer = {"status": "infeasible", "message": str(error), "conflicts": conflicts, "nearest": error.nearest}
        return answer, error
    others = alternatives(problem, settings, (ANYWHERE,), best, wanted.alternatives, wanted.min_distance)
    alternatives_json = [_found(other, variants, wanted) for other in others]
    return {**_found(best, variants, wanted), "alternatives": alternatives_json}, None


def _check_name(name: str, known: Mapping[str, float], words: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f", did you mean {close[0]}?" if close else ""
        raise InputError(f"{words} {name!r}{hint} (has: {', '.join(sorted(known))})")


def _problem(name: str, variants: Sequence[LibraryVariant], wanted: Wanted) -> Problem[Named]:
    choices = tuple(Choice(Named(one.layer, one.name), one.metrics[wanted.metric]) for one in variants)
    limits = tuple(
        Limit(stat, f"{stat} <= {upper:g}", tuple(one.stats[stat] for one in variants), 0.0, upper)
        for stat, upper in wanted.limits.items()
    )
    return Problem(name, variants[-1].layer + 1, choices, limits, "--limit")


def _found(best: Best[Named], variants: Sequence[LibraryVariant], wanted: Wanted) -> dict[str, Any]:
    solution = best.solution
    chosen = {(choice.replacement.layer, choice.replacement.name) for choice in solution.chosen}
    kept = [one for one in variants if (one.layer, one.name) in chosen]
    return {
        "status": solution.status,
        "metric": wanted.metric,
        "objective": solution.objective,
        "bound": solution.bound,
        "gap": solution.gap,
        "seconds": solution.seconds,
        "totals": {stat: math.fsum(one.stats[stat] for one in kept) for stat in sorted(kept[0].stats)},
        "choices": {f"layer_{one.layer}": one.name for one in kept},
        "binding": [use.name for use in solution.uses if use.binds and use.name in wanted.limits],
        "limits": {
            use.name: {"limit": use.allowed, "reached": use.reached, "slack": use.slack, "price": use.price}
            for use in solution.uses
            if use.name in wanted.limits
        },
    }
